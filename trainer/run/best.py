"""The best model so far on validation, kept in memory, and early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config.directions import DIRECTIONS
from ..config.keys import Config
from ..config.schema import near
from ..errors import UserError

if TYPE_CHECKING:
    from ..engine.deepspeed_engine import Engine


class BestModel:
    """Keeps a copy of the parameters and buffers with the best value of one metric.

    Every rank keeps its own: the metric and the model are the same everywhere, so nothing is sent.

    Args:
        config: `trainer.best` names the metric.
        own_choice: the task's `best_metric`, (name, "min" or "max"), or None for the loss.
    """

    def __init__(self, config: Config, own_choice: tuple[str, str] | None) -> None:
        options = config.trainer.best
        name, mode = own_choice or ("loss", "min")
        self._guess_mode = False
        if options.metric not in ("auto", None) and options.metric != name:
            name = str(options.metric)
            self._guess_mode = options.mode == "auto" and name not in DIRECTIONS
            mode = DIRECTIONS.get(name, "min")
        self.metric, self.mode = name, options.mode if options.mode != "auto" else mode
        self.step = 0
        self.value = math.nan
        self.metrics: dict[str, float] = {}
        self._patience, self._waited = options.patience_evaluations, 0
        self._state: dict[str, Tensor] = {}

    @property
    def enough(self) -> bool:
        """Whether the run may stop: `patience_evaluations` validations have brought no better model."""
        return self._patience > 0 and self._waited >= self._patience

    def check(self, metrics: Mapping[str, float], why_without: Callable[[str], str] = lambda name: "") -> None:
        """Raises UserError, on every rank, unless the metric exists and it is known whether low or high is better.

        `why_without` gets the name of a missing metric and returns why validation lacks it; "" if that is not known.
        """
        if self.metric not in metrics:
            why = why_without(self.metric)
            raise UserError(
                f'"trainer.best.metric": validation has no metric "{self.metric}"'
                + (f": {why}: {', '.join(metrics)}." if why else f". {near(self.metric, metrics)}"),
                agreed=True,
            )
        if self._guess_mode:
            raise UserError(
                f'"trainer.best.mode" is needed: is a low or a high {self.metric} better? Set it to "min" or "max".',
                agreed=True,
            )

    def offer(self, engine: Engine, metrics: Mapping[str, float], step: int) -> None:
        """Keeps the present model if its metrics on validation are the best so far.

        If the metric is equal, the lower loss decides, then the earlier model: on a small validation set, many models
        have the same accuracy.

        Collective at ZeRO stage 3: every rank.
        """
        self.check(metrics)
        value = metrics[self.metric]
        better = math.isnan(self.value) or (value < self.value if self.mode == "min" else value > self.value)
        # An equal value is no progress: the patience runs on.
        self._waited = 0 if better and math.isfinite(value) else self._waited + 1
        tie = value == self.value and metrics["loss"] < self.metrics["loss"]
        # In the first validation every value counts as better, even nan. Such a model is never kept.
        if not math.isfinite(value) or not (better or tie):
            return
        self.step, self.value, self.metrics = step, value, dict(metrics)
        with engine.whole_parameters():
            for name, tensor in engine.model_state().items():
                kept = self._state.get(name)
                if kept is None or kept.shape != tensor.shape:
                    self._state[name] = tensor.clone()
                else:
                    kept.copy_(tensor)

    def restore(self, engine: Engine) -> None:
        """Restores the best parameters and buffers into the model. Collective at ZeRO stage 3: every rank."""
        with engine.whole_parameters(change=True):
            for name, tensor in engine.model_state().items():
                tensor.copy_(self._state[name])

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values for a checkpoint."""
        return self._state, {
            "step": self.step,
            "value": self.value,
            "metrics": dict(self.metrics),
            "waited": self._waited,
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], engine: Engine) -> None:
        """Restores what `state_dict` returned."""
        self.step, self.value, self._waited = int(values["step"]), float(values["value"]), int(values["waited"])
        self.metrics = dict(values["metrics"])
        self._state = {name: tensor.to(engine.device) for name, tensor in tensors.items()}

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return {"step": self.step, "metric": self.metric, "mode": self.mode, "value": self.value}
