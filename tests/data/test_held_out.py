"""Which rows are held out: of each class alike, whole groups, and the same whatever else is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.held_out import check_fractions, held_out, hold_out
from trainer.errors import UserError


def test_splits_are_disjoint_and_stratified() -> None:
    labels = np.array([0] * 60 + [1] * 40)
    found = held_out(100, {"test": 0.2, "validation": 0.1}, 0, labels)
    assert {name: np.bincount(labels[rows]).tolist() for name, rows in found.items()} == {
        "test": [12, 8],
        "validation": [6, 4],
        "train": [42, 28],
    }
    assert sorted(np.concatenate(list(found.values())).tolist()) == list(range(100))


def test_without_a_test_split_validation_is_what_it_was() -> None:
    labels = np.arange(50) % 3
    found = held_out(50, {"test": 0.0, "validation": 0.1}, 7, labels)
    np.testing.assert_array_equal(found["validation"], hold_out(50, 0.1, 7, labels))
    assert list(held_out(50, {"test": 0.0, "validation": 0.0}, 7)) == ["train"]


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_and_every_class_stays_in_train(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, 40)
    groups = [f"g{i}" for i, size in enumerate(sizes) for _ in range(size)]
    labels = rng.integers(0, 3, len(groups))
    found = held_out(len(groups), {"test": 0.2, "validation": 0.2}, seed, labels, groups)
    of = {name: {groups[row] for row in rows} for name, rows in found.items()}
    assert not of["train"] & of["test"] | of["train"] & of["validation"] | of["test"] & of["validation"]
    assert len(np.unique(labels[found["train"]])) == 3
    for name in ("test", "validation"):
        assert abs(len(found[name]) / len(groups) - 0.2) < 0.06
    # A class that one group alone has is not taken from train.
    alone = np.where(np.array(groups) == "g3", 3, labels)
    assert 3 in alone[held_out(len(groups), {"test": 0.5}, seed, alone, groups)["train"]]


def test_fractions_leave_something_to_train_on() -> None:
    check_fractions(0.5, 0.4)
    with pytest.raises(UserError, match="leave nothing to train on"):
        check_fractions(0.5, 0.5)
