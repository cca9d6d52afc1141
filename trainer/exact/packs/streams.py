"""Random numbers of a pack: each micro-batch draws from its own stream, as when it is computed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Streams:
    """The random numbers of a pack's micro-batches: one stream each, as if it were computed alone.

    Args:
        keys: of the micro-batches.
        device: of the model.
    """

    def __init__(self, keys: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self._keys = keys
        self._states: list[list[Tensor] | None] = [None] * len(keys)
        # A function that draws without its stream is found by this state, which nothing else moves.
        for generator in self._generators:
            generator.manual_seed(0)
        self._resting = [generator.get_state() for generator in self._generators]
        self._disturbed = False

    @contextlib.contextmanager
    def of(self, k: int) -> Iterator[None]:
        """Torch's generators are those of micro-batch k."""
        self._look()
        self._take_up(k)
        try:
            yield
        finally:
            self._put_down(k)
            self._rest()

    def each(self) -> Iterator[int]:
        """All micro-batches in order; torch's generators are those of the one at hand."""
        self._look()
        try:
            for k in range(len(self._keys)):
                self._take_up(k)
                yield k
                self._put_down(k)
        finally:
            self._rest()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is drawn meanwhile is no micro-batch's."""
        self._look()
        try:
            yield
        finally:
            self._rest()

    def _take_up(self, k: int) -> None:
        states = self._states[k]
        for i, generator in enumerate(self._generators):
            if states is None:
                generator.manual_seed(self._keys[k])
            else:
                generator.set_state(states[i])

    def _put_down(self, k: int) -> None:
        self._states[k] = [generator.get_state() for generator in self._generators]

    def _rest(self) -> None:
        for generator, state in zip(self._generators, self._resting):
            generator.set_state(state)

    def _look(self) -> None:
        self._disturbed |= any(
            not torch.equal(generator.get_state(), state) for generator, state in zip(self._generators, self._resting)
        )

    def disturbed(self) -> bool:
        """Whether something drew random numbers that were no micro-batch's."""
        self._look()
        return self._disturbed
