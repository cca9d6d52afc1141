"""Random numbers of a pack: each micro-batch draws from its own stream, as when it is computed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class Streams:
    """The random numbers of a pack's micro-batches: one stream each, as if it were computed alone.

    Args:
        keys: of the micro-batches.
        device: of the model.
    """

    def __init__(self, keys: Sequence[int], device: torch.device) -> None:
        self._torchs = [torch.default_generator]
        if device.type == "cuda":
            self._torchs.append(torch.cuda.default_generators[device.index])
        self._keys = keys
        self._own: list[list[torch.Generator] | None] = [None] * len(keys)
        # A function that draws without its stream is found by this state, which nothing else moves.
        for generator in self._torchs:
            generator.manual_seed(0)
        self._resting = [generator.get_state() for generator in self._torchs]
        self._disturbed = False

    def generator(self, k: int, device: torch.device) -> torch.Generator:
        """Micro-batch k's generator, for a function that takes one."""
        return self._of(k)[device.type == "cuda"]

    @contextlib.contextmanager
    def of(self, k: int) -> Iterator[None]:
        """Torch's generators are those of micro-batch k, for functions that take none."""
        self._look()
        own = self._of(k)
        for generator, from_ in zip(self._torchs, own):
            generator.set_state(from_.get_state())
        try:
            yield
        finally:
            for generator, to in zip(self._torchs, own):
                to.set_state(generator.get_state())
            self._rest()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is drawn meanwhile is no micro-batch's."""
        self._look()
        try:
            yield
        finally:
            self._rest()

    def _of(self, k: int) -> list[torch.Generator]:
        own = self._own[k]
        if own is None:
            own = [torch.Generator(generator.device).manual_seed(self._keys[k]) for generator in self._torchs]
            self._own[k] = own
        return own

    def _rest(self) -> None:
        for generator, state in zip(self._torchs, self._resting):
            generator.set_state(state)

    def _look(self) -> None:
        self._disturbed |= any(
            not torch.equal(generator.get_state(), state) for generator, state in zip(self._torchs, self._resting)
        )

    def disturbed(self) -> bool:
        """Whether something drew random numbers that were no micro-batch's."""
        self._look()
        return self._disturbed
