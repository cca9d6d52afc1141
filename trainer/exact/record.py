"""What a micro-batch sends to all ranks besides its gradient: one row of numbers. Its columns have names.

All ranks see the losses and statistics of all M micro-batches in order, so whatever is computed from them agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecordLayout:
    """The columns of a record: its loss, its statistics, its gradient's norm if that is measured, and a flag.

    Attributes:
        statistics_size: floats of one micro-batch's BatchNorm statistics.
        norms: whether the norm of each micro-batch's gradient is measured.
    """

    statistics_size: int
    norms: bool = False

    @property
    def size(self) -> int:
        """Floats of a record."""
        return 1 + self.statistics_size + self.norms + 1  # loss, statistics, norm (True counts as 1), flag


class Records:
    """The records of some micro-batches in order.

    Attributes:
        losses: (n,) summed losses.
        statistics: (n, statistics_size).
        norms: (n,) of the micro-batches' gradients; None where they are not measured.
        flags: (n,) 1 for a micro-batch whose rank has raised its flag (it asks to stop), else 0.

    Args:
        rows: (n, layout.size) float32; the attributes are views of it.
        layout: of its columns.
    """

    def __init__(self, rows: Tensor, layout: RecordLayout) -> None:
        self.losses = rows[:, 0]
        self.statistics = rows[:, 1 : 1 + layout.statistics_size]
        self.norms = rows[:, 1 + layout.statistics_size] if layout.norms else None
        self.flags = rows[:, -1]


class OwnRecords:
    """The records of this rank's block.

    Args:
        rows: (most micro-batches of a rank, layout.size) float32, where the records are written.
        layout: of its columns.
    """

    def __init__(self, rows: Tensor, layout: RecordLayout) -> None:
        everything = Records(rows, layout)
        # Views of single records are made once: an indexing operation costs more than the copy that follows it.
        self._losses = list(everything.losses.unbind())
        self._statistics = list(everything.statistics.unbind())
        self._norms = None if everything.norms is None else list(everything.norms.unbind())
        self._flags = everything.flags

    def statistics(self, number: int) -> Tensor:
        """Where the statistics of the block's micro-batch `number` go: (statistics_size,) float32. Fill it."""
        return self._statistics[number]

    def add(self, number: int, loss: Tensor, norm: Tensor | None) -> None:
        """Notes the block's micro-batch `number`: its summed loss (), and its gradient's norm () where measured."""
        self._losses[number].copy_(loss.detach())
        if self._norms is not None:
            assert norm is not None
            self._norms[number].copy_(norm)

    def add_pack(self, numbers: Sequence[int], losses: Tensor, statistics: Tensor, norms: Sequence[Tensor]) -> None:
        """Notes some of the block's micro-batches: losses (g,), statistics (g, size), and norms where measured."""
        to, what = [self._losses[n] for n in numbers], list(losses.unbind())
        if statistics.numel():
            to += [self._statistics[n] for n in numbers]
            what += statistics.unbind()
        if self._norms is not None:
            to += [self._norms[n] for n in numbers]
            what += norms
        torch._foreach_copy_(to, what)  # one call: on a GPU one kernel for some hundred tensors

    def raise_flag(self) -> None:
        """Gives all later records of this rank a flag, which all ranks see in the same step."""
        # It is never lowered again: this rank keeps asking until the run stops.
        self._flags.fill_(1.0)
