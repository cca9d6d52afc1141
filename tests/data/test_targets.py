"""Labels of one class, of several, and numbers: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import targets
from trainer.data.table_files import Table, from_datasets, read_file
from trainer.data.targets import NUMBER, SEVERAL, Wish
from trainer.errors import UserError

LISTS = Wish(SEVERAL)


def read(values: list[Any], wish: Wish, **more: Any) -> Any:
    return targets.read(Table({"label": values}, **more), ["label"], wish, "train")


def test_several_labels_in_every_form() -> None:
    wanted = [["a", "b"], [], ["c"]]
    assert read([["a", "b"], [], ["c"]], LISTS) == wanted
    assert read(["['a', 'b']", "[]", '["c"]'], LISTS) == wanted, "lists as Python and JSON write them"
    assert read(["a | b", "", "c"], Wish(SEVERAL, separator="|")) == wanted
    assert read([[0, 1], [], [2]], LISTS, list_classes={"label": ["a", "b", "c"]}) == wanted
    columns = {"a": ["1", "0", "0"], "b": [True, False, False], "c": [0, 0, 1.0]}
    assert targets.read(Table(columns), list("abc"), Wish(SEVERAL, columns=("a", "b", "c")), "train") == wanted
    numbers, names = targets.numbered({"train": wanted}, LISTS, None)
    assert names == ["a", "b", "c"] and numbers["train"].tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert numbers["train"].dtype == np.float32
    assert (
        targets.shown(names, numbers["train"][0]) == "a, b" and targets.shown(names, numbers["train"][1]) == "no label"
    )
    assert "1 label a sample of train, 1 have none" in targets.said(names, numbers)


def test_the_classes_of_lists_come_from_parquet_and_datasets(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"label": datasets.Sequence(datasets.ClassLabel(names=["x", "y"]))})
    data = datasets.Dataset.from_dict({"label": [[0], [1, 0]]}, features)
    data.to_parquet(tmp_path / "a.parquet")
    for table in (from_datasets(data), read_file(tmp_path / "a.parquet")):
        assert targets.read(table, ["label"], LISTS, "train") == [["x"], ["y", "x"]]
        assert targets.declared_names(table, ["label"], LISTS) == ["x", "y"]


@pytest.mark.parametrize(
    ("values", "wish", "said"),
    [
        ([["a"], 3], LISTS, r"row 2 .* is 3\. For one class a sample, leave .problem_type. out"),
        (["1.5"], LISTS, r"is '1.5'. For one class a sample"),
        (["a;b", "c"], LISTS, r"row 1 .* is the text 'a;b'.*.label_separator.: .;."),
        (["['a' 'b']"], LISTS, "is the text"),
        ([["a"], None], LISTS, r"1 value .* is missing .*empty list"),
        ([["a", 0.5]], LISTS, "0.5 is no label"),
        ([["a", ["b"]]], LISTS, "is no label"),
        (["1.5", "high"], Wish(NUMBER), r"must hold numbers, but row 2 .* is 'high'"),
        (["1.5", ""], Wish(NUMBER), "1 value .* missing"),
        ([1.0, float("inf")], Wish(NUMBER), "must hold finite numbers, but row 2"),
    ],
)
def test_labels_that_are_refused(values: list[Any], wish: Wish, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(values, wish)


def test_other_labels_that_are_refused() -> None:
    with pytest.raises(UserError, match=r'column "label" in train holds classes \(cat, dog\), not numbers'):
        read([0, 1], Wish(NUMBER), classes={"label": ["cat", "dog"]})
    with pytest.raises(UserError, match=r"row 1 .* The 2 classes have the numbers from 0 on"):
        read([[2]], LISTS, list_classes={"label": ["cat", "dog"]})
    with pytest.raises(UserError, match=r'"a" in train must hold 0 or 1, but row 2 .* is .-1.'):
        targets.read(Table({"a": ["0", "-1"], "b": ["0", "1"]}), ["a", "b"], Wish(SEVERAL, columns=("a", "b")), "train")
    with pytest.raises(UserError, match="The label 'z' occurs 1 time in test, but never in train"):
        targets.numbered({"train": [["a"], ["b"]], "test": [["z"]]}, LISTS, None)
    with pytest.raises(UserError, match="No sample of train has a label"):
        targets.numbered({"train": [[], []]}, LISTS, None)
    with pytest.raises(UserError, match=r"label_columns=\[\"a\", \"b\"\]"):
        targets.columns_of(Table({"text": ["x"], "a": ["1"], "b": ["0"]}), LISTS, ["label"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("regression", None, ["a", "b"], None), "label_columns.* has an effect only with"),
        (("regression", None, [], "|"), "label_separator.* has an effect only with"),
        ((SEVERAL, "l", ["a", "b"], None), "are both given"),
        ((SEVERAL, None, ["a", "a"], None), "names a column twice"),
        ((SEVERAL, None, ["a"], None), "names only one column"),
    ],
)
def test_options_that_contradict_one_another(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        targets.wish(*given)


def test_arrays() -> None:
    assert targets.of_array(np.array([[1, 0], [0, 0]]), LISTS, "y", "train") == [[0], []]
    for labels, wish, said in (
        (np.array([[2, 0]]), LISTS, "must hold 0 and 1 only"),
        (np.array(["a"]), Wish(NUMBER), "must hold numbers"),
        (np.array([np.nan]), Wish(NUMBER), "missing"),
    ):
        with pytest.raises(UserError, match=said):
            targets.of_array(labels, wish, "y", "train")


def test_train_keeps_the_rare_labels() -> None:
    """Splits are held out by the rarest label of each row."""
    present = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0]])
    assert targets.rarest(present).tolist() == [1, 0, 2, -1]
    assert targets.strata(np.array([0.5, 1.5])) is None


def test_another_mark_may_stand_between_labels() -> None:
    labels, wish = np.ones((1, 3)), Wish(SEVERAL, separator=";")
    (note,) = targets.notes(["toxic|insult", "toxic|spam", "spam"], labels, wish)
    assert note.startswith('2 of the 3 classes hold "|", such as \'toxic|insult\', and "label_separator" is ";".')
    assert targets.notes(["toxic|insult", "toxic", "spam"], labels, wish) == []
    assert targets.notes(["a|b", "c|d", "e|f"], labels, Wish(SEVERAL)) == [], "lists may hold any label"


def test_one_label_each_is_perhaps_another_problem() -> None:
    hint = 'exactly one label. If this is not by chance, leave "problem_type" out'
    assert hint in targets.said(["a", "b"], {"train": np.eye(2)})
    assert hint not in targets.said(["a", "b"], {"train": np.eye(2), "test": np.ones((1, 2))})
