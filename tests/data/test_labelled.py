"""Samples with labels, whatever they are: their moments, splits that are held out, and folds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config.keys import FoldOptions
from trainer.data.cut import Cut
from trainer.data.labelled import Labelled, LabelledSplit, Source, digests, duplicates_note, files_of, sums
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
    cut = found.cut(None, {"test": 0.2, "validation": 0.2}, 0).splits
    assert {name: len(part.label) for name, part in cut.items()} == {"train": 16, "validation": 4, "test": 6}
    assert duplicates_note(cut) == []
    folds = [found.cut(Cut(FoldOptions(folds=2, number=i)), {}, 0).splits["test"].digest for i in range(2)]
    every = torch.cat([found.splits["train"].digest, found.splits["test"].digest])
    assert sorted(torch.cat(folds).tolist()) == sorted(every.tolist())
    again = dataset(train=split(20), test=split(6))
    assert duplicates_note(again.splits) == [
        "6 of the 6 samples of test are also in train, so its metrics are too good"
    ]
    again.groups["train"] = list(range(20))
    with pytest.raises(UserError, match="must be in all splits"):
        again.cut(Cut(FoldOptions(folds=2)), {}, 0)


def test_groups_and_files_follow_their_samples() -> None:
    """Into splits that are held out, and into folds, whose rows are counted over all splits."""
    groups = {"train": [row // 4 for row in range(20)], "test": [9] * 6}
    files = {"train": [f"{row}.png" for row in range(20)], "test": [f"t{row}.png" for row in range(6)]}
    train = split(20)
    rows = {digest.tobytes(): row for row, digest in enumerate(train.digest.numpy())}
    found = Labelled({"train": train, "test": split(6, 1)}, ["a", "b"], [], ("", ""), groups, ["label"], lambda: files)
    held = found.cut(None, {"validation": 0.2}, 0)
    assert held.groups["test"] == [9] * 6 and len(set(held.groups["validation"])) == 1
    for name in ("train", "validation"):
        places = [rows[digest.tobytes()] for digest in held.splits[name].digest.numpy()]
        assert held.groups[name] == [groups["train"][row] for row in places]
    cut = Cut(FoldOptions(folds=2))
    fold = found.cut(cut, {}, 0)
    assert cut.files == [*files["train"], *files["test"]]
    every = [*groups["train"], *groups["test"]]
    assert fold.groups == {name: [every[row] for row in own] for name, own in cut.rows.items()}


def test_samples_are_files_if_each_of_them_is() -> None:
    def parts(*contents: object) -> dict[str, Source]:
        return {"train": Source(2, [("a", "a.png"), ("b", "b.png")], []), "test": Source(1, [("c", contents[0])], [])}

    assert files_of(parts("c.png")) == {"train": ["a.png", "b.png"], "test": ["c.png"]}
    assert files_of(parts(b"...")) == {}
    assert files_of({"train": Source(2, iter([]), [])}) == {}, "rows of an array, which have been read"
