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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..batch_norm import RunningStatistics
from .functions import FUNCTIONS
from .layers import Cut, Join, Layer, Rule, Site, name_of, piece
from .leaves import Leaves
from .names import ARITHMETIC, MAKES, MOVES, SINGLY, SIZES, TURNS, cloned, gives_up_samples, mapped, parts
from .streams import Streams
from .values import ENOUGH_VALUES, LOW_PRECISION, MOST_DRAWS, drawn_gradient, drawn_like, same_bits, start_of
from .verdicts import RefusedError, out_of_memory

Key = tuple[Any, ...]
ALONE = -1
# Kinds of arguments: tensors with a part for each micro-batch, and values that several samples gave.
_PARTED, _WHOLE = 1, 2


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
        checks: in a trial: compares each layer with the layer applied to one micro-batch at a time.
        form: names the functions that were called so far: which, of what shapes, in which order. Numbers in
            arithmetic do not count: a task may let them follow its progress.

    Args:
        parameters: id of a trained parameter -> its place.
        constants: ids of the model's other tensors, which no micro-batch has a part of.
        statistics: of normalisation layers.
        rows: samples of the pack.
        g: micro-batches; rows / g samples each.
        leaves: takes the gradients.
        streams: random numbers.
        sites: what trials have found out: the key of a layer -> which of its rules is taken; the key of a layer or
            function that is computed one micro-batch at a time -> ALONE. A trial adds to them.
        checked: keys of layers and functions that trials have compared. A trial adds to them.
        checks: whether this is a trial.
    """

    def __init__(
        self,
        parameters: Mapping[int, int],
        constants: frozenset[int],
        statistics: RunningStatistics,
        *,
        rows: int,
        g: int,
        leaves: Leaves,
        streams: Streams,
        sites: dict[Key, int],
        checked: set[Key],
        checks: bool,
    ) -> None:
        super().__init__()
        self._parameters, self._constants, self._statistics = parameters, constants, statistics
        self._rows, self.g, self.leaves, self._streams, self.checks = rows, g, leaves, streams, checks
        self._sites, self._checked, self.form = sites, checked, 0
        self._any_alone = ALONE in sites.values()
        self.scratch = statistics.scratch_rows(g)
        self._aliases: dict[tuple[int, int], Tensor] = {}
        self._derived: dict[int, int] = {}  # id of a tensor that follows from parameters alone -> its place
        self.derived: list[tuple[Tensor, Tensor]] = []  # with its graph; without
        self._reductions: dict[int, tuple[Tensor, Callable[[int], Any]]] = {}
        self._whole: dict[int, Tensor] = {}
        self._now: int | None = None  # the micro-batch that is computed alone
        self._cuts: dict[int, tuple[Tensor, int, tuple[Tensor, ...]]] = {}

    def close(self) -> None:
        """Lets go of all tensors. The graph refers to the pack, so that they would be freed late otherwise."""
        for kept in (self._aliases, self._cuts, self._reductions, self.derived, self._whole):
            kept.clear()

    # ---- what is called ------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch instead of each of its functions."""
        kwargs = kwargs or {}
        if self._now is not None:
            k = self._now
            return func(*self._own(args, k), **self._own(kwargs, k))
        given = self._note(func, args, kwargs)
        if given == _PARTED | _WHOLE:
            raise RefusedError(f"{name_of(func)} brings samples together with a value that several of them gave")
        found = self._called(func, args, kwargs, given)
        if given and name_of(func) not in MAKES:
            self._note_whole(func, args, kwargs, found, given == _WHOLE)
        return found

    def _called(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: int) -> Any:
        """What a function returns: by a rule, one micro-batch at a time, or for the pack. given: as from `_note`."""
        rule = FUNCTIONS.get(func)
        if rule is not None:
            found = rule(self, func, args, kwargs)
            if found is not NotImplemented:
                return found
        used = self._used(args) | self._used(kwargs.values()) if kwargs else self._used(args)
        if used:
            # Whole numbers are positions: they follow from a length.
            if given & _WHOLE and any(
                isinstance(v, Tensor) and v.is_floating_point() and id(v) in self._whole for v in args
            ):
                raise RefusedError(f"{name_of(func)} brings parameters together with a value that several samples gave")
            return self._with_parameters(func, args, kwargs, used)
        name = name_of(func)
        if name in SINGLY and given & _PARTED:
            return self.apart(func, args, kwargs)
        if name == "register_hook":
            raise RefusedError("a gradient has a hook, which would get that of all samples")
        if self.checks or self._any_alone:
            key = self._function_key(func, args, kwargs)
            if key is not None and self._is_alone(key, func, args, kwargs):
                return self.apart(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Adds a call to `form`. Returns what is among its arguments: `_PARTED`, `_WHOLE`, both or neither."""
        known: list[Any] = [func, torch.is_grad_enabled()]
        numbers = name_of(func).strip("_") not in ARITHMETIC
        found = self._look_at(args, known, numbers)
        if kwargs:
            found |= self._look_at(kwargs, known, numbers)
        self.form = hash((self.form, *known))
        return found

    def _look_at(self, values: Any, known: list[Any], numbers: bool) -> int:
        """One pass through arguments, since it is made for every function: notes their form, and what there is."""
        found = 0
        if isinstance(values, Mapping):
            known += values
            values = values.values()
        for value in values:
            if isinstance(value, Tensor):
                known += (value.shape, value.stride(), value.dtype, value.requires_grad, self.place(value))
                if self.has_part(value):
                    found |= _PARTED
                elif id(value) in self._whole:
                    found |= _WHOLE
            elif value is None or isinstance(value, (str, bool, torch.dtype)):
                known.append(value)
            elif isinstance(value, (list, tuple, Mapping)):
                known.append(len(value))
                found |= self._look_at(value, known, numbers)
            elif isinstance(value, slice):
                known += (value.start, value.stop, value.step)
            else:
                known.append(value if numbers and isinstance(value, int) else type(value))
        return found

    def _note_whole(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any, from_whole: bool
    ) -> None:
        """Notes results in which samples are no longer apart. Whatever they do later, a micro-batch has its own."""
        for tensor in found if isinstance(found, (list, tuple)) else (found,):
            if not isinstance(tensor, Tensor):
                continue
            lost = not self.has_part(tensor)
            if not lost:
                turned = gives_up_samples(func, args, kwargs, tensor)
                # What was turned may be turned back. All else that follows from such values alone is one of them.
                lost = not (turned and name_of(func) in TURNS) if from_whole else turned
            if lost and self.place(tensor) is None:
                self._whole[id(tensor)] = tensor  # kept, as an id may be given to another one

    def _function_key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key | None:
        """Names a function of samples by its shapes; None for one that only looks at tensors or moves values."""
        name = name_of(func)
        if name in MOVES:
            return None
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        tensors += [t for v in args if isinstance(v, (list, tuple)) for t in v if isinstance(t, Tensor)]
        if not any(t.is_floating_point() and self.has_part(t) for t in tensors):
            return None
        cast = torch.is_autocast_enabled(self.leaves.device_type)
        shapes = ((tuple(t.shape), t.stride()) for t in tensors)
        numbers = () if name.strip("_") in ARITHMETIC else (*filter(_plain, args), *filter(_plain, kwargs.values()))
        return (name, self.g, *shapes, str(tensors[0].dtype), cast, numbers)

    def _is_alone(self, key: Key, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function is computed one micro-batch at a time. In a trial, finds out."""
        if key in self._sites:
            return True
        if not self.checks or key in self._checked:
            return False
        self._checked.add(key)
        with self._aside():
            differs = self._differs(func, args, kwargs)
        if differs and (key[0].endswith("_") or kwargs.get("inplace")):
            raise RefusedError(f"{key[0]}, which gives other bits in a pack, in place")
        if differs:
            self._set_alone(key)
        return differs

    def _set_alone(self, key: Key) -> None:
        self._sites[key], self._any_alone = ALONE, True

    def _differs(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function gives other bits for a pack than one micro-batch at a time, of random values."""
        wide = self._widened((args, kwargs))
        if wide is not None:  # as in `Site.differs`
            with torch.autocast(self.leaves.device_type, enabled=False):
                if self._differs(func, *wide):
                    return True
        compared = 0
        for _ in range(MOST_DRAWS):
            inputs: list[Tensor] = []
            own = self._drawn((args, kwargs), inputs)
            try:
                with torch.enable_grad():
                    together = func(*cloned(own[0]), **cloned(own[1]))
                    if not isinstance(together, Tensor) or not together.is_floating_point():
                        return False
                    pieces = [
                        func(*cloned(self.part(own[0], k, func)), **cloned(self.part(own[1], k, func)))
                        for k in range(self.g)
                    ]
                    if any(p.dim() != together.dim() or p.dim() == 0 for p in pieces):
                        return False  # it mixes samples: the comparison of the whole tells
                    if pieces[0].shape[1:] != together.shape[1:]:
                        raise RefusedError(f"{name_of(func)} mixes samples")
                    joined = Join.apply(*pieces)
                    if joined.shape != together.shape:
                        return False
                    if not same_bits(together, joined):
                        return True
                    if together.requires_grad:
                        grad = drawn_gradient(together)
                        one = torch.autograd.grad(together, inputs, grad, allow_unused=True)
                        other = torch.autograd.grad(joined, inputs, grad, allow_unused=True)
                        parted = [(a, b) for a, b, i in zip(one, other, inputs) if self.has_part(i)]
                        if not all(same_bits(a, b) for a, b in parted):
                            return True
            except RuntimeError:
                return False  # not a function of these shapes alone: the comparison of the whole tells
            compared += together.numel()
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
            return v.detach().float().requires_grad_(v.requires_grad)

        wide = widen(value)
        return wide if low or torch.is_autocast_enabled(self.leaves.device_type) else None

    def _drawn(self, value: Any, inputs: list[Tensor]) -> Any:
        if isinstance(value, Tensor):
            if not value.is_floating_point() or not self.has_part(value):
                return value  # what no micro-batch has a part of is known by its identity
            drawn = drawn_like(value.detach())
            if value.requires_grad:
                inputs.append(drawn.requires_grad_())
            return drawn
        return mapped(value, lambda v: self._drawn(v, inputs))

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What is drawn meanwhile is nobody's."""
        with self._streams.aside():
            yield

    def place(self, tensor: Any) -> int | None:
        """The place of a trained parameter, or of what follows from parameters alone; None for any other."""
        found = self._parameters.get(id(tensor))
        return self._derived.get(id(tensor)) if found is None else found

    def _used(self, values: Any) -> set[int]:
        used = set()
        for value in values:
            if isinstance(value, Tensor):
                place = self.place(value)
                if place is not None:
                    used.add(place)
            elif isinstance(value, (list, tuple)):
                used |= self._used(value)
        return used

    def _with_parameters(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]) -> Any:
        """A function without a rule that is given trained parameters."""
        if self._has_part((args, kwargs), func):
            return self.apart(func, args, kwargs)
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

    def has_part(self, tensor: Tensor) -> bool:
        """Whether each micro-batch has its own part of a tensor: it lies along the first dimension."""
        if tensor.dim() == 0 or tensor.size(0) == 0 or tensor.size(0) % self._rows:
            return False
        key = id(tensor)  # looked up here and not by `place`: this is asked for every argument and result
        if key in self._constants or key in self._whole or key in self._parameters or key in self._derived:
            return False
        return not self._statistics.size or self._statistics.scratch_piece(tensor, self.scratch) is None

    def _has_part(self, value: Any, func: Any) -> bool:
        if isinstance(value, Tensor):
            return self.has_part(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value == self._rows and name_of(func) in SIZES
        return any(self._has_part(v, func) for v in parts(value))

    def part(self, value: Any, k: int, func: Any = "", same: dict[int, Tensor] | None = None) -> Any:
        """What micro-batch k sees of an argument; an argument that is given twice is one tensor here, too.

        A whole number may be that of the pack's samples, among the sizes that a function is given. Others, such as the
        stride of a convolution, may only happen to be as large.
        """
        same = {} if same is None else same
        if isinstance(value, Tensor):
            if self.has_part(value):
                if id(value) not in same:
                    same[id(value)] = self._piece(value, k)
                return same[id(value)]
            return self._own(value, k)
        if isinstance(value, int) and not isinstance(value, bool):
            return value // self.g if value == self._rows and name_of(func) in SIZES else value
        return mapped(value, lambda v: self.part(v, k, func, same))

    def _piece(self, value: Tensor, k: int) -> Tensor:
        if not (value.requires_grad and torch.is_grad_enabled()):
            return piece(value, k, self.g)
        known = self._cuts.get(id(value))
        if known is None or known[1] != value._version:
            known = self._cuts[id(value)] = (value, value._version, Cut.apply(value, self.g))
        return known[2][k]

    def _own(self, value: Any, k: int) -> Any:
        """An argument with micro-batch k's own parameters and scratch memory."""
        if isinstance(value, Tensor):
            place = self.place(value)
            if place is not None:
                return self._alias(value, place, k)
            own = self._statistics.scratch_piece(value, self.scratch)
            return value if own is None else own[k].data
        if isinstance(value, (list, tuple, dict)):
            return mapped(value, lambda v: self._own(v, k))
        return value

    def _alias(self, value: Tensor, place: int, k: int) -> Tensor:
        if not torch.is_grad_enabled():
            return value
        alias = self._aliases.get((place, k))
        if alias is None:
            self.leaves.expect(place)
            alias = self._aliases[place, k] = Alias.apply(value, self, place, k)
        return alias

    def apart(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], random: bool = False) -> Any:
        """Calls a function for one micro-batch at a time, and joins what it returns."""
        found = []
        for k in range(self.g):
            with self._streams.of(k) if random else contextlib.nullcontext():
                found.append(func(*self.part(args, k, func), **self.part(kwargs, k, func)))
        return self.joined(found, func)

    def joined(self, found: Sequence[Any], what: Any) -> Any:
        """One value of those of all micro-batches."""
        first = found[0]
        if isinstance(first, Tensor):
            if first.dim() == 0:
                raise RefusedError(f"{name_of(what)} mixes samples")
            return Join.apply(*found)
        if isinstance(first, tuple) and hasattr(first, "_fields"):
            return type(first)(*(self.joined(column, what) for column in zip(*found)))
        if isinstance(first, (list, tuple)):
            return type(first)(self.joined(column, what) for column in zip(*found))
        if isinstance(first, Mapping):
            return type(first)({name: self.joined([f[name] for f in found], what) for name in first})  # type: ignore[call-arg]
        if any(f != first for f in found[1:]):
            raise RefusedError(f"{name_of(what)} differs among micro-batches", once=True)
        return first

    @contextlib.contextmanager
    def now(self, k: int, random: bool = True) -> Iterator[None]:
        """What is called meanwhile is called for micro-batch k alone."""
        assert self._now is None
        self._now = k
        try:
            with self._streams.of(k) if random else contextlib.nullcontext():
                yield
        finally:
            self._now = None

    @contextlib.contextmanager
    def modules_apart(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Modules are called for one micro-batch at a time."""
        for module in modules:
            module.forward = self._apart_forward(module, module.forward)
        try:
            yield
        finally:
            for module in modules:
                del module.forward  # the class's own is behind it

    def _apart_forward(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._now is not None:
                return forward(*args, **kwargs)
            found = []
            for k in range(self.g):
                with self.now(k):
                    with torch._C.DisableTorchFunction():
                        own = self.part((args, kwargs), k)
                    found.append(forward(*own[0], **own[1]))
            self._now = 0  # what is joined is nobody's
            try:
                return self.joined(found, type(module).__name__)
            finally:
                self._now = None

        return call

    def outputs_of(self, outputs: Any, k: int) -> Any:
        """Micro-batch k's part of what a task's forward returned."""
        with torch._C.DisableTorchFunction():
            tensors = [outputs] if isinstance(outputs, Tensor) else list(parts(outputs))
            if not tensors or not all(isinstance(t, Tensor) and self.has_part(t) for t in tensors):
                raise RefusedError("an output that does not have one row a sample")
            return self.part(outputs, k)

    def samples_of(self, arrays: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
        """Micro-batch k's samples of those of the pack."""
        with torch._C.DisableTorchFunction():
            return {name: piece(array, k, self.g) for name, array in arrays.items()}

    def summed(self, losses: Any) -> Tensor:
        """The sum of each micro-batch's losses, (g,), of what a task's sample_losses returned: (samples,)."""
        with torch._C.DisableTorchFunction():
            if not isinstance(losses, Tensor) or losses.shape != (self._rows,):
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

    def has_parts(self, value: Any, func: Any) -> bool:
        """Whether each micro-batch has its own part of one of a function's arguments."""
        return self._has_part(value, func)

    def reduced(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A number of a whole tensor; each micro-batch has its own, in case that the host reads it."""
        found = func(*args, **kwargs)
        self._reductions[id(found)] = (found, lambda k: func(*self.part(args, k), **kwargs))
        return found

    def read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the host reads of a tensor, if it is the same for all micro-batches."""
        if id(args[0]) in self._constants or self.place(args[0]) is not None:
            return func(*args, **kwargs)
        known = self._reductions.get(id(args[0]))
        if known is None:
            raise RefusedError(f"{name_of(func)}: what is done next depends on values")
        values = [func(known[1](k), *args[1:], **kwargs) for k in range(self.g)]
        if any(value != values[0] for value in values[1:]):
            raise RefusedError(f"{name_of(func)} gives micro-batches different values", once=True)
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
            if chosen == ALONE:
                self._set_alone(key)
                return NotImplemented
            self._sites[key] = chosen
        site = sites[chosen]
        for place in places:
            if place is not None:
                self.leaves.expect(place)
        return Layer.apply(site, *tensors)

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
