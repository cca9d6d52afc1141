"""Random values for trials, and how results are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from ..micro_batches import ALIGNMENT_BYTES

# A difference in the last bit shows in a few of a hundred values. So many are compared: drawn anew where a tensor is
# small.
ENOUGH_VALUES, MOST_DRAWS = 4096, 128
LOW_PRECISION = (torch.bfloat16, torch.float16)


def drawn_like(tensor: Tensor) -> Tensor:
    """Random values of a tensor's shape, type and layout in memory; itself if it holds no floating-point numbers.

    Some features are 0 in all samples, as behind a ReLU: kernels that differ in nothing else give such a feature's sums
    another sign.
    """
    if not tensor.is_floating_point():
        return tensor
    own = _laid_out_like(tensor).normal_()
    for dim in _features(own):
        own.mul_(_chosen(own, dim, 0.75))
    # Not as a view: torch's matmul takes another way for one that was made without a graph.
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
