"""What torch's functions mean for a pack: which have a rule, draw random numbers, or are read by the host.

A function here is called as (pack, torch's function, its arguments). It returns NotImplemented where the function needs
nothing special.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import ADDMM, BATCH_NORM, CONVOLUTION, EMBEDDING, LAYER_NORM, LINEAR, cut, put_pieces

if TYPE_CHECKING:
    from .pack import Pack


class RefusedError(Exception):
    """This pack cannot be computed as one.

    Attributes:
        parameters: of the function that refuses; their module may be computed one micro-batch at a time instead.
        once: only this pack: the next may have no such trouble.
    """

    def __init__(self, what: str, parameters: Sequence[int] = (), once: bool = False) -> None:
        super().__init__(what)
        self.parameters, self.once = tuple(parameters), once


def name_of(func: Any) -> str:
    """The name of a function, for messages and keys."""
    return func if isinstance(func, str) else getattr(func, "__name__", str(func))


def _tuple(value: Any, n: int) -> list[int] | None:
    if isinstance(value, int):
        return [value] * n
    return list(value) if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value) else None


def _concerns(pack: Pack, x: Any, *parameters: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and pack.has_part(x)
        and any(p is not None and pack.place(p) is not None for p in parameters)
    )


def _linear(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _call_linear(pack, *args, **kwargs)


def _call_linear(pack: Pack, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _concerns(pack, input, weight, bias):
        return NotImplemented

    def call(x: Tensor, w: Tensor, b: Tensor | None, place: int = 0) -> Tensor:
        return F.linear(x, w, b)

    return pack.layer(LINEAR, "linear", call, input, weight, bias)


def _addmm(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """GPT-2's Conv1D: bias + x @ weight."""
    if kwargs or len(args) != 3:
        return NotImplemented
    bias, x, weight = args
    if not _concerns(pack, x, weight, bias) or bias.dim() != 1:
        return NotImplemented

    def call(x: Tensor, w: Tensor, b: Tensor, place: int = 0) -> Tensor:
        return torch.addmm(b, x, w)

    return pack.layer(ADDMM, "addmm", call, x, weight, bias)


