"""Notes the calls of a micro-batch that is computed alone. A pack is compared with them call by call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules._functions import BackwardHookFunction
from torch.overrides import TorchFunctionMode

from .layers import name_of
from .nested import flat, tensors_of
from .verdicts import RefusedError

# Functions that only look at a tensor's form. They compute nothing, and tasks call them often, so they are not noted.
LOOKS = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point),
        *(Tensor.__len__, Tensor.element_size, torch.is_floating_point, torch.numel, Tensor.get_device),
        *(Tensor.nelement, Tensor.ndimension, Tensor.is_complex, torch.is_complex, Tensor.__hash__, torch.is_tensor),
    )
)  # fmt: skip


class Custom:
    """The function of a class of `torch.autograd.Function`, whose backward may do anything."""

    def __init__(self, of: type, call: Callable[..., Any]) -> None:
        self._of, self._call, self.__name__ = of, call, f"{of.__name__}.apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls it."""
        return self._call(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom) and self._of is other._of

    def __hash__(self) -> int:
        return hash(self._of)


@contextlib.contextmanager
def custom_functions(
    seen: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any], own: tuple[type, ...]
) -> Iterator[None]:
    """A context: functions with a backward of their own are called through `seen`. Torch's modes do not see them.

    Args:
        seen: called with the function, its arguments, and those with names.
        own: classes that are called as they are; those of packs. Without any, nothing is refused.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        call = original.__get__(None, cls)
        # Inside of torch's own functions no mode is active.
        if issubclass(cls, own) or torch._C._len_torch_function_stack() == 0:
            return call(*args, **kwargs)
        if own and cls is BackwardHookFunction:  # only in a pack: `own` is empty while one micro-batch is traced
            raise RefusedError("a module has a backward hook, which would get the gradient of all samples")
        with torch._C.DisableTorchFunction():
            return seen(Custom(cls, call), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


class Call(NamedTuple):
    """One call of a function.

    Attributes:
        func: the function.
        given: its arguments, as from `flat`, with (shape, tensor or None) in place of each tensor. The tensor is kept
            if the trace has not seen it being made: a pack has to get the same tensor.
        shapes: of the tensors that it returned.
        changes: whether it has changed one of its arguments.
        aliases: whether a tensor that it returned shares memory with one of its arguments.
        inner: what a module of `apart` has called.
    """

    func: Any
    given: list[Any]
    shapes: list[torch.Size]
    changes: bool = False
    aliases: bool = False
    inner: Sequence[Call] = ()


def memories(values: Any) -> set[int]:
    """Where the memory of tensors begins."""
    return {t.untyped_storage().data_ptr() for t in tensors_of(values) if t.numel()}


def versions(values: Any) -> list[int]:
    """How often tensors have been changed."""
    return [t._version for t in tensors_of(values)]


class Shape(NamedTuple):
    """A tensor among the arguments of a call, see `Call`."""

    shape: torch.Size
    outside: Tensor | None


class Trace(TorchFunctionMode):
    """Active while one micro-batch is computed alone: notes its calls.

    Attributes:
        calls: in order, first those of the task's forward.
        forward_calls: how many of them were those of the task's forward.
        broken: why calls could not be noted; empty if they were.

    Args:
        arrays: the samples.
        known: ids of the model's parameters and buffers.
        apart: modules that packs call for one micro-batch at a time.
    """

    def __init__(self, arrays: Mapping[str, Tensor], known: frozenset[int], apart: Sequence[nn.Module]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.forward_calls: int | None = None
        self.broken = ""
        self._known, self._apart = known, apart
        self._inner: list[Call] | None = None  # in a module of `apart`
        self._mark = object()
        for array in arrays.values():
            array._seen = self._mark  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def active(self) -> Iterator[Trace]:
        """A context in which calls are noted."""
        with self, self._modules(), custom_functions(self._call, ()):
            yield self

    def end_of_forward(self) -> None:
        """What is called from now on belongs to the losses."""
        self.forward_calls = len(self.calls)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch instead of each of its functions."""
        if func in LOOKS:
            return func(*args, **(kwargs or {}))
        return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self._given(func, args, kwargs)
        found = func(*args, **kwargs)
        self._note(func, args, kwargs, before, found)
        return found

    def _given(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], list[int]] | None:
        """The arguments of a call as in `Call`, and how often they have been changed; None if that cannot be known."""
        try:
            given = [self._shape(v) if isinstance(v, Tensor) else v for v in flat((args, kwargs), [])]
            return given, versions((args, kwargs))
        except Exception as error:  # a nested tensor has no shape, say
            self.broken = f"{name_in(func)}: {error}"
            return None

    def _note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: tuple[list[Any], list[int]] | None,
        found: Any,
        inner: Sequence[Call] = (),
    ) -> None:
        if before is None:
            return
        try:
            shapes = []
            for tensor in tensors_of(found):
                shapes.append(tensor.shape)
                if id(tensor) not in self._known:
                    tensor._seen = self._mark  # type: ignore[attr-defined]
            changes = versions((args, kwargs)) != before[1]
            aliases = not memories(found).isdisjoint(memories((args, kwargs)))
        except Exception as error:
            self.broken = f"{name_in(func)}: {error}"
            return
        calls = self.calls if self._inner is None else self._inner
        calls.append(Call(func, before[0], shapes, changes, aliases, inner))

    def _shape(self, tensor: Tensor) -> Shape:
        seen = id(tensor) in self._known or getattr(tensor, "_seen", None) is self._mark
        return Shape(tensor.shape, None if seen else tensor)

    @contextlib.contextmanager
    def _modules(self) -> Iterator[None]:
        """A module of `apart` counts as one call."""
        with forwards_replaced(self._apart, self._one_call):
            yield

    def _one_call(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._inner is not None:
                return forward(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                before = self._given(type(module), args, kwargs)
            inner: list[Call] = []
            self._inner = inner
            try:
                found = forward(*args, **kwargs)
            finally:
                self._inner = None
            with torch._C.DisableTorchFunction():
                self._note(type(module), args, kwargs, before, found, inner)
            return found

        return call


@contextlib.contextmanager
def forwards_replaced(
    modules: Sequence[nn.Module], replaced: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """A context in which modules' forwards are replaced. A forward that a user has set on a module is restored."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    for module in modules:
        module.forward = replaced(module, module.forward)
    try:
        yield
    finally:
        for module, own in before:
            del module.forward
            if own is not None:
                module.forward = own


def name_in(func: Any) -> str:
    """A function's name in a message."""
    return func.__name__ if isinstance(func, type) else name_of(func)


def scaled_numbers(func: Any, given: list[Any], own: Call, g: int, parts: Callable[[Tensor], bool]) -> frozenset[int]:
    """Compares a pack's call with that of a micro-batch alone.

    Args:
        func, given: the pack's call, as from `flat`.
        own: that of a micro-batch.
        g: micro-batches in the pack.
        parts: whether a tensor has a part for each micro-batch.

    Returns:
        The places of whole numbers that are g times those of a micro-batch.

    Raises:
        RefusedError: the calls do not fit.
    """
    name = name_in(func)
    if func != own.func or len(given) != len(own.given):
        raise RefusedError(f"{name} is called where a micro-batch alone calls {name_in(own.func)}")
    scaled = set()
    for place, (a, b) in enumerate(zip(given, own.given)):
        if isinstance(a, Tensor):
            if not isinstance(b, Shape):
                raise RefusedError(f"{name} gets a tensor where a micro-batch alone has none")
            one = parts(a)
            expected = (g * b.shape[0], *b.shape[1:]) if one and b.shape else (g,) if one else tuple(b.shape)
            if tuple(a.shape) != expected:
                raise RefusedError(f"{name} gets a tensor whose size does not follow from the micro-batches")
        elif isinstance(a, (int, float)) and isinstance(b, (int, float)):
            if a == b or a != a:  # nan counts as the same
                continue
            if isinstance(a, bool) or not isinstance(a, int) or a != g * b:
                raise RefusedError(f"{name} gets a number that depends on how many samples there are")
            scaled.add(place)
        elif not _same(a, b):
            raise RefusedError(f"{name} gets something else than in a micro-batch alone")
    return frozenset(scaled)


def same_alone(func: Any, given: list[Any], own: Call) -> None:
    """Compares a call for one micro-batch of a pack with that of the same micro-batch alone.

    Args:
        func, given: the call, as from `flat`.
        own: that of the micro-batch alone.

    Raises:
        RefusedError: they are not the same.
    """
    name = name_in(func)
    if func != own.func or len(given) != len(own.given):
        raise RefusedError(f"{name} is called where a micro-batch alone calls {name_in(own.func)}")
    for a, b in zip(given, own.given):
        if isinstance(a, Tensor) or isinstance(b, Shape):
            if not (isinstance(a, Tensor) and isinstance(b, Shape) and a.shape == b.shape):
                raise RefusedError(f"{name} gets a tensor of another size than in a micro-batch alone")
        elif isinstance(a, (int, float)) and isinstance(b, (int, float)):
            if a != b and a == a:
                raise RefusedError(f"{name} gets {a}, and {b} in a micro-batch alone")
        elif not _same(a, b):
            raise RefusedError(f"{name} gets something else than in a micro-batch alone")


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments that are neither tensors nor plain numbers are the same."""
    if type(a) is not type(b):
        return False
    if a is b:
        return True
    try:
        return bool((a == b).all()) if isinstance(a, np.ndarray) else bool(a == b or a != a)
    except Exception:
        return False


def same_calls(one: Trace, other: Trace) -> bool:
    """Whether the task's forward calls the same functions, of equal shapes and numbers, for two micro-batches."""
    if one.forward_calls != other.forward_calls:
        return False
    return all(
        a.func == b.func
        and a.shapes == b.shapes
        and len(a.given) == len(b.given)
        and all(map(_alike, a.given, b.given))
        for a, b in zip(one.calls[: one.forward_calls], other.calls)
    )


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Shape):
        return isinstance(b, Shape) and a.shape == b.shape
    if isinstance(a, (int, float, str)):
        return type(a) is type(b) and (a == b or a != a)
    return type(a) is type(b)
