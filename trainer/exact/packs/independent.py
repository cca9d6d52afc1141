"""Which functions treat the parts of a pack one by one, so that they may be called once for all of them.

A pack's tensor has one part for each micro-batch, one after the other along its first dimension. A function is listed
here if a part of its result depends on the same part of its arguments, and on nothing else, whatever the values are.
This has to be clear from the arguments. Any other function is called for one micro-batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .layers import name_of

Parted = Callable[[Any], bool]  # whether a value is a tensor that has a part for each micro-batch

# Functions of numbers. A task may let these numbers follow its progress, so they are no part of the form of a call.
ARITHMETIC = frozenset(
    (
        "add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "div", "truediv", "rtruediv",
        "itruediv", "true_divide", "floordiv", "rdiv", "idiv", "mod", "remainder",
        "fmod", "multiply", "subtract", "divide", "lt", "le", "gt", "ge", "eq", "ne", "less", "greater",
        "clamp", "clip", "clamp_min", "clamp_max", "fill", "masked_fill", "full_like",
        "where", "lerp", "addcmul", "addcdiv",
    )
)  # fmt: skip
# Functions of each element. Those with a trailing underscore change their first argument.
ELEMENTWISE = ARITHMETIC | frozenset(
    (
        "abs", "absolute", "neg", "negative", "positive", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p",
        "sqrt", "rsqrt", "square", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh",
        "tanh", "asinh", "acosh", "atanh", "sigmoid", "logit", "erf", "erfc", "sign", "sgn", "floor", "ceil", "round",
        "trunc", "frac", "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardtanh",
        "hardswish", "hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign", "logsigmoid",
        "threshold", "pow", "rpow", "float_power", "maximum", "minimum", "fmax", "fmin", "logical_and", "logical_or",
        "logical_not", "logical_xor", "and", "or", "xor", "invert", "lshift", "rshift", "bitwise_and", "bitwise_or",
        "bitwise_xor", "bitwise_not", "bitwise_left_shift", "bitwise_right_shift", "isnan", "isinf", "isfinite",
        "nan_to_num", "logaddexp", "xlogy", "sinc", "hypot", "to", "type", "type_as", "float", "double", "half",
        "bfloat16", "int", "long", "bool", "clone", "contiguous", "detach", "requires_grad",
        "zeros_like", "ones_like", "empty_like", "zero", "copy",
    )
)  # fmt: skip
# Functions along a dimension, which is their second argument or named.
ALONG = frozenset(
    (
        "sum", "mean", "std", "var", "amax", "amin", "max", "min", "prod", "logsumexp", "softmax", "log_softmax",
        "softmin", "cumsum", "cumprod", "argmax", "argmin", "any", "all", "nansum", "nanmean", "count_nonzero", "glu",
        "flip", "select", "narrow", "chunk", "split", "tensor_split", "unbind", "gather", "scatter", "scatter_add",
        "take_along_dim",
    )
)  # fmt: skip
_LAST_DIMENSION = {"glu": -1}
# Their second argument is something else, and the dimension the third.
_THIRD = frozenset(("chunk", "split", "tensor_split", "take_along_dim"))
# Functions that keep the order of elements: a part stays a part if the first dimension stays that of all parts.
RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"))
# Functions of sizes, among which may be the number of a pack's samples. With "expand", a new first dimension would have
# another size than that of all parts.
_SIZED = RESHAPES | frozenset(("expand", "expand_as", "broadcast_to"))
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_TURNS = frozenset(("transpose", "swapaxes", "swapdims"))
_PRODUCTS = frozenset(("matmul", "bmm"))
# Layers whose parameters are not trained -> the fewest dimensions of their input.
_LAYERS = {
    "linear": 2, "group_norm": 2, "batch_norm": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5,
    "conv_transpose1d": 3, "conv_transpose2d": 4, "conv_transpose3d": 5, "max_pool1d": 3, "max_pool2d": 4,
    "max_pool3d": 5, "avg_pool1d": 3, "avg_pool2d": 4, "avg_pool3d": 5, "adaptive_avg_pool1d": 3,
    "adaptive_avg_pool2d": 4, "adaptive_avg_pool3d": 5, "adaptive_max_pool1d": 3, "adaptive_max_pool2d": 4,
    "adaptive_max_pool3d": 5, "interpolate": 3, "pixel_shuffle": 4, "pixel_unshuffle": 4, "triu": 3, "tril": 3,
}  # fmt: skip
# Losses of each sample, with reduction="none".
_LOSSES = frozenset(
    (
        "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
        "binary_cross_entropy_with_logits", "kl_div",
    )
)  # fmt: skip
# Functions that only move values or look at them. They never give other bits, so nothing has to be compared.
MOVES = frozenset(
    (
        "to", "contiguous", "detach", "float", "clone", "cat", "concat", "stack", "chunk", "split", "narrow", "select",
        "getitem", "setitem", "index_select", "gather", "scatter", "type_as", "requires_grad", "zero", "fill", "copy",
        "masked_fill", "relu", "get", "transpose", "swapaxes", "permute", "unbind", "flip", "zeros_like", "ones_like",
    )
) | _SIZED  # fmt: skip


def is_in_place(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function changes one of its arguments, by its name."""
    name = name_of(func)
    if name.startswith("__"):
        return name in ("__setitem__", "__set__", "__delitem__") or (name.startswith("__i") and name[3:-2] in _IN_PLACE)
    return name.endswith("_") or bool(kwargs.get("inplace")) or kwargs.get("out") is not None


