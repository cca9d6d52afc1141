"""The ranks' flags: if one rank raises its flag, all ranks see it in the same step."""

from __future__ import annotations

import collections

import torch
from torch import Tensor


class Flags:
    """Whether any rank has raised its flag: the same answer on every rank in the same step.

    On a GPU, the host does not wait: it gets the answer of two steps before, which has been copied by then.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._copies: collections.deque[tuple[Tensor, torch.cuda.Event]] = collections.deque()

    def read(self, flags: Tensor) -> bool:
        """Takes the flags of this step's micro-batches, (M,) float32. Returns whether to stop after this step."""
        if not self._cuda:  # on the CPU there is nothing to wait for
            return bool(flags.any())
        copied = torch.cuda.Event()
        host = torch.empty((), pin_memory=True).copy_(flags.max(), non_blocking=True)  # device to host, not waited for
        copied.record()
        self._copies.append((host, copied))
        if len(self._copies) < 3:  # the first two steps have no earlier answer
            return False
        # The age is fixed, not "the newest that has arrived": ranks must stop after the same step.
        earlier, event = self._copies.popleft()
        event.synchronize()
        return bool(earlier)
