"""Whether a task's loss is the sum over its samples, as the protocol demands, or a mean.

A mean gives the same bits at every number of ranks, but the trainer divides it once more, by the count of the global
batch. So with n samples in a micro-batch the gradient is n times too small, and smaller micro-batches weigh more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, cat

from ..errors import UserError
from ..exact.micro_batches import Computed
from ..tasks.contract import check_loss
from .stage import Stage

# The most samples that are taken, once and twice.
_MOST_SAMPLES = 8
# A smaller loss may be only the rounding of terms that cancel, so it is not judged.
_SMALLEST = 1e-6
# With the same outputs, a sum doubles up to rounding. A second forward may draw other noise, so there a wider limit
# holds: the ratio must be nearer to 1 than to 2.
_ROUNDING, _NOISE = 1e-3, 0.25


def refuse_means(stage: Stage, computed: Computed | None) -> None:
    """Raises UserError if the same samples twice give the same loss, not double. Does not restore Python's state.

    First loss() is called with the outputs that are there already, once and twice. This is cheap, but forward() may
    pass something to loss() in another way, and that would not double. So only a forward decides. It is in evaluation
    mode, where dropout and BatchNorm do not disturb. If a loss cannot be computed for other samples than the
    micro-batch's, nothing is refused.

    Args:
        stage: computes.
        computed: the first micro-batch. None to begin with the forward, which also finds a forward that averages.
    """
    equal = None if computed is None else _same_twice(_of_outputs(stage, computed), _ROUNDING)
    if equal is False:
        return
    number = min(1, len(stage.items) - 1)  # another micro-batch: losses that are equal by chance differ there
    if _same_twice(_of_samples(stage, number), _ROUNDING if equal is None else _NOISE):
        raise UserError(
            f"{stage.name}.loss() averages over its micro-batch: the same samples twice give the same loss, not "
            "double.\n"
            'Sum instead (reduction="sum"), and return the number of samples as the count: the trainer divides by the '
            "global batch's. Multiply a loss of the micro-batch as a whole by its number of samples."
        )


def _same_twice(loss_of: Callable[[int], float], tolerance: float) -> bool | None:
    """Whether the samples taken twice have the same loss as once; None if it cannot be computed."""
    try:
        once, twice = loss_of(1), loss_of(2)
    except Exception:  # it is made for a fixed size, or needs a graph
        return None
    return math.isfinite(once) and abs(once) > _SMALLEST and math.isclose(once, twice, rel_tol=tolerance)


def _of_outputs(stage: Stage, computed: Computed) -> Callable[[int], float]:
    item = stage.items[0]
    # Of half of them, so that twice as many need no more memory than the micro-batch does.
    chosen = max(1, min(item.samples // 2, _MOST_SAMPLES))

    def loss_of(times: int) -> float:
        outputs, arrays = (_repeated(v, item.samples, chosen, times) for v in (computed.outputs, computed.arrays))
        return float(check_loss(stage.name, stage.micro_batches.loss(item.batch, item.j, outputs, arrays))[0].detach())

    return loss_of


def _of_samples(stage: Stage, number: int) -> Callable[[int], float]:
    item = stage.items[number]
    chosen = max(1, min(item.samples // 2, _MOST_SAMPLES))

    def loss_of(times: int) -> float:
        modes = [(module, module.training) for module in stage.model.modules()]
        stage.model.eval()
        try:
            arrays = _repeated(stage.samples(number), item.samples, chosen, times)
            result = stage.micro_batches.forward(item.batch, item.j, arrays).result
        finally:
            for module, training in modes:
                module.training = training
        return float(check_loss(stage.name, result)[0].detach())

    return loss_of


def _repeated(value: Any, samples: int, chosen: int, times: int) -> Any:
    """Of each tensor with one row per sample the first `chosen` rows, repeated `times` times, without a graph."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != samples:
            return value
        return cat([value[:chosen].detach()] * times)
    if not isinstance(value, Mapping):
        return value
    result: Any = copy.copy(value)  # of its own type: outputs of transformers have attributes as well
    for name in value:
        result[name] = _repeated(value[name], samples, chosen, times)
    return result
