"""A layer in a pack: by a rule, compared with the layer applied to one micro-batch at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..micro_batches import ALIGNMENT_BYTES
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
from .verdicts import out_of_memory

if TYPE_CHECKING:
    from .sites import Sites

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of the input; of weight and bias, (g, *shape)


def name_of(func: Any) -> str:
    """The name of a function, for messages and keys."""
    return func if isinstance(func, str) else getattr(func, "__name__", str(func))


class Rule(NamedTuple):
    """How a kind of layer is computed for a pack.

    Attributes:
        forward: (site, x, weight, bias) -> (output, tensors that backward needs).
        backward: (site, gradient of the output, x, weight, bias, those tensors) -> gradients.
        needs_input: whether backward looks at x. A rule that does not copies the gradient into a new layout. It is only
            for gradients with the output's strides, because torch may take another way for others.
    """

    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[..., Gradients]
    needs_input: bool = True


class Site:
    """One use of a layer's function in a packed forward.

    Args:
        sites: the layers of the pack under way.
        rule: of the function.
        call: the plain function of (x, weight, bias), of a pack or of one micro-batch.
        key: names the place, for what trials find out.
        weight, bias: their numbers among the parameters; None for one that is not trained or not there.
    """

    def __init__(
        self,
        sites: Sites,
        rule: Rule,
        call: Callable[..., Tensor],
        key: tuple[Any, ...],
        weight: int | None,
        bias: int | None,
        **options: Any,
    ) -> None:
        self.sites, self.rule, self.call, self.key = sites, rule, call, key
        self.weight, self.bias, self.options = weight, bias, options
        self.output_shape: Sequence[int] = ()  # in a trial

    @property
    def g(self) -> int:
        """Micro-batches in the pack."""
        return self.sites.g

    def alone(self, grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """The gradients by plain autograd, one micro-batch at a time."""
        dx, rows = [], ([], [])  # type: ignore[var-annotated]
        wanted = (self.weight is not None, self.bias is not None)
        for k, (d, i) in enumerate(zip(cut(grad, self.g), cut(x, self.g))):
            with torch.enable_grad():
                i = i.detach().requires_grad_(i.is_floating_point())
                own = [p if p is None else p.detach().requires_grad_(w) for p, w in zip((weight, bias), wanted)]
                y = self.call(i, *own, place=k)
                inputs = ([i] if i.requires_grad else []) + [p for p, w in zip(own, wanted) if w and p is not None]
                found = list(torch.autograd.grad(y, inputs, d))
            if i.requires_grad:
                dx.append(found.pop(0))
            for list_, w in zip(rows, wanted):
                if w:
                    list_.append(found.pop(0))
        stacked = [torch.stack(r) if r else None for r in rows]
        return (torch.cat(dx) if dx else None), stacked[0], stacked[1]

    def differs(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor | None = None) -> bool:
        """Whether the rule gives other bits than one micro-batch at a time, of random values of these shapes.

        Args:
            x, weight, bias: of the layer.
            like: how the gradient of the output lies in memory; None if as the output does.
        """
        if x.dtype in LOW_PRECISION:
            # In low precision, sums in another order are nearly always rounded to the same bits. In float32 they show.
            wide: list[Any] = [None if t is None else t.float() for t in (x, weight, bias)]
            with torch.autocast(x.device.type, enabled=False):
                if self.differs(wide[0], wide[1], wide[2], None if like is None else like.float()):
                    return True
        zero = None if weight is None or weight.any() else torch.zeros_like(weight)  # as LoRA begins
        if zero is not None and self._differs_for([drawn_like(x), zero, _drawn(bias)], like):
            return True
        for sign in (EVEN, ODD):
            own: list[Any] = [cancelling_like(x, sign, self.g), *(_cancelling(p, -sign) for p in (weight, bias))]
            if self._differs_for(own, like, sign):
                return True
        compared = 0
        for _ in range(MOST_DRAWS):
            if self._differs_for([_drawn(t) for t in (x, weight, bias)], like):
                return True
            compared += min(math.prod(self.output_shape), x.numel())
            if compared > ENOUGH_VALUES:
                break
        return False

    def _differs_for(self, own: list[Any], like: Tensor | None, sign: int | None = None) -> bool:
        """Whether the rule gives other bits for these values of x, weight and bias.

        Args:
            own: the values.
            like: as for `differs`.
            sign: that of x, where the values cancel: the gradient is drawn so that it cancels with x over samples, and
                with the weight over features.
        """
        y, saved = self.rule.forward(self, *own)
        self.output_shape = y.shape
        if not same_bits(y, torch.cat([self.call(i, *own[1:], place=k) for k, i in enumerate(cut(own[0], self.g))])):
            return True
        like = y if like is None else like
        grad = drawn_gradient(like)
        if sign is not None:
            grad = cancelling_like(like.detach(), [-sign, *[sign] * (like.dim() - 1)], self.g)
        found = self.rule.backward(self, grad, *own, *saved)
        return not all(same_bits(a, b) for a, b in zip(found, self.alone(grad, *own)) if a is not None)

    def backward_s(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> float:
        """Seconds that the rule's backward takes, the shortest of some; infinity where a device has no such kernel."""
        own: list[Any] = [None if t is None else drawn_like(t) for t in (x, weight, bias)]
        times: list[float] = []
        try:
            y, saved = self.rule.forward(self, *own)
            grad = drawn_gradient(y)
            for _ in range(3):
                _wait_for(x)
                began_s = time.perf_counter()
                self.rule.backward(self, grad, *own, *saved)
                _wait_for(x)
                times.append(time.perf_counter() - began_s)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return math.inf
        return min(times)


