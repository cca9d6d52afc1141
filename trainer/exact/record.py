"""What a micro-batch sends to all ranks besides its gradient: one row of numbers, whose columns have names.

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
    """The records of this rank's block, filled one micro-batch after the other.

    In a step, call `start()`, then for each micro-batch fill `statistics` and call `add(...)`.

    Args:
        rows: (most micro-batches of a rank, layout.size) float32, where the records are written.
        layout: of its columns.
    """

    def __init__(self, rows: Tensor, layout: RecordLayout) -> None:
        self._all = everything = Records(rows, layout)
        # Views of single records are made once: an indexing operation costs more than the copy that follows it.
        self._losses = list(everything.losses.unbind())
        self._statistics = list(everything.statistics.unbind())
        self._norms = None if everything.norms is None else list(everything.norms.unbind())
        self._flags = everything.flags
        self._next = 0

    def start(self) -> None:
        """Begins a step."""
        self._next = 0

    @property
    def statistics(self) -> Tensor:
        """Where the next micro-batch's statistics go: (statistics_size,) float32. Fill it before `add`."""
        return self._statistics[self._next]

    def add(self, loss: Tensor, norm: Tensor | None) -> None:
        """Notes the next micro-batch: its summed loss (), and the norm of its gradient () where that is measured."""
        self._losses[self._next].copy_(loss.detach())
        if self._norms is not None:
            assert norm is not None
            self._norms[self._next].copy_(norm)
        self._next += 1

    def add_pack(self, losses: Tensor, statistics: Tensor, norms: Sequence[Tensor]) -> None:
        """Notes the next micro-batches: losses (g,), statistics (g, statistics_size), and norms where measured."""
        begin, end = self._next, self._next + len(losses)
        self._all.losses[begin:end].copy_(losses)
        if statistics.numel():
            self._all.statistics[begin:end].copy_(statistics)
        if self._all.norms is not None:
            self._all.norms[begin:end].copy_(torch.stack(list(norms)))
        self._next = end

    def raise_flag(self) -> None:
        """From now on this rank's micro-batches carry a flag, which all ranks see in the same step."""
        # It is never lowered again: this rank keeps asking until the run stops.
        self._flags.fill_(1.0)
