"""How samples are cut into folds: each is tested once, groups stay whole, classes are shared out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainer.config.keys import FoldOptions
from trainer.data.cut import Cut, together
from trainer.data.table_files import Table
from trainer.errors import UserError

LABELS = np.array([0] * 20 + [1] * 10)
GROUPS = [f"p{i // 3}" for i in range(30)]


def cut(number: int = 0, labels: Any = LABELS, groups: Any = None, count: int = 30, **options: Any) -> Cut:
    made = Cut(FoldOptions(**({"folds": 5, "number": number} | options)))
    made(count, labels, groups)
    return made


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("labels", [None, LABELS])
def test_each_sample_is_tested_once_and_never_learnt_by_that_run(labels: Any, groups: Any) -> None:
    cuts = [cut(number, labels, groups, validation_fraction=0.2) for number in range(5)]
    assert sorted(np.concatenate([c.rows["test"] for c in cuts]).tolist()) == list(range(30))
    for c in cuts:
        parts = [c.rows[name].tolist() for name in ("train", "validation", "test")]
        assert sorted(row for part in parts for row in part) == list(range(30))
        assert all(part == sorted(part) for part in parts)
        if groups is not None:
            of = [{groups[i] for i in part} for part in parts]
            assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2])


def test_each_fold_has_its_share_of_every_class() -> None:
    for number in range(5):
        assert np.bincount(LABELS[cut(number).rows["test"]]).tolist() == [4, 2]
    assert any(np.bincount(LABELS[cut(n, stratified=False).rows["test"]], minlength=2)[1] != 2 for n in range(5))


def test_only_the_seed_decides_the_cut() -> None:
    assert (cut(seed=3).fold_of == cut(4, seed=3).fold_of).all()
    assert (cut(seed=3).fold_of != cut(seed=4).fold_of).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folds": 11}, "1 of the 2 classes has fewer: the smallest has 10"),
        ({"folds": 11, "labels": None, "groups": GROUPS}, "11 folds need 11 groups .* there are 10. Take at most 10"),
        ({"folds": 31, "labels": None}, "31 folds need 31 samples"),
        ({"labels": None, "stratified": True}, '"stratified" is true, but these samples have no classes'),
    ],
)
def test_what_cannot_be_cut_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cut(**given)


def test_tables_are_put_together_in_the_order_of_the_pool() -> None:
    found = {"train": Table({"a": [1, 2], "more": [0, 0]}), "test": Table({"a": [3]})}
    assert together(Cut(FoldOptions()), found, ["a"])["train"].columns == {"a": [1, 2, 3]}
    assert together(Cut(FoldOptions(pool=["test", "train"])), found, ["a"])["train"].columns == {"a": [3, 1, 2]}
    with pytest.raises(UserError, match='test has no column "more"'):
        together(Cut(FoldOptions()), found, ["a", "more"])
    with pytest.raises(UserError, match="the data has only train, test"):
        together(Cut(FoldOptions(pool=["validation"])), found, [])
