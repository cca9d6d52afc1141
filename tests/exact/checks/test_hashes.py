"""Hashes of tensors: every bit counts, and nothing else does."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.exact.checks import hashes
from trainer.exact.checks.hashes import digest, hash64, hash_each, state_sha256

# Without a deadline: on a busy machine any example can take long.
checked = settings(deadline=None, max_examples=150)

CHUNK = 1 << 20  # words of one sum in hash64
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


pytestmark = pytest.mark.usefixtures("one_thread")


def random_bytes(dtype: torch.dtype, numel: int, seed: int = 0) -> Tensor:
    """Any bits at all, nan and infinity among them."""
    size = torch.empty((), dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (numel * size,), dtype=torch.uint8, generator=generator).view(dtype)


def flipped(tensor: Tensor, bit: int) -> Tensor:
    copy = tensor.clone()
    copy.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return copy


# hash64


@checked
@given(data=st.data(), dtype=st.sampled_from(DTYPES), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_one_flipped_bit_changes_the_hash(data: st.DataObject, dtype: torch.dtype, sizes: list[int]) -> None:
    tensors = [random_bytes(dtype, size, seed) for seed, size in enumerate(sizes)]
    which = data.draw(st.integers(0, len(tensors) - 1))
    bit = data.draw(st.integers(0, 8 * tensors[which].numel() * tensors[which].element_size() - 1))
    other = list(tensors)
    other[which] = flipped(tensors[which], bit)
    assert int(hash64(tensors)) != int(hash64(other))
    other[which] = flipped(other[which], bit)
    assert int(hash64(tensors)) == int(hash64(other))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_a_few_words(dtype: torch.dtype) -> None:
    tensor = random_bytes(dtype, 4)
    bits = 8 * tensor.numel() * tensor.element_size()
    found = {int(hash64([flipped(tensor, bit)])) for bit in range(bits)}
    assert len(found | {int(hash64([tensor]))}) == bits + 1


@pytest.mark.parametrize("place", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 6])
@pytest.mark.parametrize("bit", [0, 31])
def test_a_flipped_bit_at_a_chunks_boundary(place: int, bit: int) -> None:
    tensor = random_bytes(torch.float32, 2 * CHUNK + 7)
    assert int(hash64([tensor])) != int(hash64([flipped(tensor, 32 * place + bit)]))


def test_the_order_of_chunks_matters() -> None:
    """Every chunk has the same weights, so its place must count otherwise."""
    first, second = random_bytes(torch.float32, CHUNK, 1), random_bytes(torch.float32, CHUNK, 2)
    one, other = torch.cat([first, second]), torch.cat([second, first])
    assert int(hash64([one])) != int(hash64([other]))


def test_the_order_of_tensors_matters() -> None:
    a, b = random_bytes(torch.float32, 5, 1), random_bytes(torch.float32, 5, 2)
    assert int(hash64([a, b])) != int(hash64([b, a]))


def test_the_order_of_words_matters() -> None:
    tensor = random_bytes(torch.float32, 6)
    assert int(hash64([tensor])) != int(hash64([tensor.flip(0)]))


def test_the_sign_of_zero_and_the_kind_of_nan_are_bits_too() -> None:
    zeros = [torch.zeros(3), -torch.zeros(3)]
    nans = [torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001)]
    for one, other in (zeros, nans):
        assert int(hash64([one])) != int(hash64([other]))


def test_the_hash_follows_values_not_memory() -> None:
    x = torch.randn(4, 6)
    wanted = int(hash64([x]))
    assert int(hash64([x.t().contiguous().t()])) == wanted
    assert int(hash64([x.clone().requires_grad_()])) == wanted
    assert int(hash64(iter([x]))) == wanted


def test_scalars_empty_and_boolean_tensors() -> None:
    result = hash64([torch.tensor(7), torch.zeros(0), torch.tensor([True, False])])
    assert (result.dtype, result.shape) == (torch.int64, ())
    assert int(result) != int(hash64([torch.tensor(8), torch.zeros(0), torch.tensor([True, False])]))
    assert int(result) != int(hash64([torch.tensor(7), torch.zeros(0), torch.tensor([False, True])]))


def test_hashes_of_random_tensors_do_not_collide() -> None:
    found = {int(hash64([random_bytes(torch.float32, 3, seed)])) for seed in range(3000)}
    assert len(found) == 3000
    # All 64 bits of it are used.
    assert min(found) < -(1 << 62)
    assert max(found) > 1 << 62


def by_definition(*tensors: Tensor) -> int:
    """The hash in numpy: words times odd weights, which splitmix64 makes of 1, 2, 3, ...; chunk after chunk."""
    x = np.arange(1, CHUNK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    weights = (x ^ x >> np.uint64(31)) | np.uint64(1)
    total = 0
    for tensor in tensors:
        kind = {1: np.uint8, 2: np.int16}.get(tensor.element_size(), np.int32)
        words = tensor.view(torch.uint8).numpy().view(kind).astype(np.int64).view(np.uint64)
        for start in range(0, len(words), CHUNK):
            part = words[start : start + CHUNK]
            total = (total * 6364136223846793005 + int((part * weights[: len(part)]).sum())) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 4096, 4097, 9000])
def test_the_hash_is_that_of_its_definition(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, numel: int) -> None:
    monkeypatch.setattr(hashes, "_weights", {})  # weights that no earlier test has made
    tensor = random_bytes(dtype, numel)
    assert int(hash64([tensor])) == by_definition(tensor)


def test_the_hash_of_several_chunks_and_tensors_is_that_of_its_definition() -> None:
    tensors = [random_bytes(torch.float32, size, size) for size in (3, CHUNK + 5, 7)]
    assert int(hash64(tensors)) == by_definition(*tensors)


def test_hash_each_is_the_hash_of_each_in_order() -> None:
    tensors = {"b": torch.ones(3), "empty": torch.zeros(0), "a": torch.tensor(2)}
    found = hash_each(tensors)
    assert list(found.items()) == [("b", int(hash64([tensors["b"]]))), ("a", int(hash64([tensors["a"]])))]
    assert hash_each({"empty": torch.zeros(0)}) == hash_each({}) == {}


# Hashes for the record


def test_sha256_is_over_names_types_shapes_and_bytes() -> None:
    """Written down by hand, so that a hash of an old summary can be checked without this program."""
    tensors = {"b": torch.tensor([[1.0], [-2.5]]), "a": torch.tensor([1, 2])}
    by_hand = hashlib.sha256()
    by_hand.update(b"a torch.int64 (2,);" + struct.pack("<2q", 1, 2))
    by_hand.update(b"b torch.float32 (2, 1);" + struct.pack("<2f", 1.0, -2.5))
    assert state_sha256(tensors) == by_hand.hexdigest()


def test_sha256_follows_names_and_bytes_not_the_order_of_the_dictionary() -> None:
    x, y = torch.arange(4.0), torch.ones(2)
    wanted = state_sha256({"x": x, "y": y})
    assert state_sha256({"y": y, "x": x}) == wanted
    assert state_sha256({"x": x.view(2, 2).t().contiguous().t().reshape(4), "y": y}) == wanted
    others = [
        {"x": x, "z": y},
        {"x": y, "y": x},
        {"x": x},
        {"x": x, "y": y, "z": torch.zeros(0)},
        {"x": x.view(2, 2), "y": y},
        {"x": x.view(torch.int32), "y": y},
        {"x": flipped(x, 5), "y": y},
        {"x": x.to(torch.float64), "y": y},
    ]
    assert len({state_sha256(other) for other in others} | {wanted}) == len(others) + 1


@checked
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_one_flipped_bit_changes_every_hash_for_the_record(data: st.DataObject, dtype: torch.dtype) -> None:
    tensor = random_bytes(dtype, 9)
    other = flipped(tensor, data.draw(st.integers(0, 8 * 9 * tensor.element_size() - 1)))
    assert state_sha256({"x": tensor}) != state_sha256({"x": other})
    assert digest(tensor) != digest(other)


def test_digest_knows_type_and_shape() -> None:
    x = torch.arange(4.0)
    variants = [x, x.view(2, 2), x.view(4, 1), x.view(torch.int32), x.double(), x.flip(0)]
    digests = {digest(variant) for variant in variants}
    assert len(digests) == len(variants)
    assert all(len(text) == 16 for text in digests)
    assert digest(x.view(2, 2).t().contiguous().t()) == digest(x.view(2, 2))
