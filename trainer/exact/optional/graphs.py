"""CUDA graphs: what a rank computes for a micro-batch or a pack is launched as one piece.

For a small model the host takes longer to launch a kernel than the GPU takes to run it. A CUDA graph is a recording of
kernels with the memory that they read and write. One call launches it, and none of the host's code runs again. So only
what lies in that memory may change from step to step: samples, parameters, the loss's scale, and the seeds of random
numbers. The following has no graph, and is computed as without this module:

- a task whose forward or loss takes `progress`, because a graph would keep the first step's numbers;
- what reads values on the host, because a GPU refuses to record it;
- what draws random numbers on the host.

Nothing is assumed to be exact. In its first steps a shape is computed in both ways, and the bits are compared. The
audit computes a micro-batch of a graph again without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..order import seed_generators
from ..packs.values import same_bits
from ..splits import Batch

# Steps in which a graph is compared before it is used, as for packs.
TRIALS = 3
# Shapes that get a graph. Each keeps its gradients, and the memory of its activations, for the rest of the run.
MOST_GRAPHS = 8


class Draws(Protocol):
    """The random numbers of a computation."""

    def begin(self, keys: Sequence[int]) -> None:
        """A computation begins; `keys` are those of its micro-batches."""
        ...

    def end(self) -> None:
        """It has ended, or has failed."""
        ...

    def all_on_gpu(self) -> list[torch.Generator]:
        """The GPU's generators besides torch's own."""
        ...

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """A context in which a graph is recorded."""
        ...

    def host_drawn(self) -> bool:
        """Whether the host has drawn random numbers since `begin`."""
        ...


class OneStream:
    """The random numbers of a micro-batch that is computed alone: torch's own generators, seeded for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, keys: Sequence[int]) -> None:
        """As `Draws`."""
        seed_generators(keys[0], self._device)
        self._seeded = torch.default_generator.get_state()

    def end(self) -> None:
        """As `Draws`."""

    def all_on_gpu(self) -> list[torch.Generator]:
        """As `Draws`."""
        return []

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """As `Draws`."""
        return contextlib.nullcontext()

    def host_drawn(self) -> bool:
        """As `Draws`."""
        return not torch.equal(torch.default_generator.get_state(), self._seeded)


class Computed(NamedTuple):
    """What is computed of a micro-batch or a pack.

    Attributes:
        losses: () of a micro-batch, or (g,) summed losses.
        statistics: (size,) or (g, size) of normalisation layers.
        gradients: (place of the parameter, its gradient or one a micro-batch, which micro-batches have one), in the
            order of the backward. None stands for all.
    """

    losses: Tensor
    statistics: Tensor
    gradients: list[tuple[int, Tensor, list[bool] | None]]


class Work(NamedTuple):
    """A computation.

    Attributes:
        shape: names it besides the shapes of its samples. Work of one shape differs in samples and random numbers only.
        function: what is computed of samples. It draws from what `draws` has seeded.
        draws: its random numbers.
        keys: seeds of its micro-batches.
        step: optimizer steps made before this one.
    """

    shape: tuple[Any, ...]
    function: Callable[[Batch], Computed]
    draws: Draws
    keys: Sequence[int]
    step: int


class _Graph:
    """A recorded computation, with its memory."""

    def __init__(self, work: Work, arrays: Batch, pool: Any) -> None:
        self._draws = work.draws
        # Copies: a graph reads its samples from the same memory each time, so `replay` copies others there.
        self._arrays = {name: array.clone() for name, array in arrays.items()}
        self._graph = torch.cuda.CUDAGraph()
        self._draws.begin(work.keys)
        try:
            # CUDA refuses to record draws from a generator that the graph does not know.
            for generator in self._draws.all_on_gpu():
                self._graph.register_generator_state(generator)
            # Other threads may go on using the device: NCCL's watchdog asks for events.
            with (
                self._draws.recording(),
                torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"),
            ):
                self._found = work.function(self._arrays)
            if self._draws.host_drawn():
                raise RuntimeError("it draws random numbers on the host")
        finally:
            self._draws.end()

    def replay(self, arrays: Batch, keys: Sequence[int]) -> Computed:
        """Computes it for other samples. The next replay overwrites the result."""
        torch._foreach_copy_(list(self._arrays.values()), [arrays[name] for name in self._arrays])
        # Seeds must be set before: a graph draws from its generators as they are when it is launched.
        self._draws.begin(keys)
        try:
            self._graph.replay()
        finally:
            self._draws.end()
        return self._found


