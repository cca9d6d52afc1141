"""What a rehearsal looks at besides comparing: slips that make a run inexact only later, or that spoil it.

Each probe computes single micro-batches forward, without a backward, and asks one question. They end before the
comparison begins, and leave its state as they found it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import UserError
from ..exact.hashes import hash_each
from ..exact.micro_batches import Computed
from .causes import finding_of
from .python_state import Key, State, is_generator, is_number
from .results import Finding, differs, source_of
from .stage import Stage

# By how much counters are moved: whatever happens every 16 calls or more often is met, wherever a counter stands. Then
# round numbers and powers of two.
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
    """Raises UserError if a task's forward or loss talks to other ranks. Returns the micro-batch that it looked at."""
    with _Collectives() as heard:
        computed = stage.compute(0)
    # A SyncBatchNorm is labelled.
    if heard.names and not any(isinstance(module, nn.SyncBatchNorm) for module in stage.model.modules()):
        raise UserError(
            f"{stage.name} calls torch.distributed ({heard.names[0]}) in its forward or loss. Ranks compute other "
            "micro-batches at the same time, and not equally many of them: the call would mix them in a way that "
            "depends on the number of ranks, or wait forever.\nCompute with the samples of the micro-batch alone."
        )
    return computed


def refuse_use_of_running_statistics(stage: Stage) -> None:
    """Raises UserError if a training forward reads what normalisation layers collect; it holds no average then."""
    if differs(stage.forward(0, 0.25), stage.forward(0, 0.5)) is None:
        return
    # Or the forward changes something of its own, such as the vectors of a spectral norm: from one state, then.
    stage.put_back()
    one = stage.forward(0, 0.25)
    stage.put_back()
    same = stage.forward(0, 0.25)
    stage.put_back()
    if differs(one, same) is None and differs(one, stage.forward(0, 0.5)) is not None:
        raise UserError(
            f"{stage.name} reads the running statistics of a normalisation layer in its training forward. During a "
            "step they are not there: each micro-batch leaves its own statistics, which all ranks apply together after "
            "the step.\nFor frozen statistics give the layer a train() that keeps it in evaluation mode: its eval(), "
            "called in model(), does not last, as the trainer calls the model's train()."
        )


def under_moved_weights(stage: Stage, numbers: Sequence[int], parameters: Mapping[str, torch.Tensor]) -> list[str]:
    """Computes micro-batches with all weights moved by about a per cent, and leaves it at that.

    What a forward writes may follow the weights: a power iteration that has converged, or an average that equals
    them, stands still until they move.

    Returns:
        The names of the parameters that a forward has changed.
    """
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * (0.01 * (parameter.abs().mean() + 0.01)))
    moved = hash_each(parameters)
    for number in numbers:
        with contextlib.suppress(Exception):  # it may not be made for such weights
            stage.forward(number)
    now = hash_each(parameters)
    return [name for name in now if now[name] != moved[name]]


def moved_values(stage: Stage, moved: Sequence[Key], after: State) -> Finding | None:
    """Whether a number changes when a counter or a generator, which micro-batches move, stands elsewhere.

    Args:
        stage: computes.
        moved: what some micro-batches have changed of Python's state.
        after: the state after them.
    """
    counters = [k for k in moved if is_number(k, stage.before, after)]
    generators = [k for k in moved if is_generator(k, stage.before, after)]
    if not counters and not generators:
        return None
    stage.python.put_back(stage.before)
    base = stage.forward(0)
    for amount in _MOVES:
        for suspects in ([*counters, *generators], *([key] for key in (*counters, *generators))):
            stage.python.put_back(stage.before)
            for key in suspects:
                if key in counters:
                    stage.python.add(key, amount)
            if set(suspects) & set(generators):
                stage.python.stir(amount)
            part = None
            with contextlib.suppress(Exception):  # a value that cannot be
                part = differs(base, stage.forward(0))
            if part is None and len(suspects) > 1:
                break  # none of them
            if part is not None and len(suspects) == 1:
                stage.python.put_back(stage.before)
                return finding_of(stage, suspects[0], source_of(part), after)
    stage.python.put_back(stage.before)
    return None