_IN_PLACE = frozenset(
    (
        "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift",
        "matmul",
    )
)  # fmt: skip


def plain_name(func: Any) -> str:
    """A function's name, the same for `add`, `add_`, `__add__` and `__iadd__`."""
    name = name_of(func)
    if name.startswith("__i") and name[3:-2] in _IN_PLACE:
        return name[3:-2]
    return name.strip("_")


def takes_sizes(func: Any) -> bool:
    """Whether the number of a pack's samples may be among a function's sizes."""
    return plain_name(func) in _SIZED


def is_independent(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parted: Parted) -> bool:
    """Whether a function treats the parts of its arguments one by one. Shapes still have to be those of a pack.

    Args:
        func, args, kwargs: the function and what it is given; at least one has parts.
        parted: tells which tensors have parts. All others are the same for every micro-batch.
    """
    name, x = plain_name(func), args[0] if args else None
    if name == "set" or (is_in_place(func, kwargs) and not parted(x)):
        return False
    if name in ("cat", "concat", "concatenate", "stack"):
        return _is_joined(name, args, kwargs, parted)
    if not isinstance(x, Tensor):
        return False
    of_two = name in ("max", "min") and len(args) == 2 and isinstance(args[1], Tensor)
    if name in ELEMENTWISE or of_two:
        return _are_aligned(args, kwargs, parted)
    if name in _LOSSES:
        return kwargs.get("reduction") == "none" and _are_aligned(args, kwargs, parted)
    rule = _OTHERS.get(name)
    if rule is not None:
        return rule(args, kwargs, parted)
    if not parted(x):
        return False
    if name in ALONG:
        return _is_along(name, args, kwargs, parted)
    if name in _SIZED:
        return True
    if name in _LAYERS:
        return x.dim() >= _LAYERS[name] and not any(parted(t) for t in _tensors((args[1:], kwargs)))
    return False


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))