@dataclass
class _Known:
    """What is known of a shape."""

    graph: _Graph | None = None
    trials: int = 0
    step: int = -1
    refusal: str = ""


class Graphs:
    """The graphs of a rank.

    Attributes:
        unusable: why there are none at all; empty if there may be some.

    Args:
        tensors: the model's parameters and buffers. Graphs use their memory.
        follows_progress: whether the task's forward or loss takes the run's progress.
    """

    def __init__(self, tensors: Sequence[Tensor], follows_progress: bool) -> None:
        self._tensors = list(tensors)
        self.unusable = "the task's forward or loss takes `progress`" if follows_progress else ""
        self._known: dict[tuple[Any, ...], _Known] = {}
        self._addresses: list[int] = []
        self._pool: Any = None

    def begin(self) -> None:
        """Begins a step. If tensors of the model have moved in memory, all graphs are recorded again."""
        # A graph reads parameters at the addresses that they had when it was recorded.
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._addresses = addresses
            self._known.clear()

    def compute(self, work: Work, arrays: Batch) -> Computed:
        """Computes, with a graph if its bits are known to be the same.

        Args:
            work: the computation.
            arrays: its samples.
        """
        shapes = ((name, a.shape, a.stride(), a.dtype) for name, a in arrays.items())
        known = self._known.setdefault((*work.shape, *shapes), _Known())
        if known.graph is not None and known.trials >= TRIALS:
            return known.graph.replay(arrays, work.keys)
        work.draws.begin(work.keys)
        try:
            found = work.function(arrays)
        finally:
            work.draws.end()
        # Trials are counted in steps. All packs of a step have the same parameters, which may be 0 in the first one.
        if not self.unusable and not known.refusal and known.step != work.step:
            known.step = work.step
            self._try_out(known, work, arrays, found)
        return found

    def _try_out(self, known: _Known, work: Work, arrays: Batch, found: Computed) -> None:
        if known.graph is None and sum(k.graph is not None for k in self._known.values()) >= MOST_GRAPHS:
            known.refusal = f"{MOST_GRAPHS} shapes have one already"
            return
        try:
            if known.graph is None:
                # One pool for all graphs: only one runs at a time, and each keeps its results alive.
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                known.graph = _Graph(work, arrays, self._pool)
            difference = _difference(found, known.graph.replay(arrays, work.keys))
        except Exception as error:  # whatever a GPU refuses to record, or too little memory
            difference = str(error).strip().partition("\n")[0] or type(error).__name__
        if difference:
            known.graph, known.refusal = None, difference
        known.trials += 1

    def summary(self) -> dict[str, Any]:
        """For summary.json: how many shapes have a graph, and why others have none."""
        refused = sorted({known.refusal for known in self._known.values() if known.refusal})
        used = sum(known.graph is not None and known.trials >= TRIALS for known in self._known.values())
        refused = [self.unusable] if self.unusable else refused
        return {"shapes": used} | ({"refused": refused} if refused else {})


def _difference(alone: Computed, graph: Computed) -> str:
    """What differs between a computation and its graph; empty if nothing does. Waits for the device."""
    if not same_bits(alone.losses, graph.losses):
        return "the loss has other bits"
    if not same_bits(alone.statistics, graph.statistics):
        return "statistics have other bits"
    places = [[(place, present) for place, _, present in found.gradients] for found in (alone, graph)]
    same = places[0] == places[1]
    if not same or not all(same_bits(a, b) for (_, a, _), (_, b, _) in zip(alone.gradients, graph.gradients)):
        return "gradients have other bits"
    return ""
