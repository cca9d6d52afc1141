"""Whether a task's loss is the sum over its samples that the protocol wants, or a mean.

A mean gives the same bits at every number of ranks, but it is divided once more by the global batch's count: the
gradient is as many times too small as a micro-batch has samples, and smaller micro-batches weigh more.
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

# Samples that are looked at, once and twice.
_MOST_SAMPLES = 8
# Below, a loss may be nothing but the rounding of terms that cancel.
_SMALLEST = 1e-6
# Of outputs at hand the sum doubles up to rounding. A second forward may draw other noise: then, nearer to 1 than to 2.
_ROUNDING, _NOISE = 1e-3, 0.25


def refuse_means(stage: Stage, computed: Computed | None) -> None:
    """Raises UserError if the same samples twice give the same loss, not double. Leaves Python's state as it comes.

    Asked first of the outputs at hand, which costs two calls of loss(). Whatever forward() hands to loss() in another
    way would not double then, so only a forward in evaluation mode, where dropout and BatchNorm do not disturb, settles
    it. A loss that cannot be computed of other samples than the micro-batch's is not accused.

    Args:
        stage: computes.
        computed: the first micro-batch. None to ask the forward at once, which also finds a forward that averages.
    """
    equal = None if computed is None else _same_twice(_of_outputs(stage, computed), _ROUNDING)
    if equal is False:
        return
    number = min(1, len(stage.items) - 1)  # another one, as a chance equality does not repeat itself
    if _same_twice(_of_samples(stage, number), _ROUNDING if equal is None else _NOISE):
        raise UserError(
            f"{stage.name}.loss() averages over its micro-batch: the same samples twice give the same loss, not "
            "double.\n"
            'Sum instead (reduction="sum"), and return the number of samples as the count: the trainer divides by the '
            "global batch's. Multiply a loss of the micro-batch as a whole by its number of samples."
        )


def _same_twice(loss_of: Callable[[int], float], tolerance: float) -> bool | None:
    """Whether samples taken twice have the loss that they have once; None if that cannot be computed."""
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
    """The first `chosen` rows of what has one row a sample, so many times over, as fresh tensors without a graph."""
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