def _drawn(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else drawn_like(tensor)


def _cancelling(tensor: Tensor | None, sign: int) -> Tensor | None:
    return None if tensor is None else cancelling_like(tensor, sign)


def _wait_for(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class Layer(torch.autograd.Function):
    """A layer in a pack: leaves the parameters' gradients with the pack, one a micro-batch."""

    @staticmethod
    def forward(ctx: Any, site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The pack's output."""
        y, saved = site.rule.forward(site, x, weight, bias)
        ctx.site = site
        kept = x if site.rule.needs_input else None
        ctx.save_for_backward(kept, weight, bias, *saved)
        ctx.strides = y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None]:
        """The input's gradient; none for the parameters, whose gradients the pack has taken."""
        site: Site = ctx.site
        x, weight, bias, *saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            # A sum over samples goes through memory in the order of strides. So a trial compares with these, too.
            if x is None and grad.stride() != ctx.strides:
                site.sites.set_alone(site)
            if x is None or grad.stride() == ctx.strides or site.sites.holds(site, grad, x, weight, bias):
                dx, *rows = site.rule.backward(site, grad, x, weight, bias, *saved)
            else:
                dx, *rows = site.alone(grad, x, weight, bias)
            for index, row in zip((site.weight, site.bias), rows):
                if index is not None:
                    assert row is not None
                    # The pack adds to these gradients in place, so nothing else may use their memory.
                    there = row.untyped_storage().data_ptr()
                    shared = any(
                        t is not None and t.untyped_storage().data_ptr() == there for t in (grad, dx, x, weight)
                    )
                    site.sites.leaves.put(index, row.clone() if shared else row)
        return None, dx if ctx.needs_input_grad[1] else None, None, None


def own_strides(tensor: Tensor, g: int) -> tuple[int, ...]:
    """The strides of a micro-batch's own tensor, if it is made as the pack's was.

    A dimension with a larger stride than the first goes over all samples, as the time steps of a recurrent layer's
    output do. In a micro-batch's own tensor its stride is g times smaller.
    """
    first = tensor.stride(0)
    if first == 0 or tensor.is_contiguous():
        return tensor.stride()
    return tuple(s // g if s > first and s % g == 0 else s for s in tensor.stride())


def piece(tensor: Tensor, k: int, g: int) -> Tensor:
    """Micro-batch k's part of a pack's tensor, laid out in memory as its own tensor would be.

    A piece that starts or is strided in another way is copied: a matrix product may give it other bits.
    """
    size = tensor.size(0) // g
    own, strides = tensor.narrow(0, k * size, size), own_strides(tensor, g)
    if strides == own.stride() and start_of(own) == start_of(tensor):
        return own
    return _copies(own[None], strides, start_of(tensor))[0]


def cut(tensor: Tensor, g: int) -> list[Tensor]:
    """The parts of a pack's micro-batches, as from `piece`."""
    own, strides, alignment = tensor.chunk(g), own_strides(tensor, g), ALIGNMENT_BYTES[tensor.device.type]
    distance = own[-1].storage_offset() - own[0].storage_offset()
    if strides == tensor.stride() and distance * tensor.element_size() % (alignment * max(1, g - 1)) == 0:
        return list(own)
    return laid_apart(tensor, g)


def laid_apart(tensor: Tensor, g: int) -> list[Tensor]:
    """Copies of the parts of a pack's micro-batches, each as good as a tensor of its own, made by one kernel."""
    return _copies(tensor.unflatten(0, (g, -1)), own_strides(tensor, g), start_of(tensor))


def _copies(parts: Tensor, strides: tuple[int, ...], start: int) -> list[Tensor]:
    """Copies of (count, ...) in shared memory, each with these strides, and so far past a fresh tensor's place."""
    shape = parts.shape[1:]
    for dim, stride in enumerate(strides, start=1):
        if stride == 0:
            parts = parts.narrow(dim, 0, 1)  # expanded: memory holds it once, and so does the copy
    count, *sizes = parts.shape
    alignment = ALIGNMENT_BYTES[parts.device.type] // parts.element_size()
    span = start + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))
    distance = -(-span // alignment) * alignment
    room = torch.empty(count * distance, dtype=parts.dtype, device=parts.device)
    copies = room.as_strided((count, *sizes), (distance, *strides), start)
    copies.copy_(parts)
    # `.data`, so that they are no views: torch would not let a function change these in place.
    return [copy.expand(shape).data for copy in copies.unbind()]


def put_pieces(tensor: Tensor, pieces: list[Tensor]) -> None:
    """Writes back what was changed in pieces, where they are copies."""
    if all(own.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for own in pieces):
        return
    torch._foreach_copy_(tensor.chunk(len(pieces)), pieces)


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors of micro-batches as the pack's, with their order of strides: dropout draws in the order of memory."""
    if all(own.is_contiguous() for own in pieces):
        return torch.cat(pieces)  # type: ignore[arg-type]
    strides = pieces[0].stride()
    if any(stride == 0 and size > 1 for stride, size in zip(strides, pieces[0].shape)):
        # An expanded dimension has no place in the order of strides: what follows from it keeps that of the dimensions.
        return torch.cat(pieces).contiguous()  # type: ignore[arg-type]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    whole = torch.cat([own.permute(order).contiguous() for own in pieces], dim=order.index(0))
    return whole.permute([order.index(dim) for dim in range(len(order))])


class Cut(torch.autograd.Function):
    """A pack's tensor as those of its micro-batches, each with memory and, in the backward, a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, g: int) -> tuple[Tensor, ...]:
        """The pieces, copied: they may be changed in place."""
        return tuple(laid_apart(tensor, g))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradients, one after the other."""
        return joined(grads), None


class Join(torch.autograd.Function):
    """The tensors of micro-batches as the pack's. torch.cat would hand back gradients that start anywhere."""

    @staticmethod
    def forward(ctx: Any, *pieces: Tensor) -> Tensor:
        """One after the other."""
        return joined(pieces)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Each micro-batch's gradient, as good as one of its own."""
        return tuple(cut(grad, len(ctx.needs_input_grad)))
