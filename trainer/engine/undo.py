"""An update that is taken back on the device. So the host need not wait to learn whether it was wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Undo:
    """Takes back updates of parameters, without a wait and without rounding.

    The bits of each float32 are read as a whole number (int32). So old + (new - old) is new, and old + 0 is old, even
    if new is nan. Each call works on all parameters at once, which takes a few kernels.

    Args:
        parameters: float32. A second copy of them is kept.
        flag: () on their device. An update is taken back if it is not 0.
    """

    def __init__(self, parameters: Sequence[Tensor], flag: Tensor) -> None:
        self._flag = flag
        self._bits = [p.detach().view(torch.int32) for p in parameters]
        self._before = [torch.empty_like(bits) for bits in self._bits]

    def note(self) -> None:
        """Notes the parameters. Call it before an update."""
        torch._foreach_copy_(self._before, self._bits)

    def undo(self) -> None:
        """Takes the update back if the flag is set. Call it after the update."""
        torch._foreach_sub_(self._bits, self._before)
        # The product with 0 or 1 needs no decision of the host, which would have to wait for the flag.
        torch._foreach_mul_(self._bits, (self._flag == 0).int())
        torch._foreach_add_(self._bits, self._before)