def _convolution(n: int, transposed: bool) -> Callable[..., Any]:
    def plain(
        pack: Pack, func: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        return both(pack, func, x, weight, bias, stride, padding, 0, groups, dilation)

    def both(
        pack: Pack, func: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        names = ("stride", "padding", "output_padding", "dilation")
        options: dict[str, Any] = dict(zip(names, (_tuple(v, n) for v in (stride, padding, output_padding, dilation))))
        if None in options.values() or not _concerns(pack, x, weight, bias) or x.dim() != n + 2:
            return NotImplemented
        o = options

        def call(x: Tensor, w: Tensor, b: Tensor | None, place: int = 0) -> Tensor:
            rest = (o["stride"], o["padding"], o["dilation"], transposed, o["output_padding"], groups)
            return torch.convolution(x, w, b, *rest)

        options |= {"groups": groups, "transposed": transposed}
        return pack.layer(CONVOLUTION, name_of(func), call, x, weight, bias, **options)

    def rule(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "input" in kwargs:
            return NotImplemented
        return (both if transposed else plain)(pack, func, *args, **kwargs)

    return rule


def _embedding(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _call_embedding(pack, *args, **kwargs)


def _call_embedding(
    pack: Pack,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or sparse or not _concerns(pack, input, weight):
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.size(0)

    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return F.embedding(x, w, padding_idx, None, norm_type, scale_grad_by_freq)

    options = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    return pack.layer(EMBEDDING, "embedding", call, input, weight, None, casts=False, **options)


def _layer_norm(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _call_layer_norm(pack, *args, **kwargs)


def _call_layer_norm(
    pack: Pack,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not _concerns(pack, input, weight, bias):
        return NotImplemented

    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        return F.layer_norm(x, normalized_shape, w, b, eps)

    return pack.layer(
        LAYER_NORM, "layer_norm", call, input, weight, bias, casts=False, shape=list(normalized_shape), eps=eps
    )


def _batch_norm(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _call_batch_norm(pack, *args, **kwargs)


def _call_batch_norm(
    pack: Pack,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if not training:
        return NotImplemented
    mean, var = pack.scratch_of(running_mean), pack.scratch_of(running_var)
    if not pack.has_part(input) or (running_mean is not None and mean is None):
        raise RefusedError("a BatchNorm whose samples or statistics are not those of a micro-batch")

    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        own = [None if r is None else r[place].data for r in (mean, var)]
        return F.batch_norm(x, own[0], own[1], w, b, True, momentum, eps)

    options: dict[str, Any] = {"mean": mean, "var": var, "momentum": momentum, "eps": eps}
    found = pack.layer(BATCH_NORM, "batch_norm", call, input, weight, bias, casts=False, **options)
    if found is NotImplemented:
        return pack.apart(F.batch_norm, (input, running_mean, running_var, weight, bias, True, momentum, eps), {})
    return found


def _instance_norm(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return pack.apart(func, args, kwargs)


def _dropout(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _call_dropout(pack, func, *args, **kwargs)


def _call_dropout(
    pack: Pack, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0.0:
        return NotImplemented
    _needs_part(pack, func, input)
    if input.device.type != "cpu" or p == 1.0 or not input.is_contiguous():
        return pack.apart(F.dropout, (input, p, True), {}, random=True)
    # As torch's dropout on the CPU: only the draws are one micro-batch at a time.
    noise = torch.empty_like(input)
    pieces = cut(noise, pack.g)
    for k in pack.each_stream():
        pieces[k].bernoulli_(1 - p)
    put_pieces(noise, pieces)
    return input * noise.div_(1 - p)


def _other_dropout(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    training = kwargs.get("training", args[2] if len(args) > 2 else func is not F.alpha_dropout)
    if not training:
        return NotImplemented
    _needs_part(pack, func, args[0])
    return pack.apart(func, args, kwargs, random=True)


def _attention(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) == 0.0:
        return NotImplemented
    return pack.apart(func, args, kwargs, random=True)


def _drawn(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Random numbers of the shape of an argument, or of a shape whose first number is that of the samples."""
    if kwargs.get("generator") is not None:
        raise RefusedError(f"{name_of(func)} with a generator of its own")
    return pack.apart(func, args, kwargs, random=True) if pack.has_parts((args, kwargs)) else NotImplemented


def _drawn_in_place(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plain = pack.has_part(args[0]) and args[0].is_contiguous() and not args[0].requires_grad
    if kwargs.get("generator") is not None or not plain:
        raise RefusedError(f"{name_of(func)}, whose numbers are not those of a micro-batch")
    rest = [(pack.part(args[1:], k), pack.part(kwargs, k)) for k in range(pack.g)]
    pieces = cut(args[0], pack.g)
    for k in pack.each_stream():
        func(pieces[k], *rest[k][0], **rest[k][1])
    put_pieces(args[0], pieces)
    return args[0]


def _needs_part(pack: Pack, func: Any, x: Any) -> None:
    if not (isinstance(x, Tensor) and pack.has_part(x)):
        raise RefusedError(f"{name_of(func)} of something that no micro-batch has a part of")


def _reduction(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A whole tensor's number, which the host may read."""
    if len(args) != 1 or set(kwargs) - {"dtype"} or not isinstance(args[0], Tensor) or not pack.has_part(args[0]):
        return NotImplemented
    return pack.reduced(func, args, kwargs)


def _read(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return pack.read(func, args, kwargs)


def _shape_follows_values(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RefusedError(f"{name_of(func)}: the shape of what it returns depends on values")


def _where(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return NotImplemented if len(args) + len(kwargs) > 1 else _shape_follows_values(pack, func, args, kwargs)


def _index(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    places = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(p, Tensor) and p.dtype in (torch.bool, torch.uint8) for p in places):
        raise RefusedError("an index of booleans: the shape of what it gives depends on values")
    return NotImplemented


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    Tensor.__getitem__: _index,
    torch.where: _where,
}
FUNCTIONS |= {
    function: _convolution(n, transposed)
    for n, transposed, function in (
        (1, False, F.conv1d),
        (2, False, F.conv2d),
        (3, False, F.conv3d),
        (1, True, F.conv_transpose1d),
        (2, True, F.conv_transpose2d),
        (3, True, F.conv_transpose3d),
    )
}
FUNCTIONS |= dict.fromkeys(
    (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), _other_dropout
)
FUNCTIONS |= dict.fromkeys(
    (
        torch.rand,
        torch.randn,
        torch.randint,
        torch.rand_like,
        torch.randn_like,
        torch.randint_like,
        torch.bernoulli,
        torch.normal,
        torch.poisson,
        Tensor.bernoulli,
        torch.multinomial,
        Tensor.multinomial,
    ),
    _drawn,
)
FUNCTIONS |= dict.fromkeys(
    (Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.random_, Tensor.log_normal_),
    _drawn_in_place,
)
FUNCTIONS |= dict.fromkeys(
    (
        torch.all,
        Tensor.all,
        torch.any,
        Tensor.any,
        torch.max,
        Tensor.max,
        torch.min,
        Tensor.min,
        torch.sum,
        Tensor.sum,
        torch.amax,
        Tensor.amax,
        torch.count_nonzero,
        Tensor.count_nonzero,
    ),
    _reduction,
)
FUNCTIONS |= dict.fromkeys(
    (
        Tensor.__bool__,
        Tensor.item,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__array__,
        torch.equal,
        Tensor.equal,
        torch.allclose,
        Tensor.allclose,
        Tensor.__contains__,
    ),
    _read,
)
FUNCTIONS |= dict.fromkeys(
    (
        torch.nonzero,
        Tensor.nonzero,
        torch.argwhere,
        Tensor.argwhere,
        torch.masked_select,
        Tensor.masked_select,
        torch.unique,
        Tensor.unique,
        torch.unique_consecutive,
        Tensor.unique_consecutive,
        torch.bincount,
        Tensor.bincount,
        torch.repeat_interleave,
        Tensor.repeat_interleave,
    ),
    _shape_follows_values,
)
