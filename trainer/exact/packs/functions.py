"""Functions of torch that a pack treats in a special way: they have a rule, draw random numbers, or read values.

Each function here is called with the pack, torch's function, and its arguments. It returns NotImplemented if torch's
function needs nothing special.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer_functions import LAYER_FUNCTIONS
from .layers import cut, name_of, put_pieces
from .verdicts import RefusedError

if TYPE_CHECKING:
    from .pack import Pack


def _dropout(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _call_dropout(pack, func, *args, **kwargs)


def _call_dropout(
    pack: Pack, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Any:
    if not training or p == 0.0:
        return NotImplemented
    _needs_part(pack, func, input)
    on_cpu = input.device.type == "cpu"
    if p == 1.0 or not input.is_contiguous() or not (on_cpu or input.dtype == torch.float32):
        return pack.apart(F.dropout, (input, p, True), {}, random=True)
    # The same operations as torch's dropout. Only the draws are made for one micro-batch at a time.
    if not on_cpu:
        # A GPU's kernel multiplies by 0 or 1, then by the scale. Applied to ones, it returns these factors.
        ones = torch.ones_like(input[: len(input) // pack.g])
        return input * torch.cat([pack.drawn(k, F.dropout, ones, p, True) for k in range(pack.g)])
    noise = torch.empty_like(input)
    pieces = cut(noise, pack.g)
    for k in range(pack.g):
        pieces[k].bernoulli_(1 - p, generator=pack.generator(k, input.device))
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
    """Random numbers of the shape of an argument."""
    if kwargs.get("generator") is not None:
        raise RefusedError(f"{name_of(func)} with a generator of its own")
    return pack.apart(func, args, kwargs, random=True)


def _drawn_in_place(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plain = pack.tensors.has_part(args[0]) and args[0].is_contiguous() and not args[0].requires_grad
    if kwargs.get("generator") is not None or not plain:
        raise RefusedError(f"{name_of(func)}, whose numbers are not those of a micro-batch")
    rest = [(pack.shares.part(args[1:], k), pack.shares.part(kwargs, k)) for k in range(pack.g)]
    pieces = cut(args[0], pack.g)
    for k in range(pack.g):
        func(pieces[k], *rest[k][0], **rest[k][1] | {"generator": pack.generator(k, pieces[k].device)})
    put_pieces(args[0], pieces)
    return args[0]


def _needs_part(pack: Pack, func: Any, x: Any) -> None:
    if not (isinstance(x, Tensor) and pack.tensors.has_part(x)):
        raise RefusedError(
            f"{name_of(func)} gets a tensor that is the same for all micro-batches, and each draws its own numbers"
        )


def _read(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return pack.read(func, args, kwargs)


def _shape_follows_values(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RefusedError(f"{name_of(func)}: the shape of what it returns depends on values")


def _where(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return NotImplemented if len(args) + len(kwargs) > 1 else _shape_follows_values(pack, func, args, kwargs)


def _index(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    places = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(pack.tensors.has_part(p) and p.dtype in (torch.bool, torch.uint8) for p in places):
        raise RefusedError("an index of booleans: the shape of what it gives depends on values")
    return NotImplemented


# Functions that are given BatchNorm's scratch memory.
HAS_STATISTICS = frozenset((F.batch_norm, F.instance_norm))
# Functions that draw random numbers and return them.
DRAWN = frozenset(
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
    )
)
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    Tensor.__getitem__: _index,
    torch.where: _where,
}
FUNCTIONS |= LAYER_FUNCTIONS
FUNCTIONS |= dict.fromkeys(
    (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), _other_dropout
)
FUNCTIONS |= dict.fromkeys(DRAWN, _drawn)
FUNCTIONS |= dict.fromkeys(
    (Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.random_, Tensor.log_normal_),
    _drawn_in_place,
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
    ),
    _shape_follows_values,
)
