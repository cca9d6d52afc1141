"""A trial: a pack is compared, call by call, with its micro-batches computed alone."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .findings import Findings
from .functions import HAS_STATISTICS
from .layers import Cut, Join, Layer, name_of
from .nested import flat, tensors_of
from .shares import Alias, Shares
from .tensors import NUMBERS, PARTED, Tensors
from .trace import Call, Trace, memories, name_in, same_alone, scaled_numbers
from .verdicts import RefusedError

# Functions of packs with a backward of their own.
OWN_FUNCTIONS = (Layer, Alias, Cut, Join)


class Trial:
    """Of one pack.

    Attributes:
        position: how many calls of the pack have been compared.

    Args:
        traces: the calls of each micro-batch alone, or None for one whose calls say nothing.
        g: micro-batches in the pack.
        tensors: what each tensor is.
        shares: what each micro-batch has of it.
        findings: tensors from outside are added to it.
        device_type: "cpu" or "cuda".
    """

    def __init__(
        self,
        traces: Sequence[Trace | None],
        g: int,
        tensors: Tensors,
        shares: Shares,
        findings: Findings,
        device_type: str,
    ) -> None:
        self._traces, self._g, self._tensors, self._shares, self._findings = traces, g, tensors, shares, findings
        self._device_type = device_type
        self._trace = next(trace for trace in traces if trace is not None)
        self.position = 0
        # Of a micro-batch that is computed alone: its calls, and which of them comes next.
        self._alone: Sequence[Call] | None = None
        self._next = 0
        self._copied, self._changed = "", False  # what is a copy here only; whether tensors are changed
        # How many calls use each tensor, and which tensors a call for one micro-batch at a time uses several times.
        self._uses, self._several = Counter[Any](), dict[Any, str]()

    def end_of_forward(self) -> None:
        """Checks, after the task's forward, that it made as many calls as for a micro-batch alone."""
        if self.position != self._trace.forward_calls:
            raise RefusedError("forward() calls fewer functions than with a micro-batch alone")

    def begin_alone(self, k: int, place: int | None) -> None:
        """Micro-batch k is computed alone from now on: its loss, or the module that is the call at `place`."""
        trace = self._traces[k]
        self._next, self._alone = 0, None
        if trace is not None:
            self._alone = trace.calls[trace.forward_calls :] if place is None else trace.calls[place].inner

    def compared(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, frozenset[int]]:
        """The same call of a micro-batch alone, and the places of numbers that stand for all samples."""
        if self.position >= len(self._trace.calls):
            raise RefusedError(f"{name_of(func)} is not called for a micro-batch alone")
        own, given = self._trace.calls[self.position], flat((args, kwargs), [])
        self.position += 1
        scaled = scaled_numbers(func, given, own, self._g, lambda t: self._tensors.kind(t) in (PARTED, NUMBERS))
        for tensor, one in zip(given, own.given):
            if not isinstance(tensor, Tensor) or self._tensors.kind(tensor) or self._tensors.place(tensor) is not None:
                continue
            if not self._tensors.is_constant(tensor) and tensor is not one.outside:
                raise RefusedError(f"{name_of(func)} gets a tensor that packs have not seen being made")
            if self._shares.scratch_of(tensor) is not None and func not in HAS_STATISTICS:
                raise RefusedError(f"{name_of(func)} of BatchNorm's statistics")
            self._findings.outside[id(tensor)] = weakref.ref(tensor)
        return own, scaled

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Any) -> None:
        """Compares a call with the next one of this micro-batch alone. parts: its own arguments."""
        if self._alone is None:
            return
        if self._next >= len(self._alone):
            raise RefusedError(f"{name_in(func)} is not called for a micro-batch alone")
        own = self._alone[self._next]
        self._next += 1
        same_alone(func, flat(parts, []), own)
        for tensor, one in zip(flat((args, kwargs), []), own.given):
            if not isinstance(tensor, Tensor) or self._tensors.kind(tensor) or self._tensors.place(tensor) is not None:
                continue
            here = self._tensors.made_here(tensor) or self._tensors.is_constant(tensor) or tensor is one.outside
            if not here and self._shares.scratch_of(tensor) is None:
                raise RefusedError(f"{name_in(func)} gets what another micro-batch has left behind")
        here = all(self._tensors.made_here(t) for t in tensors_of((args, kwargs)))
        if own.changes and func not in HAS_STATISTICS and not here:
            raise RefusedError(f"{name_in(func)} changes a tensor in place for one micro-batch at a time")

    def compare_memory(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], own: Call, found: Any, changed: bool
    ) -> None:
        """Whether a call changes, and shares, the memory of its arguments as for a micro-batch alone."""
        if func in HAS_STATISTICS:
            return  # it changes these, and they are compared
        if changed != own.changes:
            raise RefusedError(f"{name_in(func)} changes a tensor in place for a micro-batch alone, and not here")
        self._changed |= changed
        if own.aliases != (not memories(found).isdisjoint(memories((args, kwargs)))):
            self._copied = name_in(func)

    def note_copy(self, name: str) -> None:
        """What `name` returns shares memory with its arguments for a micro-batch alone, and not here."""
        self._copied = name

    def note_uses(self, given: Any) -> None:
        """Notes one use of each tensor among the arguments of a call."""
        for tensor in tensors_of(given):
            # A function with a backward of its own is called for one micro-batch at a time, and what it gives is
            # joined. So its node is met here only if `custom_functions` has not seen the call.
            made_by = getattr(type(tensor.grad_fn), "_forward_cls", None)
            if made_by is not None and made_by not in OWN_FUNCTIONS:
                name = f"{made_by.__name__}.apply"
                raise RefusedError(
                    f"{name} is called by a name that was bound before the run, so that its backward would get the "
                    f"gradients of all samples. Write {name} where it is called"
                )
        self._uses.update({self._tensors.named(t) for t in tensors_of(given) if t.requires_grad})

    def note_several(self, func: Any, found: Any) -> None:
        """Notes what the first micro-batch's graph of a call uses several times. found: its results."""
        ends, seen, edges = dict(self._shares.ends), set[Any](), Counter[Any]()
        nodes = [t.grad_fn for t in tensors_of(found) if t.grad_fn is not None]
        while nodes:
            node = nodes.pop()
            if node in seen or node in ends:
                continue
            seen.add(node)
            for behind, _ in node.next_functions:
                if behind in ends:
                    edges[behind] += 1
                elif behind is not None:
                    nodes.append(behind)
        for node, count in edges.items():
            if count > 1:
                named = ends[node]
                if isinstance(named, tuple) and named[1] >= 0 and torch.is_autocast_enabled(self._device_type):
                    # Alone, autocast casts it once, and the gradients of all uses are added in that type.
                    raise RefusedError(f"{name_in(func)} uses a parameter several times under autocast")
                self._several.setdefault(named, name_in(func))

    def check_order(self) -> None:
        """Checks, after the losses, that memory is shared and gradients are added as for a micro-batch alone.

        A call that is made for one micro-batch at a time adds the gradients of its own uses of a tensor first. If the
        tensor has other uses, too, that is another order. It shows only if these gradients are not 0, so a comparison
        of bits may miss it.
        """
        if self._copied and self._changed:
            raise RefusedError(f"tensors are changed in place, and {self._copied} gives a copy or a view, unlike alone")
        for named, name in self._several.items():
            if self._uses[named] > 1:
                raise RefusedError(f"{name} uses a tensor several times that others use as well")
