"""AdaScale: a learning rate for large batches. It follows how many small steps one large step is worth at the moment.

Johnson et al. 2020 (arXiv 2007.05105) made it for SGD. Averaging S times more samples divides the gradient's variance
by S and leaves its mean unchanged. If the variance dominates, a step of the large batch is worth S small ones; if the
mean dominates, it is worth one. The gain r in [1, S] lies between the two. It multiplies the learning rate, and a step
counts as r steps of the small batch: the paper's scale-invariant steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..config.keys import Config
from ..errors import UserError
from ..exact.gradient_noise import Noise
from ..exact.plan import BatchPlan


def gain(variance: float, squared: float, scale: float) -> float:
    """(sigma^2 + mu^2) / (sigma^2 / S + mu^2), between 1 and S; 1 where both are 0 (the paper's equation 3).

    Args:
        variance: sigma^2, the summed variance of a gradient of the base batch.
        squared: mu^2, the squared norm of the expected gradient.
        scale: S, this run's global batch over the base batch.
    """
    if variance + squared <= 0.0:
        return 1.0
    return min(max((variance + squared) / (variance / scale + squared), 1.0), scale)


class AdaScale:
    """The gain of every step, and how far the run has come.

    Before a step, `gain` and `factor` are those of this step. `observe` takes the noise in its gradient. After that,
    `gain` and `factor` are those of the next step. As in the paper's appendix B.3, the gain of a step comes from the
    steps before it. During the first 1000 / S steps it comes from the mean of their estimates, later from a moving
    average that keeps theta = max(1 - S / 1000, 0) of itself. The first step has gain 1.

    Two things differ from the paper. First, sigma^2 is estimated from all M micro-batches instead of S gradients of the
    base batch. This has the same expectation and less variance. Second, an average below 0 counts as 0, but a single
    estimate below 0 does not: mu^2 of one step is mostly noise and often negative. Without the negative values its
    average would be too large, and the gain too small.

    In an epoch's last, smaller batch, S is still that of a full global batch, as for the other scaling rules.

    All numbers are Python floats, computed from numbers that are the same on all ranks. So every rank has the same
    rate. On a GPU the host waits for the gradient's norms after each step.

    Args:
        scale: S.
        base_global_batch_size: samples of the base batch.
        schedule: position -> multiple of `optimizer.params.lr`.
        steps: the number of scale-invariant steps after which the run ends. `schedule` then counts these steps, too.
            None: the schedule counts optimizer steps, and the run ends after its epochs.
    """

    def __init__(
        self, scale: float, base_global_batch_size: int, schedule: Callable[[float], float], steps: int | None
    ) -> None:
        self.gain, self.position = 1.0, 0.0
        self._scale, self._base, self._schedule, self._until = scale, base_global_batch_size, schedule, steps
        self._keep = max(1.0 - scale / 1000.0, 0.0)
        self._made = self._estimates = 0  # steps; those that gave an estimate
        self._variance = self._squared = 0.0  # their averages

    @property
    def finished(self) -> bool:
        """Whether the run has made all its scale-invariant steps."""
        return self._until is not None and self.position >= self._until

    def factor(self, step: int) -> float:
        """The learning rate of the next step, which is optimizer step `step`, as a multiple of optimizer.params.lr."""
        return self._schedule(step if self._until is None else self.position) * self.gain

    def observe(self, noise: Noise | None) -> None:
        """Counts a step whose gradient gave `noise`; None if it gave no estimate."""
        self.position += self.gain
        self._made += 1
        if noise is None:
            return
        self._estimates += 1
        # keep = 1 - 1 / t makes the mean of t values. From t = 1000 / S on, the moving average forgets faster.
        keep = min(1.0 - 1.0 / self._estimates, self._keep)
        self._variance = keep * self._variance + (1.0 - keep) * noise.trace / self._base
        self._squared = keep * self._squared + (1.0 - keep) * noise.gradient_squared
        self.gain = gain(max(self._variance, 0.0), max(self._squared, 0.0), self._scale)

    def summary(self) -> dict[str, float]:
        """For summary.json: the scale-invariant steps so far, and how many of them an optimizer step was worth."""
        return {"position": self.position, "mean_gain": self.position / self._made if self._made else 1.0}

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "gain": self.gain,
            "position": self.position,
            "made": self._made,
            "estimates": self._estimates,
            "variance": self._variance,
            "squared": self._squared,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.gain, self.position = float(values["gain"]), float(values["position"])
        self._made, self._estimates = int(values["made"]), int(values["estimates"])
        self._variance, self._squared = float(values["variance"]), float(values["squared"])


def growth(config: Config, plan: BatchPlan) -> float:
    """S: the global batch over the base batch. Raises UserError if AdaScale cannot be used with them."""
    B, base = plan.global_batch_size, config.base_global_batch_size()
    if base > B:
        raise UserError(
            f'trainer.learning_rate.scaling_rule "adascale" is for batches that have grown: the global batch ({B}) is '
            f'smaller than the base batch ({base}).\nUse the rule "linear" or "sqrt", or a smaller '
            "trainer.learning_rate.base_global_batch_size."
        )
    if plan.micro_batches == 1:
        raise UserError(
            'trainer.learning_rate.scaling_rule "adascale" compares the gradients of micro-batches, but the global '
            f"batch of {B} samples is a single one (train_micro_batch_size_per_gpu {plan.micro_batch_size}).\n"
            f"Use a train_micro_batch_size_per_gpu of at most {max(1, B // 2)}."
        )
    return B / base
