"""Splits in memory: gathers, counts and hashes, and what a task may hand over."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.exact.splits import Split, as_split, as_splits


def images_and_labels(n: int = 6) -> dict[str, Tensor]:
    return {"image": torch.arange(n * 4.0).view(n, 2, 2), "label": torch.arange(n)}


def test_length_is_the_number_of_samples() -> None:
    assert len(Split(images_and_labels(6))) == 6


def test_gather_takes_rows_by_index() -> None:
    split = Split(images_and_labels())
    batch = split.gather(torch.tensor([4, 0, 4]))
    assert batch["label"].tolist() == [4, 0, 4]
    assert batch["image"][0].tolist() == [[16.0, 17.0], [18.0, 19.0]]
    assert list(batch) == ["image", "label"]


def test_gathered_tensors_are_fresh_and_aligned() -> None:
    """A view of the split would start anywhere, and a kernel may be chosen by where it starts."""
    split = Split({"x": torch.arange(7.0)[:, None].repeat(1, 3)})
    for start in range(5):
        part = split.gather(torch.arange(start, start + 2))["x"]
        assert part.untyped_storage().data_ptr() != split.arrays["x"].untyped_storage().data_ptr()
        assert part.is_contiguous()
        assert part.storage_offset() == 0
        assert part.data_ptr() % 64 == 0
        part.zero_()
    assert split.arrays["x"][:, 0].tolist() == list(range(7))


def test_count_without_counts_is_the_number_of_samples() -> None:
    assert Split(images_and_labels()).count_of(torch.tensor([1, 1, 5])) == 3.0


def test_count_adds_up_what_samples_contribute() -> None:
    split = Split(images_and_labels(3), torch.tensor([3, 0, 11]))
    assert split.count_of(torch.tensor([2, 0, 2])) == 25.0


def test_count_is_exact_beyond_float32() -> None:
    """2^24 + 1 is no float32, and a sum in float32 would stop growing there."""
    split = Split({"x": torch.zeros(3)}, torch.tensor([2.0**24, 1.0, 1.0]))
    assert split.count_of(torch.tensor([0, 1, 2])) == 2.0**24 + 2


def test_to_moves_arrays_and_leaves_counts_on_the_host() -> None:
    split = Split(images_and_labels(), torch.arange(6))
    moved = split.to(torch.device("meta"))
    assert {array.device.type for array in moved.arrays.values()} == {"meta"}
    assert moved.counts is split.counts


# Hashes


def test_hash_knows_everything_that_data_is() -> None:
    base = {"a": torch.arange(6, dtype=torch.float32), "b": torch.zeros(6, dtype=torch.int64)}
    one_bit = base["a"].clone()
    one_bit.view(torch.int32)[5] ^= 1
    variants = [
        Split(base),
        Split({**base, "a": one_bit}),
        Split({"a": base["a"], "c": base["b"]}),
        Split({"a": base["b"], "b": base["a"]}),
        Split({**base, "a": base["a"].view(6, 1)}),
        Split({**base, "a": base["a"].view(torch.int32)}),
        Split({**base, "a": base["a"].flip(0)}),
        Split({"a": base["a"]}),
        Split(base, torch.ones(6)),
        Split(base, torch.arange(6.0)),
    ]
    assert len({split.data_hash() for split in variants}) == len(variants)


def test_hash_does_not_know_how_data_lies() -> None:
    x = torch.arange(12.0).view(3, 4)
    one, other = Split({"x": x, "y": x[:, 0]}), Split({"y": x[:, 0].clone(), "x": x.t().contiguous().t()})
    assert one.data_hash() == other.data_hash() == one.data_hash()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.uint8, torch.float64, torch.float16])
def test_hash_takes_every_type(dtype: torch.dtype) -> None:
    zeros, ones = Split({"x": torch.zeros(5).to(dtype)}), Split({"x": torch.ones(5).to(dtype)})
    assert re.fullmatch("[0-9a-f]{64}", zeros.data_hash())
    assert zeros.data_hash() != ones.data_hash()


# What a task returns


def test_plain_dictionaries_of_tensors_and_arrays() -> None:
    split = as_split({"x": np.arange(6, dtype=np.float32).reshape(3, 2), "y": torch.arange(3)}, "train", "Mine")
    assert split.arrays["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert split.arrays["x"].dtype == torch.float32
    assert split.counts is None


def test_arrays_are_made_contiguous_and_lose_their_graph() -> None:
    x = np.arange(12.0).reshape(3, 4)
    given = {"fortran": np.asfortranarray(x), "strided": x[:, ::-2], "graph": torch.ones(3, 2, requires_grad=True)}
    split = as_split(given, "train", "Mine")
    assert all(array.is_contiguous() and not array.requires_grad for array in split.arrays.values())
    assert split.arrays["fortran"].tolist() == x.tolist()
    assert split.arrays["strided"].tolist() == x[:, ::-2].tolist()


def test_a_split_keeps_its_counts() -> None:
    split = as_split(Split(images_and_labels(3), torch.tensor([1, 2, 3])), "train", "Mine")
    assert split.counts is not None
    assert split.counts.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2], ("dictionary of arrays", "not list")),
        ({}, ("dictionary of arrays", "not dict")),
        (None, ("dictionary of arrays", "not NoneType")),
        ({"x": [1, 2]}, ('["x"]', "tensor or an array", "not list")),
        ({"x": torch.tensor(3.0)}, ('["x"]', "one row a sample", "not Tensor")),
        ({"x": torch.zeros(3), "y": torch.zeros(4)}, ("one row a sample", "x: 3", "y: 4")),
        (Split({"x": torch.zeros(3)}, torch.zeros(4)), ("one row a sample", "x: 3", "counts: 4")),
        ({"x": torch.zeros(0, 5)}, ("is empty",)),
    ],
)
def test_what_is_no_split(value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        as_split(value, "validation", "Mine")
    for word in ("Mine.splits()", '"validation"', *words):
        assert word in str(caught.value)


def test_splits_come_in_one_order() -> None:
    """Whatever order the task has them in: what is computed over all of them must not depend on it."""
    value = {"test": images_and_labels(1), "train": images_and_labels(3), "validation": images_and_labels(2)}
    assert [(name, len(split)) for name, split in as_splits(value, "Mine").items()] == [
        ("train", 3),
        ("validation", 2),
        ("test", 1),
    ]
    assert list(as_splits({"train": images_and_labels()}, "Mine")) == ["train"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, ('"train" split', "a NoneType")),
        ([images_and_labels()], ('"train" split', "a list")),
        ({"test": images_and_labels()}, ('"train" split', "['test']")),
        ({"train": images_and_labels(), "valid": images_and_labels()}, ("'valid'", "train, validation, test")),
        ({"train": {"x": torch.zeros(0)}}, ('"train"', "is empty")),
    ],
)
def test_what_are_no_splits(value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        as_splits(value, "Mine")
    for word in ("Mine.splits()", *words):
        assert word in str(caught.value)


def test_counts_may_be_a_numpy_array() -> None:
    split = as_split(Split(images_and_labels(3), np.array([1, 2, 3])), "train", "Mine")  # type: ignore[arg-type]
    assert split.count_of(torch.tensor([0, 2])) == 4.0


def test_an_array_that_no_tensor_can_hold() -> None:
    with pytest.raises(UserError, match=r'"train".*"text"'):
        as_split({"text": np.array(["a", "b"])}, "train", "Mine")


def test_the_counts_of_micro_batches() -> None:
    indices, bounds = torch.tensor([4, 0, 3, 3, 1]), [(0, 2), (2, 3), (3, 5)]
    assert Split(images_and_labels(5)).counts_of(indices, bounds) == [2.0, 1.0, 2.0]
    split = Split(images_and_labels(5), torch.tensor([1.0, 2.5, 4.0, 8.0, 16.0]))
    assert split.counts_of(indices, bounds) == [17.0, 8.0, 10.5]
    assert sum(split.counts_of(indices, bounds)) == split.count_of(indices)


def test_a_part_of_a_split() -> None:
    x = torch.arange(12.0).view(4, 3)
    split = Split({"x": x}, torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3, 1, 2, 3]), ("x",))
    part = split.subset(torch.tensor([1, 3]))
    assert part.arrays["x"].tolist() == x[[1, 3]].tolist()
    assert part.counts is not None and part.counts.tolist() == [2.0, 4.0]
    assert part.lengths is not None and part.lengths.tolist() == [1, 3]
    assert part.padded == ("x",)
    assert Split({"x": x}).subset(torch.tensor([0])).counts is None


@pytest.mark.parametrize(
    ("lengths", "padded", "words"),
    [
        (None, ("x",), r"names padded arrays \(x\) but gives no lengths"),
        (torch.tensor([1, 0]), ("x",), "lengths must be int64 and at least 1; they are torch.int64, the smallest is 0"),
        (torch.tensor([1.0, 2.0]), ("x",), "they are torch.float32"),
        (torch.tensor([1, 4]), ("x",), "a sample has the length 4, but 'x' has only 3 positions"),
        (torch.tensor([1, 2]), ("y",), "the padded array 'y' must be there"),
        (torch.tensor([1, 2]), ("z",), "the padded array 'z' must be there"),
    ],
)
def test_lengths_that_do_not_fit(lengths: torch.Tensor | None, padded: tuple[str, ...], words: str) -> None:
    split = Split({"x": torch.zeros(2, 3), "y": torch.zeros(2)}, lengths=lengths, padded=padded)
    with pytest.raises(UserError, match=words):
        as_splits({"train": split}, "T")


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([0, 0, 0], "none of the 3 samples counts"),
        ([1.0, -1.0, 2.0], "finite and not negative"),
        ([1.0, float("nan"), 2.0], "finite and not negative"),
        ([[1.0], [1.0], [1.0]], "one number a sample"),
    ],
)
def test_counts_by_which_no_loss_can_be_divided(counts: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        as_split(Split({"x": torch.zeros(3, 1)}, torch.tensor(counts)), "test", "MyTask")


def test_lengths_of_samples_give_the_longest_and_the_tokens() -> None:
    indices, bounds = torch.tensor([4, 0, 2, 3, 1]), [(0, 2), (2, 3), (3, 5)]
    split = Split({"x": torch.zeros(5, 9)}, lengths=torch.tensor([3, 9, 1, 4, 2]), padded=("x",))
    assert split.longest(indices, bounds) == [3, 1, 9]
    assert split.tokens(indices) == 19 and split.tokens(indices[:2]) == 5
    plain = Split({"x": torch.zeros(5, 9)})
    assert plain.longest(indices, bounds) is None
    assert plain.tokens(indices) == 0


def test_only_padded_arrays_are_cut() -> None:
    batch = {"x": torch.arange(12.0).view(2, 6), "mask": torch.ones(2, 6, 2), "other": torch.zeros(2, 6)}
    split = Split(batch, lengths=torch.tensor([3, 4]), padded=("x", "mask"))
    part = split.cut(batch, 4)
    assert list(part) == ["x", "mask", "other"]
    assert part["x"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert part["mask"].shape == (2, 4, 2) and part["other"].shape == (2, 6)
    assert part["x"].is_contiguous()
    assert split.cut(batch, None) is batch


def test_a_sample_may_fill_all_places() -> None:
    split = as_split(Split({"x": torch.zeros(2, 3)}, lengths=torch.tensor([1, 3]), padded=("x",)), "train", "T")
    assert split.lengths is not None and split.lengths.tolist() == [1, 3]
