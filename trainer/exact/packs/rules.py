"""How layers are computed for several micro-batches at once, so that each keeps the bits of being computed alone.

A pack lays g micro-batches of one shape one after the other along the first dimension. An operation that treats each
sample by itself needs no rule. An operation that adds over samples does: the gradients of parameters, and BatchNorm. A
rule computes its forward and its gradient for the input in one operation for the pack. It gives one gradient of each
parameter a micro-batch, (g, *shape).

Nothing here is assumed to be exact. In a trial each rule is compared with its layer applied to one micro-batch at a
time, on the same inputs (`Site.check_*`), and what differs is computed one at a time from then on. See `pack`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers import Gradients, Rule, Site, cut

# ---- dense layers -------------------------------------------------------------------------------------------------


def _linear_forward(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    return site.call(x, weight, bias), ()


def _linear_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    out, into = grad.shape[-1], x.shape[-1]
    d, i = grad.reshape(site.g, -1, out), x.reshape(site.g, -1, into)  # (g, rows, out), (g, rows, into)
    dx = grad.reshape(-1, out).mm(weight).view(x.shape) if x.requires_grad else None
    dw = torch.bmm(d.transpose(1, 2), i) if site.weight is not None else None
    return dx, dw, d.sum(1) if site.bias is not None else None


def _addmm_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    d, i = grad.reshape(site.g, -1, grad.shape[-1]), x.reshape(site.g, -1, x.shape[-1])
    dx = grad.mm(weight.t()) if x.requires_grad else None
    dw = torch.bmm(i.transpose(1, 2), d) if site.weight is not None else None
    return dx, dw, d.sum(1) if site.bias is not None else None


# ---- convolutions --------------------------------------------------------------------------------------------------


def _convolution_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    o = site.options
    sizes = None if bias is None else [bias.numel()]
    rest = (sizes, o["stride"], o["padding"], o["dilation"], o["transposed"], o["output_padding"], o["groups"])
    back = torch.ops.aten.convolution_backward
    dx = back(grad, x, weight, *rest, [True, False, False])[0] if x.requires_grad else None
    mask = [False, site.weight is not None, site.bias is not None]
    if not any(mask):
        return dx, None, None
    # The weight's gradient for one micro-batch at a time, by the kernel that is used without packs.
    parts = [back(d, i, weight, *rest, mask) for d, i in zip(cut(grad, site.g), cut(x, site.g))]
    dw = torch.stack([part[1] for part in parts]) if mask[1] else None
    return dx, dw, torch.stack([part[2] for part in parts]) if mask[2] else None


def _grouped_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Gradients:
    o, g = site.options, site.g
    sizes = None if bias is None else [g * bias.numel()]
    back = torch.ops.aten.convolution_backward
    rest = (o["stride"], o["padding"], o["dilation"], o["transposed"], o["output_padding"])
    dx = None
    if x.requires_grad:
        plain_sizes = None if bias is None else [bias.numel()]
        dx = back(grad, x, weight, plain_sizes, *rest, o["groups"], [True, False, False])[0]
    mask = [False, site.weight is not None, site.bias is not None]
    if not any(mask):
        return dx, None, None
    # A convolution in which each micro-batch has channels of its own: one kernel gives the weight's gradients of all.
    # Only the shape of the weight matters here, so `wide` holds no values.
    wide = weight.new_empty(g * weight.size(0), *weight.shape[1:])
    _, dw, db = back(_beside(grad, g), _beside(x, g), wide, sizes, *rest, g * o["groups"], mask)
    return dx, dw.view(g, *weight.shape) if mask[1] else None, db.view(g, -1) if mask[2] else None


# ---- embeddings ----------------------------------------------------------------------------------------------------


def _embedding_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: None) -> Gradients:
    (V, _), g, o = weight.shape, site.g, site.options
    # A table g times as long, in which each micro-batch has its own V rows.
    rows = x.reshape(g, -1) + torch.arange(g, device=x.device)[:, None] * V
    wide = torch.ops.aten.embedding_dense_backward(
        grad.reshape(g, -1, grad.shape[-1]), rows, g * V, -1, o["scale_grad_by_freq"]
    ).view(g, *weight.shape)
    if o["padding_idx"] is not None:
        wide[:, o["padding_idx"]].zero_()
    return None, wide, None


# ---- normalisation -------------------------------------------------------------------------------------------------


def _layer_norm_forward(
    site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, mean, rstd = torch.ops.aten.native_layer_norm(x, site.options["shape"], weight, bias, site.options["eps"])
    return y, (mean, rstd)


def _layer_norm_backward(
    site: Site, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Gradients:
    back, shape, g = torch.ops.aten.native_layer_norm_backward, site.options["shape"], site.g
    dx = back(grad, x, shape, mean, rstd, weight, bias, [True, False, False])[0] if x.requires_grad else None
    mask = [False, site.weight is not None, site.bias is not None]
    pieces = zip(cut(grad, g), cut(x, g), cut(mean, g), cut(rstd, g))
    parts = [back(d, i, shape, mu, r, weight, bias, mask) for d, i, mu, r in pieces]
    dw = torch.stack([part[1] for part in parts]) if mask[1] else None
    return dx, dw, torch.stack([part[2] for part in parts]) if mask[2] else None


def _rms_norm_forward(site: Site, x: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, tuple[Tensor, ...]]:
    y, rstd = torch.ops.aten._fused_rms_norm(x, site.options["shape"], weight, site.options["eps"])
    return y, (rstd,)


def _rms_norm_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: None, rstd: Tensor) -> Gradients:
    back, shape, g = torch.ops.aten._fused_rms_norm_backward, site.options["shape"], site.g
    dx = back(grad, x, shape, rstd, weight, [True, False])[0] if x.requires_grad else None
    pieces = zip(cut(grad, g), cut(x, g), cut(rstd, g))
    return dx, torch.stack([back(d, i, shape, r, weight, [False, True])[1] for d, i, r in pieces]), None


def _two_step_rms_norm_forward(site: Site, x: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, tuple[Tensor, ...]]:
    return F.rms_norm(x, site.options["shape"], None, site.options["eps"]) * weight, ()


def _two_step_rms_norm_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: None) -> Gradients:
    # Without a fused kernel, torch multiplies by the weight last, too.
    with torch.enable_grad():
        own = x.detach().requires_grad_(x.requires_grad)
        scaled = F.rms_norm(own, site.options["shape"], None, site.options["eps"])
    dx = torch.autograd.grad(scaled, own, grad * weight)[0] if x.requires_grad else None
    sums = [_summed_to(part, weight, first=0) for part in cut(grad * scaled.detach(), site.g)]
    return dx, torch.stack(sums).view(site.g, *weight.shape), None


def _group_norm_forward(
    site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    N, C, o = x.size(0), x.size(1), site.options
    y, mean, rstd = torch.ops.aten.native_group_norm(x, weight, bias, N, C, x[0, 0].numel(), o["groups"], o["eps"])
    return y, (mean, rstd)


def _group_norm_backward(
    site: Site, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Gradients:
    back, g, sizes = torch.ops.aten.native_group_norm_backward, site.g, (x.size(1), x[0, 0].numel())
    groups, mask = site.options["groups"], [False, site.weight is not None, site.bias is not None]
    # The kernel reads the gradient as if it were contiguous.
    grad = grad.contiguous()
    dx = None
    if x.requires_grad:
        dx = back(grad, x, mean, rstd, weight, x.size(0), *sizes, groups, [True, False, False])[0]
    pieces = zip(cut(grad, g), cut(x, g), cut(mean, g), cut(rstd, g))
    parts = [back(d, i, mu, r, weight, i.size(0), *sizes, groups, mask) for d, i, mu, r in pieces]
    dw = torch.stack([part[1] for part in parts]) if mask[1] else None
    return dx, dw, torch.stack([part[2] for part in parts]) if mask[2] else None


def _beside(x: Tensor, g: int) -> Tensor:
    """(g m, C, ...) -> (m, g C, ...): the channels of a micro-batch lie beside another's, as channels of their own."""
    return x.view(g, -1, *x.shape[1:]).transpose(0, 1).reshape(len(x) // g, -1, *x.shape[2:])


def _apart(y: Tensor, g: int) -> Tensor:
    """(m, g C, ...) -> (g m, C, ...)."""
    return y.view(len(y), g, -1, *y.shape[2:]).transpose(0, 1).reshape(g * len(y), -1, *y.shape[2:])


def _repeated(weight: Tensor | None, bias: Tensor | None, g: int) -> tuple[Tensor | None, Tensor | None]:
    """(C,) -> (g C,), by one kernel where it can be."""
    if weight is None or bias is None or weight.dtype != bias.dtype:
        w, b = (None if p is None else p.repeat(g) for p in (weight, bias))
        return w, b
    both = torch.cat((weight.expand(g, -1), bias.expand(g, -1))).view(2, -1)
    return both[0], both[1]


def _batch_norm_forward(
    site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    o, g = site.options, site.g
    w, b = _repeated(weight, bias, g)
    # Each micro-batch's statistics go to its own row of scratch memory.
    own = [None if rows is None else rows.view(-1) for rows in (o["mean"], o["var"])]
    x = _beside(x, g)
    y, mean, rstd = torch.ops.aten.native_batch_norm(x, w, b, *own, True, o["momentum"], o["eps"])
    saved = (x, mean, rstd) if w is None else (x, mean, rstd, w)
    # A copy and not a view, because the task may change it in place.
    return _apart(y, g), saved


def _batch_norm_backward(
    site: Site,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    beside: Tensor,
    mean: Tensor,
    rstd: Tensor,
    w: Tensor | None = None,
) -> Gradients:
    g = site.g
    mask = [True, site.weight is not None, site.bias is not None]
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(
        _beside(grad, g), beside, w, None, None, mean, rstd, True, site.options["eps"], mask
    )
    return _apart(dx, g), dw.view(g, -1) if mask[1] else None, db.view(g, -1) if mask[2] else None


# ---- parameters that are multiplied with or added to samples ---------------------------------------------------------


def _broadcast_forward(site: Site, x: Tensor, weight: Tensor, bias: None) -> tuple[Tensor, tuple[Tensor, ...]]:
    return site.call(x, weight, None), ()


def _broadcast_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: None) -> Gradients:
    by = grad * x if site.options["multiplies"] else grad
    sums = _summed_to(by.reshape(site.g, -1, *by.shape[1:]), weight, first=1)
    return _broadcast_input(site, grad, weight), sums.view(site.g, *weight.shape), None


def _broadcast_apart_backward(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: None) -> Gradients:
    by = grad * x if site.options["multiplies"] else grad
    sums = torch.stack([_summed_to(part, weight, first=0) for part in cut(by, site.g)])
    return _broadcast_input(site, grad, weight), sums.view(site.g, *weight.shape), None


def _broadcast_input(site: Site, grad: Tensor, weight: Tensor) -> Tensor:
    return grad * weight if site.options["multiplies"] else grad


def _summed_to(by: Tensor, weight: Tensor, first: int) -> Tensor:
    """Sums over the dimensions from `first` on in which a parameter is broadcast, as autograd does."""
    ahead = by.dim() - first - weight.dim()
    dims = [first + d for d in range(ahead)]
    dims += [first + ahead + d for d, size in enumerate(weight.shape) if size == 1 != by.size(first + ahead + d)]
    return by.sum(dims, keepdim=True) if dims else by


# For each kind of layer the rules that may do, the one with the fewest operators first. A trial takes the fastest of
# those that are exact. Where none is, the layer is computed one micro-batch at a time.
LINEAR = (Rule(_linear_forward, _linear_backward),)
ADDMM = (Rule(_linear_forward, _addmm_backward),)
CONVOLUTION = (Rule(_linear_forward, _grouped_backward), Rule(_linear_forward, _convolution_backward))
EMBEDDING = (Rule(_linear_forward, _embedding_backward),)
LAYER_NORM = (Rule(_layer_norm_forward, _layer_norm_backward),)
RMS_NORM = (
    Rule(_rms_norm_forward, _rms_norm_backward),
    Rule(_two_step_rms_norm_forward, _two_step_rms_norm_backward),
)
GROUP_NORM = (Rule(_group_norm_forward, _group_norm_backward),)
BROADCAST = (Rule(_broadcast_forward, _broadcast_backward), Rule(_broadcast_forward, _broadcast_apart_backward))
BATCH_NORM = (Rule(_batch_norm_forward, _batch_norm_backward, needs_input=False),)
