"""Whether an augmentation may see several micro-batches at once. How many it sees depends on the number of ranks.

On the CPU, torch's vectorised kernels compute the last elements of a tensor with different code from the rest. So in
sigmoid, pow, gelu and others an element can have other bits in a tensor of another size. Matrix products choose their
kernel by the number of rows. A comparison of values would find this only by chance. So the called operators decide.
Allowed are operators that move values, and elementwise arithmetic that IEEE 754 rounds correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..exact.checks.hashes import bytes_of

_VIEWS = """
    alias as_strided detach diagonal expand lift_fresh movedim narrow permute select slice split split_with_sizes
    squeeze t transpose unbind unfold unsqueeze view _reshape_alias _unsafe_view
"""
_MOVES = """
    arange broadcast_to cat clone constant_pad_nd copy empty empty_like empty_strided fill flip full full_like gather
    index index_put index_select lift masked_fill new_empty new_full new_ones new_zeros ones ones_like reflection_pad1d
    reflection_pad2d repeat replication_pad1d replication_pad2d roll rot90 scalar_tensor scatter stack take where zero
    zeros zeros_like _local_scalar_dense _to_copy
"""
_ARITHMETIC = """
    abs add bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max
    clamp_min div eq floor ge gt isfinite isinf isnan le logical_and logical_not logical_or logical_xor lt maximum
    minimum mul ne neg reciprocal round rsub sign sqrt sub trunc __and__ __lshift__ __or__ __rshift__ __xor__
"""
# An element's result is the same in a tensor of any size. addcmul and the like are left out: they may round twice.
EXACT_OPERATORS = frozenset(f"{_VIEWS} {_MOVES} {_ARITHMETIC}".split())


class _Listener(TorchDispatchMode):
    """Notes the names of operators that are not among the exact ones."""

    def __init__(self) -> None:
        super().__init__()
        self.others: dict[str, None] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.rpartition("::")[2]
        plain = name if name.startswith("__") else name.removesuffix("_")
        scaled = kwargs is not None and kwargs.get("alpha", 1) != 1  # x + alpha y may round once or twice
        if (plain not in EXACT_OPERATORS and not func.is_view) or scaled:
            self.others[f"{plain} with alpha" if scaled else plain] = None
        return func(*args, **(kwargs or {}))


def objection(load: Callable[[range, bool], list[dict[str, Tensor]]], micro_batches: range) -> str | None:
    """Why a task's augmentation may not be called for several micro-batches at once; None if it may.

    Args:
        load: (micro-batches, whether augmented together) -> their samples.
        micro_batches: the micro-batches to try it with.
    """
    with _Listener() as listener:
        together = load(micro_batches, True)
    if listener.others:
        return (
            f"it calls {', '.join(listener.others)}, which may give an element other bits in a tensor of another size"
        )
    for j, arrays in zip(micro_batches, together):
        (alone,) = load(range(j, j + 1), False)
        for name, array in alone.items():
            if not _same_bits(array, arrays[name]):
                return f"it gives other values for {name!r} when it gets the same samples together with more samples"
    return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return np.array_equal(bytes_of(one), bytes_of(other))
