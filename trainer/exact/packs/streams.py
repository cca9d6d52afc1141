"""Random numbers of a pack: each micro-batch draws from its own stream, as when it is computed alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class Streams:
    """The random numbers of a pack's micro-batches: one stream each, as if it were computed alone.

    Call `begin` before a pack and `end` after it.

    Args:
        g: micro-batches of the pack.
        device: of the model.
    """

    def __init__(self, g: int, device: torch.device) -> None:
        self._host = torch.default_generator
        self._gpu = torch.cuda.default_generators[device.index] if device.type == "cuda" else None
        self._keys: Sequence[int] = ()
        self._own: list[tuple[torch.Generator, torch.Generator | None] | None] = [None] * g
        # Between draws, torch's generators are in a state of rest. If it moves, a function has drawn without a stream.
        # On a GPU, states are swapped and not copied: that is allowed while a CUDA graph is recorded, too.
        self._usual: torch.Generator | None = None
        self._resting_gpu: torch.Generator | None = None
        self._recording = self._disturbed = False

    def begin(self, keys: Sequence[int]) -> None:
        """A pack begins. keys: of its micro-batches; each seeds a stream."""
        for own, key in zip(self._own, keys):
            for generator in own or ():
                if generator is not None:
                    generator.manual_seed(key)
        self._keys, self._disturbed = keys, False
        self._host.manual_seed(0)
        self._resting_host = self._host.get_state()
        if self._gpu is not None:
            self._usual = self._gpu.graphsafe_get_state()
            self._resting_gpu = self._gpu.clone_state()
            self._resting_gpu.manual_seed(0)
            self._gpu.graphsafe_set_state(self._resting_gpu)

    def end(self) -> None:
        """The pack has been computed. Torch's own generator of the GPU gets its state back."""
        if self._gpu is not None and self._usual is not None:
            self._gpu.graphsafe_set_state(self._usual)
            self._usual = None

    def all_on_gpu(self) -> list[torch.Generator]:
        """The GPU's generators of all micro-batches, which a CUDA graph has to know before it is recorded."""
        return [generator for k in range(len(self._own)) if (generator := self._of(k)[1]) is not None]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """A context in which a CUDA graph is recorded: the states of the GPU's generators cannot be read then."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def host_drawn(self) -> bool:
        """Whether a micro-batch has drawn random numbers on the host."""
        fresh = torch.Generator()
        return any(
            own is not None and not torch.equal(own[0].get_state(), fresh.manual_seed(key).get_state())
            for own, key in zip(self._own, self._keys)
        )

    def generator(self, k: int, device: torch.device) -> torch.Generator:
        """Micro-batch k's generator, for a function that takes one."""
        host, gpu = self._of(k)
        if device.type == "cpu":
            return host
        assert gpu is not None
        return gpu

    @contextlib.contextmanager
    def of(self, k: int) -> Iterator[None]:
        """Torch's generators are those of micro-batch k, for functions that take none."""
        self._look()
        host, gpu = self._of(k)
        self._host.set_state(host.get_state())
        if self._gpu is not None and gpu is not None:
            self._gpu.graphsafe_set_state(gpu)
        try:
            yield
        finally:
            host.set_state(self._host.get_state())
            self._rest()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """A context for draws that belong to no micro-batch."""
        self._look()
        try:
            yield
        finally:
            if self._resting_gpu is not None:
                self._resting_gpu.manual_seed(0)
            self._rest()

    def _of(self, k: int) -> tuple[torch.Generator, torch.Generator | None]:
        own = self._own[k]
        if own is None:
            host, gpu = torch.Generator(), None if self._gpu is None else self._gpu.clone_state()
            for generator in (host, gpu):
                if generator is not None:
                    generator.manual_seed(self._keys[k])
            own = self._own[k] = host, gpu
        return own

    def _rest(self) -> None:
        self._host.set_state(self._resting_host)
        if self._gpu is not None and self._resting_gpu is not None:
            self._gpu.graphsafe_set_state(self._resting_gpu)

    def _look(self) -> None:
        with torch._C.DisableTorchFunction():  # a pack sees what is called
            self._disturbed |= not torch.equal(self._host.get_state(), self._resting_host)
        if self._resting_gpu is not None and not self._recording:
            self._disturbed |= self._resting_gpu.get_offset() != 0

    def disturbed(self) -> bool:
        """Whether something drew random numbers that were no micro-batch's."""
        self._look()
        return self._disturbed
