"""Hashes of tensors: quick ones on the device, to compare ranks and micro-batches, and SHA-256 for the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .order import mixed

_CHUNK = 1 << 20
_weights: dict[torch.device, Tensor] = {}


def _first_weights(count: int, device: torch.device) -> Tensor:
    """The first `count` of a fixed sequence of odd 64-bit numbers that look random: (count,) int64, count <= `_CHUNK`.

    Odd, so that a single flipped bit always changes the sum (mod 2^64). Made as far as they are needed: small models
    need few, and all of them would take as long as some of their steps.
    """
    weights = _weights.get(device)
    if weights is None or len(weights) < count:
        length = min(_CHUNK, max(1 << 12, 1 << (count - 1).bit_length()))
        weights = _weights[device] = mixed(torch.arange(1, length + 1, device=device)) | 1
    return weights[:count]


def flattened(tensor: Tensor) -> Tensor:
    """A tensor's elements side by side, (n,), so that they can be viewed as bytes: a view where they lie so already."""
    # Not reshape(-1): of a single element cut out of a row, torch keeps the row's stride.
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))


def bytes_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's bytes in the order of its elements, (n,) uint8 on the host. Waits for the device."""
    # As bytes: numpy has no bfloat16, and a hash needs none.
    return flattened(tensor.cpu()).view(torch.uint8).numpy()


def hash64(tensors: Iterable[Tensor]) -> Tensor:
    """A 64-bit hash of tensors' bits: () int64, on their device and without waiting for it.

    A sum of 32-bit words (16 or 8 where a type is narrower) times odd weights, modulo 2^64: integer
    addition is associative, so the hash is the same however a kernel orders it.
    """
    total: Tensor | None = None
    for tensor in tensors:
        flat = flattened(tensor)
        words = flat.view({1: torch.uint8, 2: torch.int16}.get(flat.element_size(), torch.int32))
        for start in range(0, max(1, len(words)), _CHUNK):
            chunk = words[start : start + _CHUNK]
            part = (chunk.to(torch.int64) * _first_weights(len(chunk), flat.device)).sum()
            # The multiplier makes the place of a chunk count.
            total = part if total is None else total * 6364136223846793005 + part
    assert total is not None
    return total


def hash_each(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name -> `hash64` of a tensor, in the same order, without empty ones. Waits for the device, once for all."""
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
    """SHA-256 over a text, and the names, types, shapes and bytes of tensors in the order given."""
    total = hashlib.sha256(head.encode())
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(bytes_of(tensor).data)
    return total.hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors in the order of their names."""
    return tensors_sha256(sorted(state.items()))
