"""Hashes of tensors: quick ones on the device to compare ranks and micro-batches, and SHA-256 for files and reports."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..order import mixed

# Tensors are hashed in pieces of this many words. This bounds the memory of the weights and of the int64 copies.
_CHUNK = 1 << 20
_weights: dict[torch.device, Tensor] = {}


def _first_weights(count: int, device: torch.device) -> Tensor:
    """The first `count` of a fixed sequence of odd 64-bit numbers that look random: (count,) int64, count <= `_CHUNK`.

    An odd weight has an inverse modulo 2^64, so a single flipped bit always changes the sum. Only the weights that are
    needed are made: for a small model, making all of them would take as long as several steps.
    """
    weights = _weights.get(device)
    if weights is None or len(weights) < count:
        length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length()))
        weights = _weights[device] = mixed(torch.arange(1, length + 1, device=device)) | 1
    return weights[:count]


def flattened(tensor: Tensor) -> Tensor:
    """A tensor's elements side by side, (n,), ready to be viewed as bytes. A view if they lie side by side already."""
    # Not reshape(-1): for a single element that was cut out of a row, torch keeps the row's stride.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))


def bytes_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's bytes in the order of its elements, (n,) uint8 on the host. Waits for the device."""
    # As bytes, because numpy has no bfloat16.
    return flattened(tensor.cpu()).view(torch.uint8).numpy()


def hash64(tensors: Iterable[Tensor]) -> Tensor:
    """A 64-bit hash of tensors' bits: () int64, on their device and without waiting for it.

    The hash is a sum of 32-bit words (16 or 8 for narrower types) times odd weights, modulo 2^64. Integer
    addition is associative, so a kernel may add in any order.
    """
    total: Tensor | None = None
    for tensor in tensors:
        # Bits are hashed, not values: 0.0 and -0.0 differ, and a nan equals itself.
        flat = flattened(tensor)
        words = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
        for start in range(0, max(1, len(words)), _CHUNK):
            chunk = words[start : start + _CHUNK]
            part = (chunk.to(torch.int64) * _first_weights(len(chunk), flat.device)).sum()
            # The multiplier makes the order of chunks count. It is Knuth's, from the generator MMIX.
            total = part if total is None else total * 6364136223846793005 + part
    assert total is not None
    return total


def hash_each(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> `hash64` of the tensor, in the same order, without empty tensors. Waits once for each device."""
    hashed = {name: hash64([tensor]) for name, tensor in tensors.items() if tensor.numel()}
    if not hashed:
        return {}
    on_device: dict[torch.device, list[str]] = {}
    for name, value in hashed.items():
        on_device.setdefault(value.device, []).append(name)
    values: dict[str, int] = {}
    for names in on_device.values():
        values |= dict(zip(names, torch.stack([hashed[name] for name in names]).tolist()))  # device to host
    return {name: values[name] for name in hashed}


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits (BLAKE2b) of a tensor's type, shape and bytes."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.blake2b(head + bytes_of(tensor).tobytes(), digest_size=8).hexdigest()


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]], head: str = "") -> str:
    """SHA-256 over the text `head`, then the names, types, shapes and bytes of tensors in the order given."""
    total = hashlib.sha256(head.encode())
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(bytes_of(tensor).data)
    return total.hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors in the order of their names."""
    return tensors_sha256(sorted(state.items()))
