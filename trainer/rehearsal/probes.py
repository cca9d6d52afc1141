"""Probes: they look for mistakes that would make a run inexact, or break it, only later.

Each probe computes forwards of single micro-batches, without a backward, and answers one question. The probes end
before the comparison begins, and restore the state for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UserError
from ..exact.checks.hashes import hash_each
from ..exact.micro_batches import Computed
from .causes import finding_of
from .python_state import Key, State, is_generator, is_number
from .results import Finding, differs, source_of
from .stage import Stage

# The amounts that are added to a counter. With 1 to 16, an event that comes at least every 16 calls comes, whatever the
# counter's value. The others are round numbers and powers of two: people often choose these.
_MOVES = (*range(1, 17), 20, 24, 25, 32, 50, 64, 100, 128, 256, 1000)


class _Collectives(TorchDispatchMode):
    """Notes calls of torch.distributed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name.rpartition("::")[2].strip("_"))
        return func(*args, **(kwargs or {}))


def refuse_collectives(stage: Stage) -> Computed:
    """Raises UserError if a task's forward or loss communicates with other ranks. Returns the first micro-batch."""
    with _Collectives() as heard:
        computed = stage.compute(0)
    # A SyncBatchNorm calls them, too. It is labelled, not refused.
    if heard.names and not any(isinstance(module, nn.SyncBatchNorm) for module in stage.model.modules()):
        raise UserError(
            f"{stage.name} calls torch.distributed ({heard.names[0]}) in its forward or loss. At that time, the ranks "
            "compute different micro-batches, and some compute fewer of them. The call would mix them in a way that "
            "depends on the number of ranks, or wait forever.\nUse only the samples of the micro-batch."
        )
    return computed


def refuse_use_of_running_statistics(stage: Stage) -> None:
    """Raises UserError if a training forward reads the running statistics. Their buffers hold no average then."""
    # The buffers are filled with two different values. If the results differ, the forward reads them.
    if differs(stage.forward(0, 0.25), stage.forward(0, 0.5)) is None:
        return
    # There may be another cause: the forward changes something itself, such as the vectors of a spectral norm. So each
    # forward below begins from the same state.
    stage.put_back()
    one = stage.forward(0, 0.25)
    stage.put_back()
    same = stage.forward(0, 0.25)
    stage.put_back()
    if differs(one, same) is None and differs(one, stage.forward(0, 0.5)) is not None:
        raise UserError(
            f"{stage.name} reads the running statistics of a normalisation layer in its training forward. During a "
            "step they are not available: each micro-batch leaves its own statistics, and all ranks apply them after "
            "the step.\nTo freeze the statistics, give the layer a train() that keeps it in evaluation mode. Calling "
            "its eval() in model() is not enough, because the trainer calls the model's train() later."
        )


def under_moved_weights(stage: Stage, numbers: Sequence[int], parameters: Mapping[str, torch.Tensor]) -> list[str]:
    """Computes micro-batches with all weights moved by about 1 %. Restores nothing.

    A forward may write values that follow the weights, such as a power iteration or an average of the weights. Once
    these have converged, they do not change until the weights do.

    Returns:
        The names of the parameters that a forward has changed.
    """
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * (0.01 * (parameter.abs().mean() + 0.01)))
    moved = hash_each(parameters)
    for number in numbers:
        with contextlib.suppress(Exception):  # the task may reject such weights
            stage.forward(number)
    now = hash_each(parameters)
    return [name for name in now if now[name] != moved[name]]


def moved_values(stage: Stage, moved: Sequence[Key], after: State) -> Finding | None:
    """A finding if a result depends on a counter or a generator that micro-batches change; else None.

    Args:
        stage: computes the micro-batches.
        moved: the values of Python's state that some micro-batches have changed.
        after: the state after them.
    """
    counters = [k for k in moved if is_number(k, stage.before, after)]
    generators = [k for k in moved if is_generator(k, stage.before, after)]
    if not counters and not generators:
        return None
    stage.python.put_back(stage.before)
    base = stage.forward(0)
    for amount in _MOVES:
        # First all at once, because usually none matters. If the result changes, one by one.
        for suspects in ([*counters, *generators], *([key] for key in (*counters, *generators))):
            stage.python.put_back(stage.before)
            for key in suspects:
                if key in counters:
                    stage.python.add(key, amount)
            if set(suspects) & set(generators):
                stage.python.stir(amount)
            part = None
            with contextlib.suppress(Exception):  # the task may reject such a value
                part = differs(base, stage.forward(0))
            if part is None and len(suspects) > 1:
                break  # no suspect matters at this amount
            if part is not None and len(suspects) == 1:
                stage.python.put_back(stage.before)
                return finding_of(stage, suspects[0], source_of(part), after)
    stage.python.put_back(stage.before)
    return None
