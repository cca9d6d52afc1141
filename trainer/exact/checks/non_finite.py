"""The error for a step whose loss or gradient is not finite."""

from __future__ import annotations

import math

from ...errors import NonFiniteError

_STATISTICS = (
    "\nOr the task's forward begins to read a BatchNorm's running statistics, as a layer in evaluation mode does: "
    "during a training step they are not available."
)


def non_finite(step: int, losses: list[float], norm: float, kept: bool = True, statistics: int = 0) -> NonFiniteError:
    """The error for a step whose loss or gradient is not finite; every rank has the same numbers.

    Args:
        step: from 0.
        losses, norm: of the step.
        kept: whether the parameters are as before the step.
        statistics: the numbers of running statistics that the model keeps.
    """
    bad = next((j for j, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        what = f"the loss of micro-batch {bad} is {losses[bad]}"
    else:
        what = f"the losses are finite, but the gradient's norm is {norm}"
    state = (
        "The parameters are kept as they were before it." if kept else "The parameters may have been updated with it."
    )
    error = NonFiniteError(
        f"Step {step + 1} is not finite: {what}. {state}\n"
        "A lower learning rate, warm-up (trainer.learning_rate.warmup_epochs) or gradient_clipping often helps."
        + (_STATISTICS if statistics and bad is not None else ""),
        agreed=True,
    )
    error.good_steps = step
    return error