def _are_aligned(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    """Whether the first dimension is that of the parts in all tensors that have it."""
    tensors = list(_tensors((args, kwargs)))
    dims = max(t.dim() for t in tensors)
    sizes = set()
    for t in tensors:
        if parted(t):
            if t.dim() != dims:
                return False
            sizes.add(t.size(0))
        elif t.dim() == dims and t.size(0) != 1:
            return False
    return len(sizes) == 1


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_along(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    x = args[0]
    place = 2 if name in _THIRD else 1
    dims = kwargs.get("dim", kwargs.get("axis", kwargs.get("dims")))
    if dims is None:
        given = args[place:] if name == "flip" else args[place : place + 1]
        dims = given[0] if len(given) == 1 else (given or _LAST_DIMENSION.get(name))
    dims = tuple(dims) if isinstance(dims, (list, tuple)) else (dims,)
    if not dims or not all(_number(d) and d % x.dim() != 0 for d in dims):
        return False
    others = list(_tensors((args[1:], kwargs)))
    return all(parted(t) and t.dim() == x.dim() and t.size(0) == x.size(0) for t in others)


def _is_selected(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    """`index_select`: rows of something that has no parts, or the same along another dimension of all parts."""
    x, *rest = args
    dim, places = (*rest, *(kwargs[name] for name in ("dim", "index")[len(rest) :]))
    if not _number(dim) or x.dim() == 0:
        return False
    return (dim % x.dim() != 0 and not parted(places)) if parted(x) else (dim % x.dim() == 0 and places.dim() == 1)


def _is_joined(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    tensors = args[0] if args else kwargs.get("tensors")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not isinstance(tensors, (list, tuple)) or not tensors or not _number(dim):
        return False
    same = len({t.dim() for t in tensors if isinstance(t, Tensor)}) == 1
    return same and all(parted(t) for t in tensors) and dim % (tensors[0].dim() + (name == "stack")) != 0


def _is_turned(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    dims = args[1:3]
    return not kwargs and len(dims) == 2 and all(_number(d) and d % args[0].dim() != 0 for d in dims)


def _is_permuted(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    dims = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    return not kwargs and bool(dims) and dims[0] == 0


def _is_repeated(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    times = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
    return not kwargs and len(times) == args[0].dim() and times[0] == 1


def _is_product(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    if kwargs or len(args) != 2 or not isinstance(args[1], Tensor):
        return False
    a, b = args
    if parted(a) and parted(b):
        return a.dim() == b.dim() >= 3 and a.size(0) == b.size(0)
    if parted(a):  # its rows; b is the same for all of them
        return a.dim() >= 2 and (b.dim() <= 2 or (a.dim() == b.dim() and b.size(0) == 1))
    return b.dim() >= 3 and (1 <= a.dim() <= 2 or (a.dim() == b.dim() and a.size(0) == 1))


def _is_attention(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    if len(args) < 3 or not all(parted(t) and t.dim() == args[0].dim() >= 3 for t in args[:3]):
        return False
    return len({t.size(0) for t in args[:3]}) == 1 and _are_aligned(
        (args[0], *_tensors((args[3:], kwargs))), {}, parted
    )


def _is_padded(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    pad = kwargs.get("pad", args[1] if len(args) > 1 else None)
    return isinstance(pad, (list, tuple)) and len(pad) // 2 < args[0].dim()


def _is_indexed(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    """Whether an index leaves the first dimension alone; or looks up rows of something that has no parts."""
    x, places = args[0], args[1]
    if not parted(x):  # a table
        whole = isinstance(places, Tensor) and not places.is_floating_point() and places.dtype != torch.bool
        return len(args) == 2 and whole and parted(places) and places.dim() >= 1
    places = places if isinstance(places, tuple) else (places,)
    used = [p for p in places if p is not None and p is not Ellipsis]
    if any(not (_number(p) or isinstance(p, slice)) for p in used):
        return False
    first = places[0] if places else None
    if first is Ellipsis:
        return places.count(Ellipsis) == 1 and len(used) < x.dim()
    return isinstance(first, slice) and first == slice(None)


def _is_set(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    if not parted(args[0]) or not _is_indexed(args[:2], {}, parted):
        return False
    value = args[2]
    region = args[0].detach()[args[1]]
    if isinstance(value, Tensor):
        return _are_aligned((region, value), {}, lambda t: t is region or parted(t)) and region.dim() >= value.dim()
    return isinstance(value, (int, float))


def _is_normalised(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else None)
    others = _tensors((args[1:], kwargs))
    return isinstance(shape, (list, tuple)) and len(shape) < args[0].dim() and not any(parted(t) for t in others)


def _is_classified(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    """Cross-entropy of each sample."""
    if kwargs.get("reduction") != "none" or len(args) < 2 or not (isinstance(args[1], Tensor) and parted(args[1])):
        return False
    weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
    return args[0].dim() >= 2 and args[1].dim() >= 1 and not (isinstance(weight, Tensor) and parted(weight))


def _is_looked_up(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    max_norm = kwargs.get("max_norm", args[3] if len(args) > 3 else None)  # would change the table
    return max_norm is None and len(args) > 1 and not parted(args[1])


def _is_one_hot(args: tuple[Any, ...], kwargs: Mapping[str, Any], parted: Parted) -> bool:
    classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
    return _number(classes) and classes > 0


def _with_parts(rule: Callable[..., bool]) -> Callable[..., bool]:
    """For functions whose first argument has to have parts."""
    return lambda args, kwargs, parted: parted(args[0]) and rule(args, kwargs, parted)


_OTHERS: dict[str, Callable[..., bool]] = {
    **dict.fromkeys(_TURNS, _with_parts(_is_turned)),
    "permute": _with_parts(_is_permuted),
    "repeat": _with_parts(_is_repeated),
    **dict.fromkeys(_PRODUCTS, _is_product),
    "scaled_dot_product_attention": _is_attention,
    "pad": _with_parts(_is_padded),
    "getitem": _is_indexed,
    "index_select": _is_selected,
    "setitem": _is_set,
    "layer_norm": _with_parts(_is_normalised),
    "rms_norm": _with_parts(_is_normalised),
    "cross_entropy": _with_parts(_is_classified),
    "nll_loss": _with_parts(_is_classified),
    "one_hot": _with_parts(_is_one_hot),
    "embedding": _with_parts(_is_looked_up),
    # Where they draw, they have a rule.
    **dict.fromkeys(_DROPOUTS, _with_parts(lambda args, kwargs, parted: True)),
    "get": lambda args, kwargs, parted: False,  # of `.T` and the like; see `pack.Pack`
}
