"""CUDA graphs of a pretended GPU: operations with their memory, done again without the code that called them.

As on a GPU, nothing is computed while a graph is recorded: what was to be changed is as before, results are garbage.
What a GPU refuses to record is refused: waits of the host, and looking at or seeding a generator's state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten


class CudaGenerator:
    """A generator of the device: a handle of a state, which several handles may share."""

    def __init__(self, gpu: Any, state: torch.Generator) -> None:
        self._gpu, self.state = gpu, state
        self.device = torch.device("cuda", 0)
        self._draws = 0

    def _no_recording(self) -> None:
        if self._gpu.recorded is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def manual_seed(self, seed: int) -> CudaGenerator:
        self._no_recording()
        self.state.manual_seed(seed)
        return self

    def seed(self) -> int:
        self._no_recording()
        return self.state.seed()

    def initial_seed(self) -> int:
        return int(self.state.initial_seed())

    def get_state(self) -> torch.Tensor:
        self._no_recording()
        return self.state.get_state()

    def set_state(self, state: torch.Tensor) -> None:
        self._no_recording()
        self.state.set_state(state)

    def get_offset(self) -> int:
        """Not 0 if the state has moved since it was seeded."""
        self._no_recording()
        fresh = torch.Generator().manual_seed(self.state.initial_seed())
        return 0 if torch.equal(fresh.get_state(), self.state.get_state()) else 4

    def clone_state(self) -> CudaGenerator:
        return CudaGenerator(self._gpu, self.state.clone_state())

    def graphsafe_get_state(self) -> CudaGenerator:
        return CudaGenerator(self._gpu, self.state)

    def graphsafe_set_state(self, other: CudaGenerator) -> None:
        self.state = other.state


Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, torch.Generator | None]


def writes(func: Any) -> list[int]:
    """The places of the arguments that an operation changes."""
    return [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [x for x in tree_flatten(value)[0] if isinstance(x, torch.Tensor)]


def _makes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> bool:
    """Whether a result has memory of its own. Others are views of memory that is there, or were changed in place."""
    if any(r.alias_info is not None for r in func._schema.returns):
        return False
    given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
    return all(x.untyped_storage().data_ptr() not in given or not x.numel() for x in _tensors(out))


class CudaGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu
        self._operations: list[Operation] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._states: list[torch.Generator] = []

    def register_generator_state(self, generator: CudaGenerator) -> None:
        self._states.append(generator.state)

    def add(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: torch.Generator | None
    ) -> Callable[[Any], None]:
        """An operation is about to be done. Call what this returns with its result."""
        if state is not None and state not in self._states:
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        changed = [x for i in writes(func) for x in _tensors(args[i] if i < len(args) else None)]
        self._before += [(x, x.clone()) for x in [*changed, *_tensors(kwargs.get("out"))]]

        def done(out: Any) -> None:
            self._operations.append((func, args, kwargs, out, state))

        return done

    def end(self) -> None:
        """Recording has ended: results are garbage, and the rest is as before."""
        for func, args, kwargs, out, _ in self._operations:
            for made in _tensors(out) if _makes(func, args, kwargs, out) else []:
                if made.is_floating_point():
                    made.fill_(float("nan"))
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        self._gpu.launches["graph"] += 1
        # Torch writes the seed and the offset of each generator that the graph draws from, by a kernel each
        # (CUDAGeneratorState::replay_prologue in aten/src/ATen/cuda/CUDAGeneratorImpl.cpp).
        self._gpu.launches["seeds of a graph"] += 2 * len({id(state) for *_, state in self._operations if state})
        for func, args, kwargs, out, state in self._operations:
            with self._gpu.drawing_from(state):
                again = func(*args, **kwargs)
            if _makes(func, args, kwargs, out):
                for to, made in zip(_tensors(out), _tensors(again)):
                    to.copy_(made)


@contextlib.contextmanager
def recording(gpu: Any, graph: CudaGraph, **_: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    graph.register_generator_state(gpu.generators[gpu.index])
    gpu.recorded, before = graph, gpu.launches.copy()
    try:
        yield
    finally:
        gpu.recorded, gpu.launches = None, before
        graph.end()
