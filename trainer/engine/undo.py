"""An update that is taken back on the device, so that the host need not know whether it was wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Undo:
    """Takes back updates of parameters, without a wait and without rounding.

    The difference is one of whole numbers, as which the bits of a float32 can be read: old + (new - old) is new, and
    old + 0 is old, also where new is not a number. They are calls for all parameters, thus a few kernels.

    Args:
        parameters: float32. A second copy of them is kept.
        flag: () on their device; an update is taken back while it is not 0.
    """

    def __init__(self, parameters: Sequence[Tensor], flag: Tensor) -> None:
        self._flag = flag
        self._bits = [p.detach().view(torch.int32) for p in parameters]
        self._before = [torch.empty_like(bits) for bits in self._bits]

    def note(self) -> None:
        """Before an update."""
        torch._foreach_copy_(self._before, self._bits)

    def undo(self) -> None:
        """After it: takes it back if the flag is set."""
        torch._foreach_sub_(self._bits, self._before)
        torch._foreach_mul_(self._bits, (self._flag == 0).int())
        torch._foreach_add_(self._bits, self._before)
