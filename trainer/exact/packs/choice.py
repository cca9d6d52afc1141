"""The size of packs, by the clock."""

from __future__ import annotations

import time
from typing import Any

import torch


class Choice:
    """Finds the fastest size while the run goes on. No size changes a bit, so every step may try another.

    Single micro-batches are measured, then packs from the largest down, while smaller ones are faster. The two fastest
    are then measured again in turn: if the machine is busy for a while, both are slowed down. The shortest of a size's
    times counts, because other work only adds to it.

    Args:
        device: of the model. A GPU is timed by events, and the host does not wait for them.
    """

    STEPS = 3  # timed for each size; as many again for the two fastest

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times: dict[int, list[float]] = {}
        self._pending: list[tuple[int, float, Any, Any]] = []
        self._block: int | None = None
        self._began: Any = None
        self._now, self._work = 1, 1.0
        self.best: int | None = None

    def begin(self, block: int, work: float, limit: int | None, refused: set[int]) -> int:
        """A step of `block` micro-batches begins. Returns the size of its packs.

        Args:
            block: micro-batches of this rank.
            work: what they have to compute (samples, or tokens): times are compared for each unit of it.
            limit: the largest size that memory allows; None for any.
            refused: sizes that are not exact.
        """
        self._collect()
        if block == 0:  # an epoch's last, smaller batch may leave a rank without
            self._measures = False
            return 1
        if self._block is None:
            self._block = block
        sizes = [1]
        while sizes[-1] < self._block:
            sizes.append(2 * sizes[-1])
        sizes = [s for s in sizes if s not in refused and (limit is None or s <= limit)]
        self._now, self._work = self._next(sizes), work
        self._measures = block == self._block and self.best is None
        if self._measures:
            self._began = self._mark()
        return self._now

    def _next(self, sizes: list[int]) -> int:
        if self.best in sizes:
            assert self.best is not None
            return self.best
        self.best = None
        measured: list[int] = []
        for size in [1, *sorted(set(sizes) - {1}, reverse=True)]:
            if len(self._times.get(size, [])) < self.STEPS:
                return size
            measured.append(size)
            if len(measured) > 2 and self._shortest(size) > 0.95 * self._shortest(measured[-2]):
                break  # each size has to be tried first, which costs time
        fastest = sorted(measured, key=self._shortest)[:2]
        rarer = min(fastest, key=lambda size: len(self._times[size]))
        if len(self._times[rarer]) < 2 * self.STEPS and len(fastest) > 1:
            return rarer
        self.best = fastest[0]
        return self.best

    def _shortest(self, size: int) -> float:
        return min(self._times[size])

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def end(self, tried: bool) -> None:
        """The step's micro-batches have been computed. tried: whether some were computed twice, for a comparison."""
        if self._measures and not tried:
            self._pending.append((self._now, self._work, self._began, self._mark()))

    @property
    def speed_up(self) -> float | None:
        """How many times as fast the best size is as single micro-batches; None while that is not known."""
        if self.best is None or not self._times.get(1) or not self._times.get(self.best):
            return None
        return min(self._times[1]) / min(self._times[self.best])

    def _collect(self) -> None:
        while self._pending:
            size, work, began, ended = self._pending[0]
            if self._cuda:
                if not ended.query():  # not reached yet: the host looks again in a later step, and does not wait
                    return
                seconds = began.elapsed_time(ended) / 1e3
            else:
                seconds = ended - began
            self._times.setdefault(size, []).append(seconds / work)
            self._pending.pop(0)
