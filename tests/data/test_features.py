"""Which columns are numbers and which are categories; what is refused; how values are read from any kind of file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data.features import CATEGORIES, NUMBERS, Names, Wish, find, kind_of, read, read_names, read_numbers
from trainer.data.table_files import Table, read_file
from trainer.errors import UserError

ROWS = 60
NOTHING = Wish()


def column(values: Sequence[Any], **more: Any) -> dict[str, Any]:
    """Beside a column that is certainly one of numbers."""
    return {"x": list(values), "sure": [str(i % 7 + 0.5) for i in range(len(values))], **more}


def kind(values: Sequence[Any], wish: Wish = NOTHING) -> str | None:
    table = Table(column(values))
    found = find(table, ["x", "sure"], wish, [])
    return kind_of(found["x"]) if "x" in found else None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1.5", "", "-2e3", " 7 "] * 15, NUMBERS),
        ([str(i % 30) for i in range(ROWS)], NUMBERS),
        ([0.5, None, float("nan"), 3] * 15, NUMBERS),
        (["nan", "1.5", "NaN"] * 20, NUMBERS),
        (["Oslo", "Rome", ""] * 20, CATEGORIES),
        ([True, False, None] * 20, CATEGORIES),
        (["1", "2", "A"] * 20, CATEGORIES),
        ([f"place {i % 25}" for i in range(ROWS)], CATEGORIES),
        (["", " ", "nan"] * 20, None),
    ],
)
def test_kinds_are_told_apart(values: list[Any], expected: str | None) -> None:
    assert kind(values) == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([f"name {i}" for i in range(ROWS)], '"x" holds 60 different texts in 60 rows'),
        ([str(i + 3) for i in range(ROWS)], '"x" numbers its rows, from 3 to 62'),
        (["?" if i == 4 else f"{i}.5" for i in range(ROWS)], "\"x\" holds numbers in 59 rows, but row 5 .* is '\\?'"),
        ([f"{i},25" for i in range(ROWS)], "decimal comma: write a point"),
        ([[1, 2]] * ROWS, r'"x" holds neither numbers nor texts: row 1 .* is a list'),
    ],
)
def test_columns_that_teach_nothing_are_refused_with_what_to_type(values: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        kind(values)
    assert "--set 'trainer.task_options.ignored_columns=[\"x\"]'" in str(caught.value)
    assert kind(values, Wish(ignored=["x"])) is None


def test_ids_are_refused_by_their_names_if_each_row_has_its_own() -> None:
    ids = [str(10 * i * i) for i in range(ROWS)]
    for name, refused in {"customer_id": True, "UserId": True, "ID": True, "paid": False, "area": False}.items():
        table = Table({name: ids, "sure": ["1.5"] * ROWS})
        if refused:
            with pytest.raises(UserError, match="is called like an id"):
                find(table, [name, "sure"], Wish(), [])
        else:
            assert kind_of(find(table, [name, "sure"], Wish(), [])[name]) == NUMBERS


def test_what_the_user_says_of_a_column_counts() -> None:
    years = [str(1990 + i % 3) for i in range(ROWS)]
    assert kind(years) == NUMBERS
    assert kind(years, Wish(categorical=["x"])) == CATEGORIES
    assert kind([str(i) for i in range(ROWS)], Wish(numeric=["x"])) == NUMBERS
    marked = ["?" if i == 4 else f"{i}.5" for i in range(ROWS)]
    assert kind(marked, Wish(missing={"?"})) == NUMBERS
    with pytest.raises(UserError, match=r'"trainer.task_options.numeric_columns": the data has no column "y"'):
        kind(years, Wish(numeric=["y"]))
    with pytest.raises(UserError, match=r'names "x", and so does "numeric_columns"'):
        kind(years, Wish(numeric=["x"], categorical=["x"]))
    with pytest.raises(UserError, match="which is the column to predict"):
        find(Table(column(years)), ["sure"], Wish(categorical=["x"]), [])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["1", "2", "many"], "column \"x\" in test must hold numbers, but row 3 .*is 'many'"),
        (["1", "1_000"], "row 2 .* is '1_000'"),
        ([1, True], "row 2 .* is 'True'"),
        (["1", "-inf"], "must hold finite numbers, but row 2 .* is -inf"),
        (["1e999"], "row 1 .* is inf"),
        ([10**400], "row 1 .* is inf"),
    ],
)
def test_what_is_no_finite_number_is_named_with_its_row(values: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_numbers(Table({"x": values}), "x", "test", ())


def test_categories_are_the_same_in_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.csv").write_text("x,n\n Rome ,1\nOslo,\n,2.5\n")
    (tmp_path / "a.jsonl").write_text('{"x": "Rome", "n": 1}\n{"x": "Oslo", "n": null}\n{"x": null, "n": 2.5}\n')
    dictionary = pa.array(["Rome", "Oslo", None]).dictionary_encode()
    pq.write_table(pa.table({"x": dictionary, "n": pa.array([1, None, 2.5], pa.float32())}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        table = read_file(tmp_path / name)
        codes, names = read_names(table, "x", "train", ())
        assert (codes.tolist(), names) == ([0, 1, -1], ["Rome", "Oslo"]), name
        np.testing.assert_array_equal(read_numbers(table, "n", "train", ()), [1, np.nan, 2.5])


def test_true_is_not_1() -> None:
    codes, names = read_names(Table({"x": [1, True, "1", 1.0]}), "x", "train", ())
    assert (codes.tolist(), names) == ([0, 1, 0, 2], ["1", "True", "1.0"])


def test_declared_classes_are_names(tmp_path: Path) -> None:
    table = Table({"x": [1, 0, -1, 1]}, classes={"x": ["cold", "warm"]})
    found = find(table, ["x"], Wish(), [])["x"]
    assert isinstance(found, Names)
    assert (found.codes.tolist(), found.names) == ([0, 1, -1, 0], ["warm", "cold"])


def test_a_table_that_lacks_columns_names_them_all() -> None:
    kinds = {"a": NUMBERS, "b": CATEGORIES, "c": NUMBERS}
    with pytest.raises(UserError, match=r'--input new.csv lacks the columns "a", "c".* has: b, more'):
        read(Table({"b": ["x"], "more": ["1"]}), kinds, "--input new.csv", ())
    found = read(Table({"c": ["3"], "more": ["?"], "b": ["x"], "a": ["1"]}), kinds, "--input", ())
    assert list(found) == ["a", "b", "c"]
