"""A pack: several micro-batches in one forward and one backward, each with the bits of being computed alone.

A micro-batch belongs to the model: its gradient is a leaf of the tree, its statistics are BatchNorm's, its key seeds
dropout. How many of them one forward carries belongs to the machine, and must not change a bit. `Pack` is active
during the forward and the losses. It sees every function of torch that is called, and takes part where a micro-batch
has something of its own:

- a trained parameter: layers with a rule (`rules`) leave one gradient a micro-batch; any other function is
  called for one micro-batch at a time, with an alias of the parameter for each;
- random numbers: drawn for one micro-batch at a time, each from its own stream, as when it is computed alone;
- BatchNorm's statistics;
- a value that the host reads (`if mask.all():`): it has to be the same for all micro-batches of the pack.

What cannot be taken apart raises `RefusedError`. `packs` then tries another way, and computes single micro-batches in
the end. It also compares: no pack is used before its bits were those of single micro-batches.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..batch_norm import RunningStatistics
from .functions import DRAWN, FUNCTIONS, HAS_STATISTICS
from .independent import ARITHMETIC, MOVES, is_in_place, is_independent, plain_name, takes_sizes
from .layers import Cut, Join, Layer, Rule, Site, name_of, piece
from .leaves import Leaves
from .streams import Streams
from .trace import (
    LOOKS,
    Call,
    Trace,
    custom_functions,
    flat,
    forwards_replaced,
    memories,
    name_in,
    same_alone,
    scaled_numbers,
    tensors_of,
    versions,
)
from .values import (
    ENOUGH_VALUES,
    EVEN,
    LOW_PRECISION,
    MOST_DRAWS,
    ODD,
    cancelling_like,
    drawn_gradient,
    drawn_like,
    same_bits,
    start_of,
)
from .verdicts import RefusedError, out_of_memory

Key = tuple[Any, ...]
ALONE = -1
# Kinds of tensors: with a part for each micro-batch, one after the other along the first dimension; with one number for
# each; and those that are the same for all of them. Tensors that were there before have no kind.
_PARTED, _NUMBERS, _SAME = 1, 2, 4
# Functions that give a gradient a hook.
HOOKS = frozenset((Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad))


class Way(NamedTuple):
    """What trials have found out about a call.

    Attributes:
        together: whether the function is called once for all micro-batches.
        scaled: places of numbers that are those of all samples.
        numbers: these numbers.
    """

    together: bool
    scaled: frozenset[int]
    numbers: tuple[Any, ...]


class Alias(torch.autograd.Function):
    """A parameter as one micro-batch sees it."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, pack: Pack, index: int, k: int) -> Tensor:
        """The parameter itself."""
        ctx.pack, ctx.index, ctx.k = pack, index, k
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        """The pack takes the gradient."""
        ctx.pack.leaves.put_one(ctx.index, ctx.k, grad)
        return None, None, None, None


