"""The gradients of a pack, added along the tree to what a rank has."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...errors import TrainerError
from ..gradient_sum import GradientSum
from ..optional.buckets import LastPart, Sender
from ..tree import pack_program

# Gradients of a pack are added for many parameters at once, up to this many bytes. Then their memory is free.
FLUSH_BYTES = 4 << 20


class PackSum:
    """Adds the gradients of a pack along the tree, parameter by parameter. A sink, see `leaves.Sink`.

    Until `close`, the rank's sum is changed only in buckets that have been sent. So a pack may be given up.

    Args:
        to: what the rank has.
        M: micro-batches of the step.
        part: those of the pack.
        norms: whether the norms of their gradients are wanted.
        audited: the place in `part` of the one that is audited; None for none.
        sender: where the pack is the last of the rank's: sends what is complete, see `buckets.LastPart`.

    Attributes:
        norms: after `close`, of the micro-batches' gradients, where they are wanted: () each.
        audited: after `close`, the gradients of the micro-batch that is audited, where there is one.
    """

    def __init__(
        self,
        to: GradientSum,
        M: int,
        part: Sequence[int],
        norms: bool,
        audited: int | None,
        sender: Sender | None = None,
    ) -> None:
        self._to, self._count, self._wants_norms, self._audit = to, len(part), norms, audited
        self._program = pack_program(M, tuple(part))
        self._places = to.growing.free(len(self._program.nodes))
        self._buffers = [to.buffer(place) for place in self._places]
        for _, _, missing in self._buffers:
            missing.zero_()
        arrivals = list(zip(self._program.nodes, self._places))
        self._last = None if sender is None else LastPart(to, arrivals, sender)
        self._pending: list[tuple[int, Tensor]] = []
        self._bytes = 0
        self._taken: set[int] = set()
        self._norm_of: dict[int, list[Tensor]] = {}
        self._audited: dict[int, Tensor] = {}
        self.norms: list[Tensor] = []
        self.audited: list[Tensor | None] = []

    def take(self, place: int, rows: Tensor, present: list[bool] | None) -> None:
        """As `leaves.Sink`."""
        self._taken.add(place)
        # A copy: `rows` are added to in place.
        if self._audit is not None and (present is None or present[self._audit]):
            self._audited[place] = rows[self._audit].clone()
        if present is not None:
            for k, there in enumerate(present):
                if not there:
                    rows[k].zero_()
            for (_, _, missing), start, size in zip(self._buffers, self._program.rows, self._program.sizes):
                missing[place] += sum(not there for there in present[start : start + size])
        self._pending.append((place, rows))
        self._bytes += rows.numel() * rows.element_size()
        complete = self._last is not None and self._last.arrived(place)
        if complete or self._bytes > FLUSH_BYTES:
            self._flush()
        if complete and self._last is not None:
            self._last.send()

    def _flush(self) -> None:
        if not self._pending:
            return
        rows = [r for _, r in self._pending]
        # Norms first: the additions below change the rows.
        if self._wants_norms:
            norms = torch._foreach_norm([row for r in rows for row in r.unbind()])
            for number, (place, _) in enumerate(self._pending):
                self._norm_of[place] = list(norms[number * self._count : (number + 1) * self._count])
        # Level by level: each adds what the one before has made.
        for first, stride, distance, count in self._program.levels:
            last = first + (count - 1) * stride + 1
            torch._foreach_add_(
                [r[first:last:stride] for r in rows],
                [r[first + distance : last + distance : stride] for r in rows],
            )
        for (_, views, _), node in zip(self._buffers, self._program.rows):
            torch._foreach_copy_([views[place] for place, _ in self._pending], [r[node] for r in rows])
        self._pending, self._bytes = [], 0

    def close(self) -> None:
        """Adds the pack to what the rank has."""
        self._flush()
        to, program = self._to, self._program
        absent = [place for place in range(to._count) if place not in self._taken]
        if absent:
            for (_, views, missing), size in zip(self._buffers, program.sizes):
                torch._foreach_zero_([views[place] for place in absent])
                missing[absent] += float(size)
        if self._wants_norms:
            zeros = [torch.zeros((), device=to.storage.device)] * self._count
            columns = [self._norm_of.get(place, zeros) for place in range(to._count)]
            self.norms = [torch.linalg.vector_norm(torch.stack(row)) for row in zip(*columns)]
        if self._audit is not None:
            self.audited = [self._audited.get(place) for place in range(to._count)]
        if self._last is not None:
            self._last.close()
        else:
            for node, place in zip(program.nodes, self._places):
                to.merge(to.growing.arrive(node, place))
        to.note_added(self._count)

    def check(self, gradients: Sequence[Tensor | None]) -> None:
        """Raises TrainerError unless what was taken are these gradients, one a parameter."""
        if self._taken != {place for place, gradient in enumerate(gradients) if gradient is not None}:
            raise _nested()


@contextlib.contextmanager
def taking(parameters: Sequence[Tensor], last: PackSum) -> Iterator[None]:
    """A context in which each parameter's gradient, of one micro-batch, goes to `last` as soon as it is computed."""
    taken: set[int] = set()

    def take(place: int, gradient: Tensor) -> None:
        if place in taken:
            raise _nested()
        taken.add(place)
        last.take(place, gradient.detach()[None], None)

    handles = [p.register_hook(functools.partial(take, place)) for place, p in enumerate(parameters)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_WAY_ON = "Start the run again with trainer.exchange_bucket_mib=null."


def _nested() -> TrainerError:
    return TrainerError(
        "A parameter's gradient was computed inside of a backward of the task's own, so parts of a wrong gradient may "
        f"have been sent to other ranks. The step was not applied.\n{_WAY_ON}"
    )


def given_up(step: int, error: Exception) -> TrainerError:
    """The error for a pack that is given up after parts of its gradient, which may be wrong, have been sent.

    No rank applies them: the last bucket of the step, for which all ranks wait, is never sent.
    """
    return TrainerError(
        f"A pack of step {step + 1} could not be computed ({error}), and parts of its gradient had been sent to other "
        f"ranks. The step was not applied.\n{_WAY_ON}"
    )
