"""The learning rate of every step of a run, as its config asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ..config.keys import Config
from ..exact.plan import BatchPlan
from .adascale import AdaScale, growth
from .learning_rate import factor, scaling_factor


class Rates:
    """Step -> learning rate, as a multiple of `optimizer.params.lr`.

    Attributes:
        adascale: computes the gain of each step; None if the config does not ask for it.

    Args:
        config, plan: of the run.
        steps_per_epoch, total_steps: of the run.
    """

    def __init__(self, config: Config, plan: BatchPlan, steps_per_epoch: int, total_steps: int) -> None:
        rate = config.trainer.learning_rate
        self._left_to_deepspeed = config.scheduler is not None
        self.adascale: AdaScale | None = None
        # AdaScale has no fixed scale: it multiplies each step's rate by that step's gain.
        scale, length = 1.0, total_steps
        if rate.scaling_rule == "adascale":
            length = rate.adascale_steps or total_steps
        elif rate.scaling_rule != "none":
            scale = scaling_factor(rate.scaling_rule, plan.global_batch_size, config.base_global_batch_size())
        self._schedule: Callable[[float], float] = functools.partial(
            factor,
            scale=scale,
            warmup_steps=round(rate.warmup_epochs * steps_per_epoch),
            total_steps=length,
            schedule=rate.schedule,
            final_fraction=rate.final_fraction,
        )
        if rate.scaling_rule == "adascale":
            base = config.base_global_batch_size()
            self.adascale = AdaScale(growth(config, plan), base, self._schedule, rate.adascale_steps)

    def factor(self, step: int) -> float | None:
        """The rate of the next step, which is optimizer step `step`; None if DeepSpeed's scheduler sets it."""
        if self._left_to_deepspeed:
            return None
        return self._schedule(step) if self.adascale is None else self.adascale.factor(step)
