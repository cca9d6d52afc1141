"""Comparing what must be the same: hashes of parameters across ranks, and of a whole model for the record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .distributed import common_value, gather_int64, gather_objects
from .errors import RanksDifferError
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


def compare_ranks(state: Mapping[str, Tensor], step: int) -> None:
    """Checks that every rank holds the same bits. Collective: every rank.

    Args:
        state: name -> tensor, the same names everywhere.
        step: for the message.

    Raises:
        RanksDifferError: on every rank, naming the ranks that differ and the first tensor in which they do.
    """
    hashes = gather_int64(hash64(state.values()))
    if len(set(hashes)) == 1:
        return
    by_tensor = gather_objects(hash_each(state))
    usual = common_value(hashes)
    wrong = [rank for rank, value in enumerate(hashes) if value != usual]
    tensor = next(
        (name for name in state if len({rank_hashes.get(name) for rank_hashes in by_tensor}) > 1), "an unnamed tensor"
    )
    if len(hashes) == 2:
        who = "ranks 0 and 1 differ"
    else:
        who = (
            f"rank{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong))} differ{'s' * (len(wrong) == 1)} from the others"
        )
    raise RanksDifferError(
        f"After step {step} {who}, first in {tensor}. All ranks apply the same gradient, so something else changes it: "
        "the task's forward or loss writes to it (`python -m trainer check-task` looks for that), or a device is "
        "faulty. Nothing was saved from this step.",
        agreed=True,
    )


def digest(tensor: Tensor) -> str:
    """16 hexadecimal digits (BLAKE2b) of a tensor's type, shape and bytes."""
    data = flattened(tensor.cpu()).view(torch.uint8).numpy()
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.blake2b(head + data.tobytes(), digest_size=8).hexdigest()


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and bytes of tensors in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(flattened(tensor.cpu()).view(torch.uint8).numpy().data)
    return total.hexdigest()
