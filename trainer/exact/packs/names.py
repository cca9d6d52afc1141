"""What torch's functions do, by their names: which a pack need not look at, and which bring samples together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .layers import name_of

# Functions that are given sizes.
SIZES = frozenset(
    (
        "view", "reshape", "expand", "broadcast_to", "rand", "randn", "randint", "normal", "zeros", "ones",
        "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full",
    )
)  # fmt: skip
# Functions that take only the shape and the type of a tensor.
MAKES = frozenset(
    (
        "zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full",
        "new_tensor", "size", "dim", "numel", "arange", "zeros", "ones", "empty", "full",
    )
)  # fmt: skip
# Functions that may turn a tensor, so that its first dimension holds something else than samples.
TURNS = frozenset(("t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "adjoint", "__get__"))
# Functions that may give one value of all samples.
GATHERS = frozenset(
    (
        "sum", "mean", "std", "var", "amax", "amin", "max", "min", "norm", "prod", "median", "logsumexp", "any",
        "all", "argmax", "argmin", "nansum", "nanmean", "count_nonzero", "vector_norm", "aminmax", "quantile",
        "mode",
    )
)  # fmt: skip
# Functions of numbers that change no shape, and mix no samples.
ARITHMETIC = frozenset(
    (
        "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rtruediv",
        "itruediv", "true_divide", "floordiv", "rdiv", "idiv", "mod", "remainder",
        "fmod", "multiply", "subtract", "divide", "lt", "le", "gt", "ge", "eq", "ne", "less", "greater",
        "clamp", "clip", "clamp_min", "clamp_max", "fill", "masked_fill", "full", "full_like", "new_full",
        "where", "lerp", "addcmul", "addcdiv",
    )
)  # fmt: skip
# Functions that are called for one micro-batch at a time: they may bring samples together for some values only, or give
# what is not compared.
SINGLY = frozenset(
    (
        "renorm", "renorm_", "masked_scatter", "masked_scatter_", "cummax", "cummin", "sort", "argsort", "msort",
        "kthvalue", "topk", "normalize", "roll", "quantile", "nanquantile", "searchsorted", "bucketize",
    )
)  # fmt: skip
# Functions that look at a tensor or move its values: never another bit.
MOVES = frozenset(
    (
        "__get__", "size", "dim", "numel", "view", "reshape", "flatten", "unflatten", "transpose", "permute",
        "to", "contiguous", "unsqueeze", "squeeze", "expand", "detach", "float", "clone", "cat", "stack",
        "chunk", "split", "narrow", "select", "__getitem__", "index_select", "type_as", "is_floating_point",
        "is_contiguous", "view_as", "requires_grad_", "expand_as", "movedim", "t", "swapaxes", "data_ptr",
        "stride", "element_size", "__len__", "zero_", "fill_", "copy_", "relu", "masked_fill", "gather",
    )
)  # fmt: skip


def gives_up_samples(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Tensor) -> bool:
    """Whether the first dimension of a result is another one than that of the samples, though it is as large."""
    name, x = name_of(func), args[0] if args else None
    if not isinstance(x, Tensor) or x.dim() == 0:
        return False
    if name in TURNS:
        return found.dim() == x.dim() and found.numel() == x.numel() and found.stride(0) != x.stride(0)
    if name in GATHERS:
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        return any(isinstance(d, int) and not isinstance(d, bool) and d % x.dim() == 0 for d in dims)
    return False


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
    if isinstance(value, dict):
        return {name: function(v) for name, v in value.items()}
    return value
