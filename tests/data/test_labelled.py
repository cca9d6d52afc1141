"""Samples with labels, whatever they are: their moments, splits that are held out, and folds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config.keys import FoldOptions
from trainer.data.cut import Cut
from trainer.data.labelled import Labelled, LabelledSplit, digests, duplicates_note, sums
from trainer.errors import UserError


@dataclass(frozen=True)
class Numbers(LabelledSplit):
    number: Tensor  # (N, C, n)


def split(count: int, seed: int = 0) -> Numbers:
    number = torch.from_numpy(np.random.default_rng(seed).integers(-9000, 9000, (count, 2, 7), dtype=np.int16))
    return Numbers(torch.arange(count) % 2, sums(number), digests(number), number)


def dataset(**splits: Numbers) -> Labelled[Numbers]:
    return Labelled(splits, ["a", "b"], [], ("first", "a"), {}, ["label"])


def test_moments_are_those_of_the_rows_that_are_chosen() -> None:
    part = split(9).select(np.array([1, 4, 8]))
    mean, deviation = part.moments(7)
    np.testing.assert_allclose(mean, part.number.double().mean((0, 2)))
    np.testing.assert_allclose(deviation, part.number.double().std((0, 2), correction=0))


def test_splits_that_the_data_lacks_are_held_out_and_folds_hold_each_sample_once() -> None:
    found = dataset(train=split(20), test=split(6, seed=1))
    cut = found.cut(None, {"test": 0.2, "validation": 0.2}, 0)
    assert {name: len(part.label) for name, part in cut.items()} == {"train": 16, "validation": 4, "test": 6}
    assert duplicates_note(cut) == []
    folds = [found.cut(Cut(FoldOptions(folds=2, number=i)), {}, 0)["test"].digest for i in range(2)]
    every = torch.cat([found.splits["train"].digest, found.splits["test"].digest])
    assert sorted(torch.cat(folds).tolist()) == sorted(every.tolist())
    again = dataset(train=split(20), test=split(6))
    assert duplicates_note(again.splits) == [
        "6 of the 6 samples of test are also in train, so its metrics are too good"
    ]
    again.groups["train"] = list(range(20))
    with pytest.raises(UserError, match="must be in all splits"):
        again.cut(Cut(FoldOptions(folds=2)), {}, 0)
