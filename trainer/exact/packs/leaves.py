"""The gradients that a pack's backward leaves behind: one a micro-batch and parameter, until a sink takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Sink(Protocol):
    """Takes the gradients of a pack."""

    def take(self, place: int, rows: Tensor, present: list[bool] | None) -> None:
        """Takes one parameter's gradients.

        Args:
            place: of the parameter.
            rows: (g, *shape) float32, one a micro-batch; the sink may change them.
            present: which micro-batches used the parameter; None for all. Other rows have no meaning.
        """
        ...


class Kept:
    """A sink that keeps what it takes, in order."""

    def __init__(self) -> None:
        self.taken: list[tuple[int, Tensor, list[bool] | None]] = []

    def take(self, place: int, rows: Tensor, present: list[bool] | None) -> None:
        """As `Sink`."""
        self.taken.append((place, rows, present))


class Leaves:
    """Collects gradients while the backward of a pack goes through it.

    A parameter goes to the sink as soon as the gradients of all its uses have come. So memory holds g gradients for the
    layers under way only, not for the whole model. Gradients of several uses are added in the order in which they come,
    as autograd does.

    Attributes:
        shared: parameters that get gradients both after the backward and in another way. Autograd would add them in an
            order that is not known here.

    Args:
        parameters: the trained ones, in order.
        g: micro-batches in the pack.
        sink: takes what is complete.
    """

    def __init__(self, parameters: Sequence[Tensor], g: int, sink: Sink) -> None:
        self._shapes = {place: parameter.shape for place, parameter in enumerate(parameters)}
        self._like, self._g, self._sink = parameters[0], g, sink
        self._rows: dict[int, Tensor] = {}
        self._present: dict[int, list[bool] | None] = {}
        self._cast: dict[int, Tensor] = {}  # gradients of another type than the parameter's
        self._cast_by_use: set[int] = set()
        self._expected: dict[int, int] = {}
        self._held: set[int] = set()
        self.shared: set[int] = set()
        self._done: set[int] = set()

    @property
    def device_type(self) -> str:
        """Where the parameters lie: "cpu" or "cuda"."""
        return self._like.device.type

    def expect(self, place: int) -> None:
        """Notes that one more gradient of a parameter will come. It does not come if its use leads to no loss."""
        if place in self._held:
            self.shared.add(place)
        self._expected[place] = self._expected.get(place, 0) + 1

    def expect_shape(self, place: int, like: Tensor) -> None:
        """Gives a tensor that follows from parameters a place, below 0."""
        self._shapes[place] = like.shape
        if like.dtype == torch.float32:
            self._cast_by_use.add(place)

    def is_expected(self, place: int) -> bool:
        """Whether gradients come from a use of it."""
        return self._expected.get(place, 0) > 0

    def hold(self, places: set[int]) -> None:
        """Notes that these parameters get more gradients after the backward, see `pack.Pack.derived`."""
        self.shared |= {place for place in places if place in self._held or self._expected.get(place)}
        self._held |= places

    def put(self, place: int, rows: Tensor) -> None:
        """Adds gradients of all micro-batches: (g, *shape), fresh.

        Autocast casts a parameter once a forward. So autograd adds the gradients of all such uses in that type, and
        then turns the sum into one of the parameter's type. What follows from parameters is cast for each use.
        """
        rows = rows.view(self._g, *self._shapes[place])
        if place in self._cast_by_use:
            self._put(place, rows.to(torch.float32))
        elif rows.dtype != torch.float32:
            if place in self._cast:
                self._cast[place].add_(rows)
            else:
                self._cast[place] = rows
        else:
            self._put(place, rows)
        self._count(place)

    def _put(self, place: int, rows: Tensor) -> None:
        if place not in self._rows:
            self._rows[place], self._present[place] = rows, None
        elif self._present[place] is None:
            self._rows[place].add_(rows)
        else:
            for k in range(self._g):
                self._add(place, k, rows[k])

    def put_one(self, place: int, k: int, gradient: Tensor) -> None:
        """Adds the gradient of micro-batch k."""
        if place not in self._rows:
            self._rows[place] = torch.empty(self._g, *self._shapes[place], device=gradient.device)
            self._present[place] = [False] * self._g
        self._add(place, k, gradient)
        self._count(place)

    def _add(self, place: int, k: int, gradient: Tensor) -> None:
        present = self._present[place]
        if present is None or present[k]:
            self._rows[place][k].add_(gradient)
        else:
            self._rows[place][k].copy_(gradient)
            present[k] = True

    def _count(self, place: int) -> None:
        if place < 0 or place in self._held:  # complete only after the backward, see `finish`
            return
        self._expected[place] -= 1
        if self._expected[place] == 0:
            self._pass_on(place)

    def _pass_on(self, place: int) -> None:
        assert place not in self._done, "a gradient came after its parameter was complete"
        self._done.add(place)
        self._uncast(place)
        present = self._present.pop(place)
        self._sink.take(place, self._rows.pop(place), None if present is None or all(present) else present)

    def _uncast(self, place: int) -> None:
        if place in self._cast:
            self._put(place, self._cast.pop(place).to(torch.float32))

    def of(self, place: int) -> tuple[Tensor, list[bool] | None] | None:
        """The gradients so far: (g, *shape), and which of them came, None for all; None if nothing came."""
        self._uncast(place)
        rows, present = self._rows.pop(place, None), self._present.pop(place, None)
        if rows is None:
            return None
        return rows, None if present is None or all(present) else present

    def clear(self) -> None:
        """Frees what is left of a pack that was given up."""
        self._rows.clear()
        self._cast.clear()

    def finish(self) -> None:
        """Passes on what is left."""
        for place in sorted(self._rows.keys() | self._cast.keys()):
            self._pass_on(place)
