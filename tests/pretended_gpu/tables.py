"""What operations of torch do on a GPU, by name: read in the sources of torch 2.13."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Refused by torch.use_deterministic_algorithms(True), as they call alertNotDeterministic on CUDA. So are cumsum of
# floating-point numbers, and bincount with weights.
REFUSED = {
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d", "upsample_linear1d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward", "upsample_trilinear3d_backward", "reflection_pad1d_backward",
    "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d_forward", "nll_loss2d_backward",
    "_ctc_loss_backward", "put_", "histc", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "median",
    "nanmedian",
}  # fmt: skip
# The host waits for their result: a number, or a shape that depends on values.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "is_nonzero", "item", "repeat_interleave",
}  # fmt: skip
# They launch no kernel: views, shapes, and memory from the caching allocator.
FREE = {
    "view", "_unsafe_view", "expand", "as_strided", "slice", "select", "transpose", "t", "permute", "detach", "alias",
    "unsqueeze", "squeeze", "split", "split_with_sizes", "unbind", "_reshape_alias", "empty", "empty_like",
    "empty_strided", "new_empty", "new_empty_strided", "diagonal", "unfold", "narrow", "chunk", "lift_fresh",
    "view_as_real", "is_pinned", "set_", "to", "reshape", "contiguous", "resize_", "movedim", "flatten",
    "_reshape_copy", "sym_size", "unflatten", "is_same_size",
}  # fmt: skip
# Kernels of an operation that launches more than one: an estimate from ATen's and cuDNN's sources.
KERNELS = {"nll_loss_backward": 2, "max_pool2d_with_indices_backward": 2, "embedding_dense_backward": 4}
# Functions that are one kernel on a GPU, and several on the CPU; and kernels of their backward, where it is more.
FUSED = {"dropout": 1, "scaled_dot_product_attention": 3}
# Tensors that one kernel of a _foreach or _fused operation takes.
TENSORS_A_KERNEL, TENSORS_A_KERNEL_OF_ADAM = 60, 24


def kernels(name: str, args: Sequence[Any]) -> int:
    """How many kernels an operation launches."""
    if name in FREE:
        return 0
    # Their last argument says which gradients are wanted: of input, weight and bias.
    if name == "convolution_backward":
        return sum(args[-1])
    if name in ("native_layer_norm_backward", "native_group_norm_backward"):
        return args[-1][0] + any(args[-1][1:])
    if name.startswith(("_foreach", "_fused")) and isinstance(args[0], (list, tuple)):
        each = TENSORS_A_KERNEL_OF_ADAM if name.startswith("_fused_adam") else TENSORS_A_KERNEL
        return max(1, -(-len(args[0]) // each))
    return KERNELS.get(name, 1)
