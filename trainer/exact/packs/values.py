"""Random values for trials, and how results are compared.

Sums in another order differ in a few of a hundred values. In bfloat16 they differ in one of a million, because the
result is rounded once more. If large terms cancel, only rounding errors are left of a sum, and nearly every value shows
the order. So trials draw such values, too. In each dimension places are paired. In EVEN tensors both places of a pair
hold the same number, in ODD ones opposite numbers. A sum over products of an EVEN and an ODD tensor cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..micro_batches import ALIGNMENT_BYTES

# A difference in the last bit shows in a few of a hundred values. So ENOUGH_VALUES are compared: for a small tensor,
# values are drawn again, at most MOST_DRAWS times.
ENOUGH_VALUES, MOST_DRAWS = 4096, 128
LOW_PRECISION = (torch.bfloat16, torch.float16)
EVEN, ODD = 1, -1
# Terms that cancel have sizes from 2^-8 to 2^8: products of bfloat16 of one size are added without an error.
SPREAD = {torch.float16: 4.0}


def cancelling_like(tensor: Tensor, signs: int | Sequence[int], parts: int = 1) -> Tensor:
    """Values that cancel in sums, of a tensor's shape, type and layout; itself if it holds no floating-point numbers.

    Args:
        tensor: of which the values are.
        signs: EVEN or ODD, of all dimensions or of each.
        parts: micro-batches along the first dimension; pairs are within one.
    """
    if not tensor.is_floating_point():
        return tensor
    own = _laid_out_like(tensor)
    spread = SPREAD.get(own.dtype, 8.0)
    values = (
        torch.randn(own.shape, device=own.device)
        * torch.empty(own.shape, device=own.device).uniform_(-spread, spread).exp2_()
    )
    for dim, size in enumerate(own.shape):
        count = parts if dim == 0 and size % parts == 0 else 1
        sign = signs if isinstance(signs, int) else signs[dim]
        places, factors = _pairs(size, count, sign)
        shape = [size if d == dim else 1 for d in range(own.dim())]
        values = values.index_select(dim, places.to(own.device)) * factors.to(own.device).view(shape)
    own.copy_(values)
    return own.expand(tensor.shape).data.requires_grad_(tensor.requires_grad)


@lru_cache(maxsize=256)
def _pairs(size: int, parts: int, sign: int) -> tuple[Tensor, Tensor]:
    """For each place of a dimension: the place from which it takes its number, and the factor of that number.

    Pairs lie anywhere. If neighbours cancelled, every sum would be 0 on the way, in any order. A place without a
    partner is 0, unless it is the only one.
    """
    length = size // parts
    order = torch.randperm(length, generator=torch.Generator().manual_seed(length))
    half = length // 2
    places, factors = torch.arange(length), torch.ones(length)
    places[order[half : 2 * half]] = order[:half]
    factors[order[half : 2 * half]] = float(sign)
    if length > 1:
        factors[order[2 * half :]] = 0.0
    starts = torch.arange(parts).repeat_interleave(length) * length
    return places.repeat(parts) + starts, factors.repeat(parts)


def drawn_like(tensor: Tensor) -> Tensor:
    """Random values of a tensor's shape, type and layout in memory; itself if it holds no floating-point numbers.

    Some features are 0 in all samples, as behind a ReLU. Some kernels differ only there: they give the sums of such a
    feature another sign.
    """
    if not tensor.is_floating_point():
        return tensor
    own = _laid_out_like(tensor).normal_()
    for dim in _features(own):
        own.mul_(_chosen(own, dim, 0.75))
    # `.data`, so that it is not a view: torch's matmul takes another way for a view that was made without a graph.
    return own.expand(tensor.shape).data.requires_grad_(tensor.requires_grad)


def drawn_gradient(tensor: Tensor) -> Tensor:
    """Random values that lie in memory as a tensor does, which may be expanded; those of some features below 0."""
    own = _laid_out_like(tensor).normal_()
    for dim in _features(own):
        own.copy_(torch.where(_chosen(own, dim, 0.5) > 0, own, -own.abs()))
    return own.expand(tensor.shape)


def _laid_out_like(tensor: Tensor) -> Tensor:
    """Memory with a tensor's strides and start; an expanded dimension has size 1."""
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride())]
    start = start_of(tensor)
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, tensor.stride()))
    room = torch.empty(start + span, dtype=tensor.dtype, device=tensor.device)
    return room.as_strided(sizes, tensor.stride(), start)


def start_of(tensor: Tensor) -> int:
    """Where a tensor starts in memory, in elements past a place where a fresh tensor may start."""
    return int(tensor.storage_offset() % (ALIGNMENT_BYTES[tensor.device.type] // tensor.element_size()))


def _features(tensor: Tensor) -> set[int]:
    """The dimensions in which features may lie: the second and the last, unless they have few."""
    return {dim for dim in (1, tensor.dim() - 1) if 0 < dim < tensor.dim() and tensor.size(dim) > 3}


def _chosen(tensor: Tensor, dim: int, share: float) -> Tensor:
    """1 for a share of the places of a dimension, 0 for the others."""
    sizes = [1] * tensor.dim()
    sizes[dim] = tensor.size(dim)
    return torch.bernoulli(torch.full(sizes, share, dtype=torch.float32, device=tensor.device)).to(tensor.dtype)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same bits; waits for the device."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
