"""Functions of torch that have a rule: each reads what the rule needs from its arguments.

As in `functions`: each is called with the pack, torch's function, and its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import name_of
from .rules import ADDMM, BATCH_NORM, BROADCAST, CONVOLUTION, EMBEDDING, GROUP_NORM, LAYER_NORM, LINEAR, RMS_NORM
from .verdicts import RefusedError

if TYPE_CHECKING:
    from .pack import Pack


def _tuple(value: Any, n: int) -> list[int] | None:
    if isinstance(value, int):
        return [value] * n
    return list(value) if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value) else None


def _concerns(pack: Pack, x: Any, *parameters: Any) -> bool:
    return (
        pack.tensors.has_part(x)
        and not any(pack.tensors.has_part(p) for p in parameters)
        and any(p is not None and pack.tensors.place(p) is not None for p in parameters)
    )


def _by_name(function: Callable[..., Any]) -> Callable[[Pack, Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A rule that reads its arguments by position or by name, as torch's function does."""
    return lambda pack, func, args, kwargs: function(pack, *args, **kwargs)


def _linear(pack: Pack, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _concerns(pack, input, weight, bias) or input.dim() < 2:
        return NotImplemented

    def call(x: Tensor, w: Tensor, b: Tensor | None, place: int = 0) -> Tensor:
        return F.linear(x, w, b)

    return pack.sites.layer(LINEAR, "linear", call, input, weight, bias)


def _addmm(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """GPT-2's Conv1D: bias + x @ weight."""
    if kwargs or len(args) != 3:
        return NotImplemented
    bias, x, weight = args
    if not _concerns(pack, x, weight, bias) or bias.dim() != 1:
        return NotImplemented

    def call(x: Tensor, w: Tensor, b: Tensor, place: int = 0) -> Tensor:
        return torch.addmm(b, x, w)

    return pack.sites.layer(ADDMM, "addmm", call, x, weight, bias)


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
        return pack.sites.layer(CONVOLUTION, name_of(func), call, x, weight, bias, **options)

    def rule(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "input" in kwargs:
            return NotImplemented
        return (both if transposed else plain)(pack, func, *args, **kwargs)

    return rule


def _embedding(
    pack: Pack,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    shared = not pack.tensors.has_parts((input, weight)) and pack.tensors.place(input) is None
    if max_norm is not None or sparse or not (shared or _concerns(pack, input, weight)):
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.size(0)

    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return F.embedding(x, w, padding_idx, None, norm_type, scale_grad_by_freq)

    options = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
    if shared:
        return _shared_embedding(pack, call, input, weight, options)
    return pack.sites.layer(EMBEDDING, "embedding", call, input, weight, None, casts=False, **options)


def _shared_embedding(
    pack: Pack, call: Callable[..., Tensor], indices: Tensor, weight: Tensor, options: dict[str, Any]
) -> Any:
    """An embedding of indices that all micro-batches share, such as positions."""
    place = pack.tensors.place(weight)
    if place is None or place < 0 or not torch.is_grad_enabled():
        return NotImplemented
    site = pack.sites.shared(EMBEDDING, "embedding", call, indices[None], weight, **options)
    return NotImplemented if site is None else pack.derived.looked_up(indices, weight, site)


def _layer_norm(
    pack: Pack,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not _concerns(pack, input, weight, bias) or input.dim() <= len(normalized_shape):
        return NotImplemented

    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        return F.layer_norm(x, normalized_shape, w, b, eps)

    return pack.sites.layer(
        LAYER_NORM, "layer_norm", call, input, weight, bias, casts=False, shape=list(normalized_shape), eps=eps
    )


def _rms_norm(
    pack: Pack, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if not _concerns(pack, input, weight) or input.dim() <= len(normalized_shape):
        return NotImplemented

    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return F.rms_norm(x, normalized_shape, w, eps)

    shape = list(normalized_shape)
    return pack.sites.layer(RMS_NORM, "rms_norm", call, input, weight, None, casts=False, shape=shape, eps=eps)


def _group_norm(
    pack: Pack,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    if not _concerns(pack, input, weight, bias) or not input.is_contiguous():
        return NotImplemented

    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        return F.group_norm(x, num_groups, w, b, eps)

    return pack.sites.layer(
        GROUP_NORM, "group_norm", call, input, weight, bias, casts=False, groups=num_groups, eps=eps
    )


def _broadcast(multiplies: bool) -> Callable[..., Any]:
    """A parameter that all samples are multiplied with, or that is added to them."""

    def rule(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
            return NotImplemented
        x, weight = args if pack.tensors.place(args[0]) is None else args[::-1]
        known = _concerns(pack, x, weight) and x.dtype == weight.dtype
        if not known or weight.dim() > x.dim() or (weight.dim() == x.dim() and weight.size(0) != 1):
            return NotImplemented
        if torch.broadcast_shapes(x.shape, weight.shape) != x.shape:
            return NotImplemented

        def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
            return x * w if multiplies else x + w

        name = "mul" if multiplies else "add"
        return pack.sites.layer(BROADCAST, name, call, x, weight, None, casts=False, multiplies=multiplies)

    return rule


def _batch_norm(
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
    mean, var = pack.shares.scratch_of(running_mean), pack.shares.scratch_of(running_var)
    if not pack.tensors.has_part(input) or (running_mean is not None and mean is None):
        raise RefusedError("a BatchNorm whose samples or statistics are not those of a micro-batch")
    if any(r is not None and not r.is_contiguous() for r in (mean, var)):
        raise RefusedError("a BatchNorm whose statistics are a part of a layer's")

    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        own = [None if r is None else r[place].data for r in (mean, var)]
        return F.batch_norm(x, own[0], own[1], w, b, True, momentum, eps)

    options: dict[str, Any] = {"mean": mean, "var": var, "momentum": momentum, "eps": eps}
    found = pack.sites.layer(BATCH_NORM, "batch_norm", call, input, weight, bias, casts=False, **options)
    if found is NotImplemented:
        return pack.apart(F.batch_norm, (input, running_mean, running_var, weight, bias, True, momentum, eps), {})
    return found


def _instance_norm(pack: Pack, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return pack.apart(func, args, kwargs)


LAYER_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.linear: _by_name(_linear),
    torch.addmm: _addmm,
    F.embedding: _by_name(_embedding),
    F.layer_norm: _by_name(_layer_norm),
    F.batch_norm: _by_name(_batch_norm),
    F.instance_norm: _instance_norm,
    F.rms_norm: _by_name(_rms_norm),
    torch.rms_norm: _by_name(_rms_norm),
    F.group_norm: _by_name(_group_norm),
}
LAYER_FUNCTIONS |= {
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
LAYER_FUNCTIONS |= dict.fromkeys(
    (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__), _broadcast(True)
)
LAYER_FUNCTIONS |= dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _broadcast(False))