class Pack(TorchFunctionMode):
    """Active during the forward and the losses of a pack.

    Attributes:
        g: micro-batches in it.
        leaves: takes the gradients.
        checks: whether this is a trial: it compares each layer with the layer applied to one micro-batch at a time.
        form: names the functions that were called so far: which, of what shapes, in which order. Numbers in
            arithmetic do not count: a task may let them follow its progress.

    Args:
        parameters: id of a trained parameter -> its place.
        constants: ids of the model's other tensors.
        statistics: of normalisation layers.
        arrays: the samples.
        rows: how many they are.
        g: micro-batches; rows / g samples each.
        leaves: takes the gradients.
        streams: random numbers.
        sites: what trials have found out: the key of a layer -> which of its rules is taken; the key of a layer or
            function that is computed one micro-batch at a time -> ALONE. A trial adds to them.
        checked: keys of layers and functions that trials have compared. A trial adds to them.
        calls: what trials have found out about each call, named by the `form` that it makes. A trial adds to it.
        outside: the tensors that calls have been given in trials and that nobody saw being made, by their ids. A trial
            adds to it.
        traces: in a trial, the calls of each micro-batch alone, or None for one whose calls say nothing; else empty.
    """

    def __init__(
        self,
        parameters: Mapping[int, int],
        constants: frozenset[int],
        statistics: RunningStatistics,
        *,
        arrays: Mapping[str, Tensor],
        rows: int,
        g: int,
        leaves: Leaves,
        streams: Streams,
        sites: dict[Key, int],
        checked: set[Key],
        calls: dict[int, Way],
        outside: dict[int, weakref.ref[Tensor]],
        traces: Sequence[Trace | None],
    ) -> None:
        super().__init__()
        self._parameters, self._constants, self._statistics = parameters, constants, statistics
        self._rows, self.g, self.leaves, self._streams = rows, g, leaves, streams
        self._sites, self._checked, self._calls, self.form = sites, checked, calls, 0
        self._outside, self._traces = outside, traces
        self._trace = next((trace for trace in traces if trace is not None), None)
        self.checks, self._position = self._trace is not None, 0
        # In a trial, of a micro-batch that is computed alone: its calls alone, and which of them comes next. Tensors
        # that are made meanwhile have a mark: they are of no use to another micro-batch.
        self._alone: Sequence[Call] | None = None
        self._next, self._scope = 0, object()
        self._copied, self._changed = "", False  # in a trial: what is a copy here only; whether tensors are changed
        self.scratch = statistics.scratch_rows(g)
        self._derived: dict[int, int] = {}  # id of a tensor that follows from parameters alone -> its place
        self.derived: list[tuple[Tensor, Tensor]] = []  # with its graph; without
        self._now: int | None = None  # the micro-batch that is computed alone
        # Those of the present call: each use of a tensor gives it a gradient of its own, as in a micro-batch alone.
        self._cuts: dict[int, tuple[Tensor, int, tuple[Tensor, ...]]] = {}
        # Names of tensors that were made or given, and in a trial: how many calls use each, and which of them a call
        # that is made for one micro-batch at a time uses several times.
        self._made, self._uses, self._several = 0, Counter[Any](), dict[Any, str]()
        self._low_uses: dict[int, bool] = {}  # with autocast: whether a parameter is used for one at a time
        self._ends: dict[Any, Any] = {}  # of the first micro-batch's graph in a call: its node -> what lies behind it
        # Marks on tensors. Nobody else has these objects, so that a tensor of an earlier pack is none of this one.
        self._marks = {kind: (kind,) for kind in (_PARTED, _NUMBERS, _SAME)}
        for array in arrays.values():
            self._mark(array, _PARTED)

    @contextlib.contextmanager
    def active(self, apart: Sequence[nn.Module]) -> Iterator[None]:
        """Sees what is called meanwhile. `apart` are modules that are called for one micro-batch at a time."""
        with self, self._modules_apart(apart), custom_functions(self._seen, (Layer, Alias, Cut, Join)):
            yield

    def close(self) -> None:
        """Lets go of all tensors. The graph refers to the pack, so that they would be freed late otherwise."""
        self._begin_call()
        self.derived.clear()

    def end_of_forward(self) -> None:
        """The task's forward has returned: in a trial it has to have called as much as that of a micro-batch."""
        if self._trace is not None and self._position != self._trace.forward_calls:
            raise RefusedError("forward() calls fewer functions than with a micro-batch alone")

    # ---- what a tensor is ----------------------------------------------------------------------------------------

    def _mark(self, tensor: Tensor, kind: int) -> Tensor:
        self._made += 1
        tensor._made = self._made  # type: ignore[attr-defined]
        return self._as_part(tensor, kind)

    def _as_part(self, tensor: Tensor, kind: int = _PARTED) -> Tensor:
        tensor._kind = self._marks[kind]  # type: ignore[attr-defined]
        return tensor

    def _kind(self, tensor: Tensor) -> int:
        """What a tensor is: one of the kinds above; 0 for one that was made outside of the pack."""
        mark = getattr(tensor, "_kind", None)
        return mark[0] if mark is not None and self._marks[mark[0]] is mark else 0

    def has_part(self, value: Any) -> bool:
        """Whether a value is a tensor of which each micro-batch has its own part, one after the other."""
        return isinstance(value, Tensor) and self._kind(value) == _PARTED

    def place(self, tensor: Any) -> int | None:
        """The place of a trained parameter, or of what follows from parameters alone; None for any other."""
        found = self._parameters.get(id(tensor))
        return self._derived.get(id(tensor)) if found is None else found

    def _named(self, tensor: Tensor) -> Any:
        """What names a tensor in this pack: its place if it is a parameter, or when it was made."""
        place = self.place(tensor)
        return ("parameter", place) if place is not None else getattr(tensor, "_made", None)

    def _note_uses(self, given: Any) -> None:
        """Notes one use of each tensor among the arguments of a call."""
        self._uses.update({self._named(t) for t in tensors_of(given) if t.requires_grad})

    def check_order(self) -> None:
        """In a trial, after the losses: whether memory is shared, and gradients are added, as in a micro-batch alone.

        A call that is made for one micro-batch at a time adds those of its own uses of a tensor first. Where the tensor
        has others, too, that is another order, which shows only if they are not 0.
        """
        if self._copied and self._changed:
            raise RefusedError(f"tensors are changed in place, and {self._copied} gives a copy or a view, unlike alone")
        for named, name in self._several.items():
            if self._uses[named] > 1:
                raise RefusedError(f"{name} uses a tensor several times that others use as well")

    def _note_several(self, func: Any, found: Any) -> None:
        """In a trial: notes what the first micro-batch's graph of a call uses several times. found: its results."""
        ends, seen, edges = dict(self._ends), set[Any](), Counter[Any]()
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
                self._several.setdefault(ends[node], name_in(func))

    # ---- what is called ------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch instead of each of its functions."""
        if func in LOOKS:
            return func(*args, **(kwargs or {}))
        return self._seen(func, args, kwargs or {})

    def _seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function returns: by a rule, one micro-batch at a time, or for the pack."""
        if func in HOOKS:
            raise RefusedError("a gradient has a hook, which would get that of all samples, or of a copy")
        if self._now is not None:
            return self._seen_alone(func, args, kwargs, self._now)
        given, used, scaled = self._note(func, args, kwargs)
        own, before = None, []
        if scaled is None:
            own, scaled = self._compared(func, args, kwargs)
            numbers = tuple(flat((args, kwargs), [])[place] for place in sorted(scaled))
            known = self._calls.get(self.form)
            if known is not None and (known.scaled, known.numbers) != (scaled, numbers):
                raise RefusedError(f"{name_in(func)} gets a number that is that of all samples at times")
            self._calls[self.form] = Way(True, scaled, numbers)
            before = versions((args, kwargs))
        found = self._called(func, args, kwargs, given, used, scaled, own)
        if own is not None:
            if any(t.requires_grad for t in tensors_of(found)):
                self._note_uses((args, kwargs))
            self._compare_memory(func, args, kwargs, own, found, versions((args, kwargs)) != before)
        kind = _PARTED if given & (_PARTED | _NUMBERS) or scaled else _SAME
        for tensor in tensors_of(found):
            if not self._kind(tensor) and id(tensor) not in self._constants and self.place(tensor) is None:
                self._mark(tensor, kind)
        return found

    def _seen_alone(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], k: int) -> Any:
        """What a function returns to micro-batch k, which is computed alone."""
        if k == 0:  # the others do the same, each with its own values
            known: list[Any] = [func]
            self._look_at((args, kwargs), known, plain_name(func) not in ARITHMETIC, set())
            self.form = hash((self.form, *known))
        own = self._own(args, k), self._own(kwargs, k)
        if self._alone is not None:
            call = self._follow(func, args, kwargs, own)
            if (
                call.changes
                and func not in HAS_STATISTICS
                and not all(self._made_here(t) for t in tensors_of((args, kwargs)))
            ):
                raise RefusedError(f"{name_in(func)} changes a tensor in place for one micro-batch at a time")
        found = func(*own[0], **own[1])
        if self.checks or k == 0:
            for tensor in tensors_of(found):
                if not self._kind(tensor) and id(tensor) not in self._constants and self.place(tensor) is None:
                    self._mark_here(tensor)
        return found

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parts: Any) -> Call:
        """In a trial: the next call of this micro-batch alone, if this is the same one. parts: its own arguments."""
        assert self._alone is not None
        if self._next >= len(self._alone):
            raise RefusedError(f"{name_in(func)} is not called for a micro-batch alone")
        own = self._alone[self._next]
        self._next += 1
        same_alone(func, flat(parts, []), own)
        for tensor, one in zip(flat((args, kwargs), []), own.given):
            if not isinstance(tensor, Tensor) or self._kind(tensor) or self.place(tensor) is not None:
                continue
            here = self._made_here(tensor) or id(tensor) in self._constants or tensor is one.outside
            if not here and self._statistics.scratch_piece(tensor, self.scratch) is None:
                raise RefusedError(f"{name_in(func)} gets what another micro-batch has left behind")
        return own

    def _mark_here(self, tensor: Tensor) -> None:
        tensor._scope = self._scope  # type: ignore[attr-defined]

    def _made_here(self, tensor: Tensor) -> bool:
        return getattr(tensor, "_scope", None) is self._scope

    def _compare_memory(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], own: Call, found: Any, changed: bool
    ) -> None:
        """In a trial: whether a call changes, and shares, the memory of its arguments as for a micro-batch alone."""
        if func in HAS_STATISTICS:
            return  # it changes these, and they are compared
        if changed != own.changes:
            raise RefusedError(f"{name_in(func)} changes a tensor in place for a micro-batch alone, and not here")
        self._changed |= changed
        if own.aliases != (not memories(found).isdisjoint(memories((args, kwargs)))):
            self._copied = name_in(func)

    def _called(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: int,
        used: set[int],
        scaled: frozenset[int],
        own: Call | None,
    ) -> Any:
        parted = bool(given & (_PARTED | _NUMBERS))
        rule = FUNCTIONS.get(func)
        if rule is not None and not scaled and (parted or used):
            found = rule(self, func, args, kwargs)
            if found is not NotImplemented:
                return found
        if not parted and not scaled:
            return self._derived_from(func, args, kwargs, used) if used else func(*args, **kwargs)
        random = func in DRAWN
        if random and kwargs.get("generator") is not None:
            raise RefusedError(f"{name_of(func)} with a generator of its own")
        if own is None:  # as a trial has found
            together = self._calls[self.form].together
        else:
            together = not used and not given & _NUMBERS and self._may_be_together(func, args, kwargs, scaled)
        if not together and is_in_place(func, kwargs):
            raise RefusedError(f"{name_of(func)}, which cannot be called one micro-batch at a time, in place")
        found = func(*args, **kwargs) if together else self.apart(func, args, kwargs, random, scaled)
        if own is not None:
            if together and [t.shape for t in tensors_of(found)] != [
                (self.g * s[0], *s[1:]) if s else s for s in own.shapes
            ]:
                if is_in_place(func, kwargs):
                    raise RefusedError(f"{name_of(func)} gives a micro-batch another shape")
                together, found = False, self.apart(func, args, kwargs, random, scaled)
            self._calls[self.form] = self._calls[self.form]._replace(together=together)
        return found

    def _note(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, set[int], frozenset[int] | None]:
        """Adds a call to `form`.

        Returns:
            Which kinds of tensors are among the arguments; the places of the parameters among them; the places of
            numbers that are those of all samples, None if a trial has to find them.
        """
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            raise RefusedError("what is saved for the backward goes through hooks, which would get that of all samples")
        known: list[Any] = [func, torch.is_grad_enabled()]
        numbers, used = plain_name(func) not in ARITHMETIC, set[int]()
        given = self._look_at(args, known, numbers, used)
        if kwargs:
            given |= self._look_at(kwargs, known, numbers, used)
        self.form = hash((self.form, *known))
        if self._trace is not None:
            return given, used, None
        call = self._calls.get(self.form)
        if call is None:
            raise RefusedError("it calls other functions than in its trials", untried=True)
        if call.scaled and tuple(flat((args, kwargs), [])[place] for place in sorted(call.scaled)) != call.numbers:
            raise RefusedError("it has other numbers than in its trials", untried=True)
        return given, used, call.scaled

    def _look_at(self, values: Any, known: list[Any], numbers: bool, used: set[int]) -> int:
        """One pass through arguments, since it is made for every function: notes their form, and what there is."""
        found = 0
        if isinstance(values, Mapping):
            known += values
            values = values.values()
        for value in values:
            if isinstance(value, Tensor):
                kind, place = self._kind(value), self.place(value)
                made = value._made if kind else None  # type: ignore[attr-defined]
                known += (value.shape, value.stride(), value.dtype, value.requires_grad, place, kind, made)
                if value.is_complex():
                    raise RefusedError("complex numbers")
                if kind != _SAME:
                    found |= kind
                if not kind and place is None and self._trace is None and not self._was_there(value):
                    raise RefusedError("it gets a tensor that packs have not seen being made", untried=True)
                if place is not None:
                    used.add(place)
            elif value is None or isinstance(value, (str, bool, torch.dtype)):
                known.append(value)
            elif isinstance(value, (list, tuple, Mapping)):
                known.append(len(value))
                found |= self._look_at(value, known, numbers, used)
            elif isinstance(value, slice):
                known += (_name_of(value.start), _name_of(value.stop), _name_of(value.step))
            elif isinstance(value, np.generic):
                known.append(value.item() if numbers else type(value))
            elif isinstance(value, (int, float)):
                known.append(_name_of(value) if numbers else (type(value), value == self._rows))
            else:
                known.append(type(value))
        return found

    def _was_there(self, tensor: Tensor) -> bool:
        """Whether a tensor that nobody saw being made was given to calls in trials, too."""
        there = self._outside.get(id(tensor))
        return id(tensor) in self._constants or self._made_here(tensor) or (there is not None and there() is tensor)

    def _compared(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, frozenset[int]]:
        """In a trial: this call of a micro-batch alone, and the places of numbers that are those of all samples."""
        assert self._trace is not None
        if self._position >= len(self._trace.calls):
            raise RefusedError(f"{name_of(func)} is not called for a micro-batch alone")
        own, given = self._trace.calls[self._position], flat((args, kwargs), [])
        self._position += 1
        scaled = scaled_numbers(func, given, own, self.g, lambda t: self._kind(t) in (_PARTED, _NUMBERS))
        for tensor, one in zip(given, own.given):
            if not isinstance(tensor, Tensor) or self._kind(tensor) or self.place(tensor) is not None:
                continue
            if id(tensor) not in self._constants and tensor is not one.outside:
                raise RefusedError(f"{name_of(func)} gets a tensor that packs have not seen being made")
            if self._statistics.scratch_piece(tensor, self.scratch) is not None and func not in HAS_STATISTICS:
                raise RefusedError(f"{name_of(func)} of BatchNorm's statistics")
            self._outside[id(tensor)] = weakref.ref(tensor)
        return own, scaled

    def _may_be_together(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scaled: frozenset[int]
    ) -> bool:
        """In a trial: whether a function is called once for all micro-batches."""
        if scaled and not takes_sizes(func):
            return False
        if not is_independent(func, args, kwargs, self.has_part):
            return False
        key = self._function_key(func, args, kwargs)
        return key is None or not self._is_alone(key, func, args, kwargs)

    def _function_key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
        """Names a function of samples by its shapes; None for one that only looks at tensors or moves values."""
        name = name_of(func)
        if plain_name(func) in MOVES:
            return None
        tensors = list(tensors_of((args, kwargs)))
        if not any(t.is_floating_point() and self.has_part(t) for t in tensors):
            return None
        cast = torch.is_autocast_enabled(self.leaves.device_type)
        shapes = ((tuple(t.shape), t.stride()) for t in tensors)
        counts = plain_name(func) not in ARITHMETIC
        numbers = (*filter(_plain, args), *filter(_plain, kwargs.values())) if counts else ()
        return (name, self.g, *shapes, str(tensors[0].dtype), cast, numbers)

    def _is_alone(self, key: Key, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """In a trial: whether a function gives other bits for a pack, as has been found out now or before."""
        if key not in self._checked:
            self._checked.add(key)
            with self._aside():
                if self._differs(func, args, kwargs):
                    self._sites[key] = ALONE
        return key in self._sites

    def _differs(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function gives other bits for a pack than one micro-batch at a time, of random values."""
        wide = self._widened((args, kwargs))
        if wide is not None:  # as in `Site.differs`
            with torch.autocast(self.leaves.device_type, enabled=False):
                if self._differs(func, *wide):
                    return True
        compared = 0
        # The gradient's last dimension is the one that a matrix product adds over in the first argument's gradient.
        cancelling = [(sign, rest, last) for sign in (EVEN, ODD) for rest, last in ((-sign, sign), (-sign, -sign))]
        for signs in [*cancelling, *[None] * MOST_DRAWS]:
            inputs: list[Tensor] = []
            own = self._drawn((args, kwargs), inputs, None if signs is None else [signs[0]])
            try:
                with torch.enable_grad():
                    together = func(*cloned(own[0]), **cloned(own[1]))
                    if not isinstance(together, Tensor) or not together.is_floating_point():
                        return False
                    pieces = [
                        func(*cloned(self.part(own[0], k)), **cloned(self.part(own[1], k))) for k in range(self.g)
                    ]
                    if any(p.shape[1:] != together.shape[1:] or p.dim() == 0 for p in pieces):
                        return True
                    joined = Join.apply(*pieces)
                    if joined.shape != together.shape:
                        return False
                    if not same_bits(together, joined):
                        return True
                    if together.requires_grad:
                        grad = drawn_gradient(together)
                        if signs is not None:
                            dims = [signs[1]] * (together.dim() - 1) + [signs[2]]
                            grad = cancelling_like(together.detach(), dims, self.g)
                        one = torch.autograd.grad(together, inputs, grad, allow_unused=True)
                        other = torch.autograd.grad(joined, inputs, grad, allow_unused=True)
                        parted = [(a, b) for a, b, i in zip(one, other, inputs) if self.has_part(i)]
                        if not all(same_bits(a, b) for a, b in parted):
                            return True
            except RuntimeError:
                return False  # not a function of these shapes alone: the comparison of the whole tells
            compared += together.numel() if signs is None else 0
            if compared > ENOUGH_VALUES:
                break
        return False

    def _widened(self, value: Any) -> Any:
        """Arguments with float32 in place of lower precision; None if none is used: by type or by autocast."""
        low: list[Tensor] = []

        def widen(v: Any) -> Any:
            if not isinstance(v, Tensor):
                return mapped(v, widen)
            if v.dtype not in LOW_PRECISION or not self.has_part(v):
                return v
            low.append(v)
            return self._as_part(v.detach().float().requires_grad_(v.requires_grad))

        wide = widen(value)
        return wide if low or torch.is_autocast_enabled(self.leaves.device_type) else None

    def _drawn(self, value: Any, inputs: list[Tensor], signs: list[int] | None) -> Any:
        """Arguments with random values. signs: where they cancel, that of the first tensor, and then of the others."""
        if isinstance(value, Tensor):
            if not value.is_floating_point() or not self.has_part(value):
                return value
            if signs is None:
                drawn = self._as_part(drawn_like(value.detach()))
            else:
                drawn = self._as_part(cancelling_like(value.detach(), signs[-1], self.g))
                if len(signs) == 1:
                    signs.append(-signs[0])
            if value.requires_grad:
                inputs.append(drawn.requires_grad_())
            return drawn
        return mapped(value, lambda v: self._drawn(v, inputs, signs))

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What is drawn meanwhile is nobody's."""
        with self._streams.aside():
            yield

    def _derived_from(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]) -> Any:
        """A function of trained parameters alone."""
        graphs = self._graphs((args, kwargs))
        found = func(*graphs[0], **graphs[1])
        if not isinstance(found, Tensor):
            if isinstance(found, (list, tuple)) and any(isinstance(f, Tensor) and f.requires_grad for f in found):
                self.leaves.hold({i for i in used if i >= 0})
                return type(found)(self._derive(f) if isinstance(f, Tensor) and f.requires_grad else f for f in found)
            return found
        if not found.requires_grad:
            return found
        if self._touches_graph((args, kwargs)):
            raise RefusedError(f"{name_of(func)} with parameters", tuple(i for i in used if i >= 0))
        self.leaves.hold({i for i in used if i >= 0})
        return self._derive(found)

    def _derive(self, graph: Tensor) -> Tensor:
        """Makes what follows from parameters alone a parameter of its own, whose gradients are passed on in the end."""
        if graph.dtype != torch.float32 and graph.dtype not in LOW_PRECISION:
            raise RefusedError(f"what follows from parameters alone is {graph.dtype}")
        leaf = graph.detach().requires_grad_()
        self.derived.append((graph, leaf))
        self._derived[id(leaf)] = -len(self.derived)
        self.leaves.expect_shape(-len(self.derived), leaf)
        return leaf

    def _graphs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = self._derived.get(id(value))
            return value if place is None else self.derived[-place - 1][0]
        return mapped(value, self._graphs)

    def _touches_graph(self, value: Any) -> bool:
        """Whether a tensor that follows from samples and parameters is among the arguments."""
        if isinstance(value, Tensor):
            return value.requires_grad and self.place(value) is None
        return any(self._touches_graph(v) for v in parts(value))

    # ---- one micro-batch at a time -------------------------------------------------------------------------------

    def part(self, value: Any, k: int, scaled: frozenset[int] = frozenset()) -> Any:
        """What micro-batch k sees of a function's arguments; one that is given twice is one tensor here, too.

        Args:
            value: the arguments.
            k: the micro-batch.
            scaled: places of numbers that are those of all samples, as from `trace.scaled_numbers`.
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
                return value // self.g
            if isinstance(value, Mapping):
                for _ in value:
                    next(numbers[1])
        if isinstance(value, Tensor):
            if id(value) not in same:
                same[id(value)] = self._own(value, k)
            return same[id(value)]
        if isinstance(value, slice) and numbers is not None:
            return slice(*(self._parts(v, k, same, numbers) for v in (value.start, value.stop, value.step)))
        return mapped(value, lambda v: self._parts(v, k, same, numbers))

    def _piece(self, value: Tensor, k: int) -> Tensor:
        if not (value.requires_grad and torch.is_grad_enabled()):
            return piece(value, k, self.g)
        known = self._cuts.get(id(value))
        if known is None or known[1] != value._version:
            known = self._cuts[id(value)] = (value, value._version, Cut.apply(value, self.g))
            self._ends[known[2][0].grad_fn] = self._named(value)
        return known[2][k]

    def _own(self, value: Any, k: int) -> Any:
        """An argument as micro-batch k has it: its part, its own parameters and scratch memory."""
        if isinstance(value, Tensor):
            place = self.place(value)
            if place is not None:
                return self._alias(value, place, k)
            kind = self._kind(value)
            if kind == _PARTED:
                return self._piece(value, k)
            if kind == _NUMBERS:
                number = self._piece(value, k).view(())
                self._ends[number.grad_fn] = self._named(value)
                return number
            own = self._statistics.scratch_piece(value, self.scratch)
            return value if own is None else own[k].data
        if isinstance(value, (list, tuple, dict)):
            return mapped(value, lambda v: self._own(v, k))
        return value

    def _alias(self, value: Tensor, place: int, k: int) -> Tensor:
        if not torch.is_grad_enabled():
            return value
        self.leaves.expect(place)
        if k == 0:
            self._note_low_use(place, alone=True)
        alias: Tensor = Alias.apply(value, self, place, k)
        self._ends[alias.grad_fn] = ("parameter", place)
        return alias

    def apart(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        random: bool = False,
        scaled: frozenset[int] = frozenset(),
    ) -> Any:
        """Calls a function for one micro-batch at a time, and joins what it returns."""
        found = []
        self._begin_call()
        for k in range(self.g):
            own = self.part((args, kwargs), k, scaled)
            with self._streams.of(k) if random else contextlib.nullcontext():
                found.append(func(*own[0], **own[1]))
            if k == 0 and self.checks:
                self._note_several(func, found[0])
        return self.joined(found, func)

    def _begin_call(self) -> None:
        self._cuts.clear()
        self._ends.clear()

    def joined(self, found: Sequence[Any], what: Any) -> Any:
        """One value of those of all micro-batches."""
        first = found[0]
        if isinstance(first, Tensor):
            if any(not isinstance(f, Tensor) or f.shape != first.shape for f in found):
                raise RefusedError(f"{name_of(what)} gives micro-batches different shapes", once=True)
            if first.dim() == 0:
                return self._mark(Join.apply(*(f.view(1) for f in found)), _NUMBERS)
            return self._mark(Join.apply(*found), _PARTED)
        if isinstance(first, tuple) and hasattr(first, "_fields"):
            return type(first)(*(self.joined(column, what) for column in zip(*found)))
        if isinstance(first, (list, tuple)):
            if any(len(f) != len(first) for f in found):
                raise RefusedError(f"{name_of(what)} gives micro-batches different shapes", once=True)
            return type(first)(self.joined(column, what) for column in zip(*found))
        if isinstance(first, Mapping):
            whole = {name: self.joined([f[name] for f in found], what) for name in first}
            return whole if type(first) is dict else _filled(first, whole)
        if any(f != first for f in found[1:]):
            raise RefusedError(f"{name_of(what)} differs among micro-batches", once=True)
        return first

    @contextlib.contextmanager
    def now(self, k: int, random: bool = True, inner: Sequence[Call] | None = None) -> Iterator[None]:
        """What is called meanwhile is called for micro-batch k alone.

        Args:
            k: the micro-batch.
            random: whether random numbers may be drawn.
            inner: in a trial, what it calls alone; None for the calls of its loss.
        """
        assert self._now is None
        calls: Sequence[Call] | None
        if self.checks and inner is None:
            own = self._traces[k]
            calls = None if own is None else own.calls[own.forward_calls :]
        else:
            calls = inner
        self._now, self._alone, self._next = k, calls, 0
        try:
            with self._streams.of(k) if random else contextlib.nullcontext():
                yield
        finally:
            self._now = self._alone = None
            self._scope = object()

    @contextlib.contextmanager
    def _modules_apart(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        with forwards_replaced(modules, self._apart_forward):
            yield

    def _apart_forward(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._now is not None:
                return forward(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                given, _, scaled = self._note(type(module), args, kwargs)
                own = None
                if scaled is None:
                    own, scaled = self._compared(type(module), args, kwargs)
                    if own.changes:
                        raise RefusedError(f"{type(module).__name__} changes its input in place")
                    self._calls[self.form] = Way(False, scaled, ())
                place = self._position - 1
            if not given & (_PARTED | _NUMBERS):
                raise RefusedError(f"{type(module).__name__} of something that no micro-batch has a part of")
            found = []
            self._note_uses((args, kwargs))
            self._begin_call()
            for k in range(self.g):
                with torch._C.DisableTorchFunction():
                    part = self.part((args, kwargs), k, scaled)
                    for tensor in tensors_of(part):
                        self._mark_here(tensor)
                    inner = self._inner_calls(k, place) if own is not None else None
                with self.now(k, inner=inner):
                    found.append(forward(*part[0], **part[1]))
                if k == 0 and self.checks:
                    with torch._C.DisableTorchFunction():
                        self._note_several(type(module), found[0])
            with torch._C.DisableTorchFunction():
                if own is not None and own.aliases:
                    self._copied = type(module).__name__
                return self.joined(found, type(module).__name__)

        return call

    def _inner_calls(self, k: int, place: int) -> Sequence[Call] | None:
        """In a trial: what the module that is the call at `place` calls for micro-batch k alone."""
        trace = self._traces[k]
        return None if trace is None or place >= len(trace.calls) else trace.calls[place].inner

    def outputs_of(self, outputs: Any, k: int) -> Any:
        """Micro-batch k's part of what a task's forward returned."""
        with torch._C.DisableTorchFunction():
            tensors = [outputs] if isinstance(outputs, Tensor) else list(parts(outputs))
            if not tensors or not all(self.has_part(t) for t in tensors):
                raise RefusedError("an output that does not have one row a sample")
            if k == 0:
                self._note_uses(tensors)
            part = self.part(outputs, k)
            for tensor in tensors_of(part):
                self._mark_here(tensor)
            return part

    def samples_of(self, arrays: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """Micro-batch k's samples of those of the pack."""
        with torch._C.DisableTorchFunction():
            pieces = {name: piece(array, k, self.g) for name, array in arrays.items()}
            for tensor in pieces.values():
                self._mark_here(tensor)
            return pieces

    def stacked(self, losses: list[Tensor]) -> Tensor:
        """The losses of all micro-batches: (g,)."""
        with torch._C.DisableTorchFunction():
            return torch.stack(losses)

    def summed(self, losses: Any) -> Tensor:
        """The sum of each micro-batch's losses, (g,), of what a task's sample_losses returned: (samples,)."""
        with torch._C.DisableTorchFunction():
            if not self.has_part(losses) or losses.shape != (self._rows,):
                raise RefusedError("sample_losses() does not return one number a sample")
            return losses.view(self.g, -1).sum(1)

    # ---- random numbers, statistics, values that the host reads ---------------------------------------------------

    def generator(self, k: int, device: torch.device) -> torch.Generator:
        """The generator of micro-batch k on this device."""
        return self._streams.generator(k, device)

    def drawn(self, k: int, func: Any, *args: Any) -> Any:
        """What a function that draws random numbers returns to micro-batch k; its arguments are the same for all."""
        with self._streams.of(k):
            return func(*args)

    def scratch_of(self, running: Tensor | None) -> Tensor | None:
        """Where the micro-batches' statistics of a layer go: (g, features)."""
        return None if running is None else self._statistics.scratch_piece(running, self.scratch)

    def has_parts(self, value: Any) -> bool:
        """Whether a micro-batch has something of its own among a function's arguments."""
        return any(self._kind(t) in (_PARTED, _NUMBERS) for t in tensors_of(value))

    def read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the host reads of tensors, if it is the same for all micro-batches."""
        if not self.has_parts((args, kwargs)):
            return func(*args, **kwargs)
        values = []
        for k in range(self.g):
            own = self.part((args, kwargs), k)
            values.append(func(*own[0], **own[1]))
        if not all(isinstance(value, (bool, int, float, list)) and value == values[0] for value in values):
            once = all(isinstance(value, (bool, int)) for value in values)
            raise RefusedError(f"{name_of(func)}: what is done next depends on values", once=once)
        return values[0]

    # ---- layers --------------------------------------------------------------------------------------------------

    def layer(
        self,
        rules: Sequence[Rule],
        name: str,
        call: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        casts: bool = True,
        **options: Any,
    ) -> Any:
        """A layer by one of its rules; NotImplemented where it has to be computed one micro-batch at a time."""
        places = [None if p is None else self.place(p) for p in (weight, bias)]
        key = (name, self.g, *places, tuple(x.shape), x.stride(), start_of(x))
        chosen = self._sites.get(key, len(rules) - 1 if self.checks else ALONE)
        if chosen == ALONE or not torch.is_grad_enabled():
            return NotImplemented
        tensors = [x, weight, bias]
        if casts and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            # The casts are made here, so that the layer's backward meets what its forward used.
            tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
        sites = [Site(self, rule, call, key, *places, **options) for rule in rules]
        if self.checks and key not in self._sites:
            with torch.no_grad(), self._aside():
                chosen = self._fastest(sites, tensors)
            self._sites[key] = chosen
            if chosen == ALONE:
                return NotImplemented
        site = sites[chosen]
        for place in places:
            if place is not None:
                self.leaves.expect(place)
                self._note_low_use(place, alone=False)
        return Layer.apply(site, *tensors)

    def _note_low_use(self, place: int, alone: bool) -> None:
        """With autocast: a parameter has one use more, by a layer with a rule, or for one micro-batch at a time.

        Autocast casts a parameter once a forward, and the gradients of all uses are added in its type. Here each use
        for one micro-batch at a time has a cast of its own.
        """
        if torch.is_autocast_enabled(self.leaves.device_type):
            before = self._low_uses.get(place)
            self._low_uses[place] = alone or bool(before)
            if before is not None and (alone or before):
                self.leaves.shared.add(place)

    def set_alone(self, site: Site) -> NoReturn:
        """A layer's rule is none for the gradient that came: from now on it is computed one micro-batch at a time."""
        if self.checks:
            self._sites[site.key] = ALONE
        name = site.key[0]
        raise RefusedError(f"{name} gets a gradient that lies in memory in another way", untried=not self.checks)

    def holds(self, site: Site, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether a rule is exact for a gradient that does not lie in memory as the layer's output does."""
        key = (*site.key, "gradient", grad.stride())
        if key not in self._sites:
            if not self.checks:
                return False
            with torch.no_grad(), self._aside():
                self._sites[key] = ALONE if site.differs(x, weight, bias, like=grad) else 0
        return self._sites[key] != ALONE

    @staticmethod
    def _fastest(sites: list[Site], tensors: list[Any]) -> int:
        """The place of the fastest rule that is exact; ALONE if none is."""
        places = list(range(len(sites)))
        if len(places) > 1:  # comparing takes longer than timing
            times_s = [site.backward_s(*tensors) for site in sites]
            # The first has the fewest operators, so it wins if the clock does not clearly say otherwise.
            places.sort(key=lambda place: (times_s[place] >= 1.2 * min(times_s), place))
        return next((place for place in places if _is_exact(sites[place], tensors)), ALONE)


def _name_of(value: Any) -> Any:
    """Stands for a number: Python gives -1 and -2 one hash."""
    return -1.5 if value == -1 else value


def cloned(value: Any) -> Any:
    """Arguments with copies of their tensors."""
    return value.clone() if isinstance(value, Tensor) else mapped(value, cloned)


def parts(value: Any) -> Any:
    """What a list, a tuple or a dictionary holds; nothing for anything else."""
    if isinstance(value, (list, tuple)):
        return value
    return value.values() if isinstance(value, Mapping) else ()


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A list, a tuple or a dictionary with the function applied to each element; anything else as it is."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(function(v) for v in value)
    if type(value) is dict:
        return {name: function(v) for name, v in value.items()}
    if isinstance(value, dict):  # as transformers' outputs, whose fields are attributes, too
        return _filled(value, {name: function(v) for name, v in value.items()})
    return value


def _filled(like: Any, values: Mapping[str, Any]) -> Any:
    """A dictionary of a class of its own, with other values."""
    new = copy.copy(like)
    for name, value in values.items():
        new[name] = value
    return new


def _plain(value: Any) -> bool:
    """Whether an argument is a number, a name, or a few of them, such as dimensions."""
    if isinstance(value, tuple):
        return all(isinstance(v, (int, float, str)) for v in value)
    return isinstance(value, (int, float, str))


def _is_exact(site: Site, tensors: list[Any]) -> bool:
    try:
        return not site.differs(*tensors)
    except RuntimeError as error:  # a device may have no such kernel
        if out_of_memory(error):
            raise
        return False
