"""What one micro-batch has of a pack's tensors, and one tensor of what all of them have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch_norm import RunningStatistics
from .layers import Cut, Join, cut, name_of
from .leaves import Leaves
from .nested import filled, flat, mapped
from .tensors import NUMBERS, PARTED, Tensors
from .verdicts import RefusedError


class Alias(torch.autograd.Function):
    """A parameter as one micro-batch sees it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, leaves: Leaves, index: int, k: int) -> Tensor:
        """The parameter itself."""
        ctx.leaves, ctx.index, ctx.k = leaves, index, k
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        """The leaves take the gradient."""
        ctx.leaves.put_one(ctx.index, ctx.k, grad)
        return None, None, None, None


class Shares:
    """Takes arguments apart, and joins results.

    Attributes:
        scratch: where the micro-batches' statistics go, as from `RunningStatistics.scratch_blocks`.
        ends: of the first micro-batch's graph in the present call: its node -> what lies behind it.

    Args:
        g: micro-batches in the pack.
        tensors: what each tensor is.
        leaves: takes the gradients.
        statistics: of normalisation layers.
    """

    def __init__(self, g: int, tensors: Tensors, leaves: Leaves, statistics: RunningStatistics) -> None:
        self._g, self._tensors, self._leaves, self._statistics = g, tensors, leaves, statistics
        self.scratch = statistics.scratch_blocks(g)
        # The pieces of the present call only. Each use of a tensor gives it a gradient of its own, as in a micro-batch
        # alone: pieces that several calls shared would add their gradients in another order.
        self._cuts: dict[tuple[int, bool], tuple[Tensor, int, tuple[Tensor, ...]]] = {}
        self.ends: dict[Any, Any] = {}
        self._low_uses: dict[int, bool] = {}  # with autocast: whether a parameter is used for one at a time

    def begin_call(self) -> None:
        """What is taken apart from now on belongs to another call."""
        self._cuts.clear()
        self.ends.clear()

    def part(self, value: Any, k: int, scaled: frozenset[int] = frozenset()) -> Any:
        """What micro-batch k sees of a function's arguments; one that is given twice is one tensor here, too.

        Args:
            value: the arguments.
            k: the micro-batch.
            scaled: places of numbers that stand for all samples, as from `trace.scaled_numbers`.
        """
        same: dict[int, Tensor] = {}
        if not scaled:
            return self._parts(value, k, same, None)
        places = iter(range(len(flat(value, [])) + 1))
        return type(value)(self._parts(v, k, same, (scaled, places)) for v in value)

    def _parts(self, value: Any, k: int, same: dict[int, Tensor], numbers: Any) -> Any:
        if numbers is not None and not isinstance(value, slice):
            place = next(numbers[1])
            if place in numbers[0]:
                return value // self._g
            if isinstance(value, Mapping):
                for _ in value:
                    next(numbers[1])
        if isinstance(value, Tensor):
            if id(value) not in same:
                same[id(value)] = self.own(value, k)
            return same[id(value)]
        if isinstance(value, slice) and numbers is not None:
            return slice(*(self._parts(v, k, same, numbers) for v in (value.start, value.stop, value.step)))
        return mapped(value, lambda v: self._parts(v, k, same, numbers))

    def _piece(self, value: Tensor, k: int) -> Tensor:
        trained = value.requires_grad and torch.is_grad_enabled()
        # Cut again if the tensor has been changed in place since.
        known = self._cuts.get((id(value), trained))
        if known is None or known[1] != value._version:
            pieces = Cut.apply(value, self._g) if trained else tuple(cut(value, self._g))
            known = self._cuts[id(value), trained] = (value, value._version, pieces)
            if trained:
                self.ends[pieces[0].grad_fn] = self._tensors.named(value)
        return known[2][k]

    def own(self, value: Any, k: int) -> Any:
        """An argument as micro-batch k has it: its part, its own parameters and scratch memory."""
        if isinstance(value, Tensor):
            place = self._tensors.place(value)
            if place is not None:
                return self._alias(value, place, k)
            kind = self._tensors.kind(value)
            if kind == PARTED:
                return self._piece(value, k)
            if kind == NUMBERS:
                number = self._piece(value, k).view(())
                self.ends[number.grad_fn] = self._tensors.named(value)
                return number
            own = self._statistics.scratch_piece(value, self.scratch)
            return value if own is None else own[k].data
        if isinstance(value, (list, tuple, dict)):
            return mapped(value, lambda v: self.own(v, k))
        return value

    def _alias(self, value: Tensor, place: int, k: int) -> Tensor:
        if not torch.is_grad_enabled():
            return value
        self._leaves.expect(place)
        if k == 0:
            self.note_low_use(place, alone=True)
        alias: Tensor = Alias.apply(value, self._leaves, place, k)
        self.ends[alias.grad_fn] = ("parameter", place)
        return alias

    def joined(self, found: Sequence[Any], what: Any) -> Any:
        """One value of those of all micro-batches."""
        first = found[0]
        if isinstance(first, Tensor):
            if any(not isinstance(f, Tensor) or f.shape != first.shape for f in found):
                raise RefusedError(f"{name_of(what)} gives micro-batches different shapes", once=True)
            if first.dim() == 0:
                return self._tensors.mark(Join.apply(*(f.view(1) for f in found)), NUMBERS)
            return self._tensors.mark(Join.apply(*found), PARTED)
        if isinstance(first, tuple) and hasattr(first, "_fields"):
            return type(first)(*(self.joined(column, what) for column in zip(*found)))
        if isinstance(first, (list, tuple)):
            if any(len(f) != len(first) for f in found):
                raise RefusedError(f"{name_of(what)} gives micro-batches different shapes", once=True)
            return type(first)(self.joined(column, what) for column in zip(*found))
        if isinstance(first, Mapping):
            whole = {name: self.joined([f[name] for f in found], what) for name in first}
            return whole if type(first) is dict else filled(first, whole)
        if any(f != first for f in found[1:]):
            raise RefusedError(f"{name_of(what)} differs among micro-batches", once=True)
        return first

    def note_low_use(self, place: int, alone: bool) -> None:
        """Under autocast, notes one more use of a parameter: by a layer with a rule, or for one micro-batch at a time.

        Autocast casts a parameter once a forward, and the gradients of all uses are added in the type of the cast. Here
        each use for one micro-batch at a time has a cast of its own. So several uses refuse if one of them is such.
        """
        if place >= 0 and torch.is_autocast_enabled(self._leaves.device_type):
            before = self._low_uses.get(place)
            self._low_uses[place] = alone = alone or bool(before) or not torch.is_autocast_cache_enabled()
            if before is not None and alone:
                self._leaves.shared.add(place)

    def scratch_of(self, buffer: Tensor | None) -> Tensor | None:
        """(g, features): where a layer's statistics go, for one of its buffers; None for anything else."""
        return None if buffer is None else self._statistics.scratch_piece(buffer, self.scratch)
