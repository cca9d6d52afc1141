"""Standardising, missing values and categories, as the training split decides them; what is kept as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from trainer.data.features import Names
from trainer.data.preparation import Categorical, Numeric, Preparation, described, fit, from_json, mean_and_deviation
from trainer.errors import UserError

NAN = math.nan


def fitted(notes: list[str] | None = None, **columns: Any) -> Preparation:
    return Preparation("y", *fit(columns, [] if notes is None else notes), classes=["no", "yes"])


def names(*values: str | None) -> Names:
    known = [v for v in dict.fromkeys(values) if v is not None]
    return Names(np.array([-1 if v is None else known.index(v) for v in values]), known)


def test_mean_and_deviation_are_numpys_and_do_not_depend_on_the_order() -> None:
    values = np.random.default_rng(0).normal(3, 2, 1000) * 1e6
    mean, deviation = mean_and_deviation(values)
    assert (mean, deviation) == pytest.approx((values.mean(), values.std()), rel=1e-12)
    assert mean_and_deviation(values[::-1]) == (mean, deviation)
    assert mean_and_deviation(np.full(7, 0.1)) == (0.1, 0.0)
    for scale in (1e-200, 1e200):  # their squares are no float64
        assert mean_and_deviation(np.array([1.0, 3.0]) * scale) == pytest.approx((2 * scale, scale))


def test_numbers_are_standardised_and_missing_ones_marked() -> None:
    p = fitted(a=np.array([1.0, 3.0, NAN]), b=np.array([0.0, 10.0, 5.0]))
    assert [c.marked for c in p.numeric] == [True, False]
    encoded = p.encode({"a": np.array([5.0, NAN]), "b": np.array([5.0, 5.0])}, "test", [])["numbers"]
    assert encoded.dtype == np.float32 and p.inputs == 3
    np.testing.assert_array_equal(encoded, [[3, 0, 0], [0, 0, 1]])


def test_missing_where_train_lacks_none_is_the_mean_with_a_note() -> None:
    notes: list[str] = []
    p = fitted(a=np.array([1.0, 3.0]))
    np.testing.assert_array_equal(p.encode({"a": np.array([NAN, 1.0])}, "test", notes)["numbers"], [[0], [-1]])
    assert notes == ['1 value of "a" is missing in test, and none in train: the mean of train, 2, is taken']


def test_unknown_and_missing_categories_are_0() -> None:
    notes: list[str] = []
    p = fitted(c=names("b", None, "a"))
    assert p.categorical == [Categorical("c", ["a", "b"])]
    codes = p.encode({"c": names("a", "z", None, "b")}, "test", notes)["categories"]
    assert codes[:, 0].tolist() == [1, 0, 0, 2] and codes.dtype == np.int64
    assert notes == ["1 value of \"c\" in test does not occur in train, such as 'z': counted as missing"]
    numbers = fitted(c=names("1", "2.0"))  # 2 of json is 2.0 of csv
    assert numbers.encode({"c": names("2", "1.0")}, "test", [])["categories"][:, 0].tolist() == [2, 1]


def test_what_has_one_value_is_left_out_unless_its_lack_tells() -> None:
    notes: list[str] = []
    p = fitted(
        notes, a=np.array([5.0, 5.0, 5.0]), b=np.array([5.0, NAN, 5.0]), c=names("x", "x", "x"), d=names("x", None, "x")
    )
    assert [c.name for c in p.numeric] == ["b"] and [c.name for c in p.categorical] == ["d"]
    assert [note.split('"')[1] for note in notes] == ["a", "c"]
    # Of b, only the mark was learnt: another value has no meaning.
    np.testing.assert_array_equal(p.encode({"b": np.array([900.0, NAN]), "d": names("x", "x")}, "t", [])["numbers"],
                                  [[0, 0], [0, 1]])  # fmt: skip


def test_a_number_far_from_all_others_is_refused() -> None:
    p = fitted(a=np.array([1e-9, 2e-9]))
    with pytest.raises(UserError, match=r'column "a" in --input: row 2 .* is 1e\+200, which is too far'):
        p.encode({"a": np.array([0.0, 1e200])}, "--input", [])


def test_json_keeps_every_bit() -> None:
    p = Preparation("y", [Numeric("a", 0.1 + 0.2, 1 / 3, True)], [Categorical("c", ["é", "1"])], [], Numeric("y", 1, 2))
    assert from_json(json.loads(json.dumps(p.as_json())), "columns.json") == p
    assert p.kinds == {"a": "numbers", "c": "categories"}


@pytest.mark.parametrize(
    "change",
    [
        {"numeric": [{"name": "a"}]},
        {"numeric": [{"name": "a", "mean": NAN, "deviation": 1.0}]},
        {"numeric": [{"name": "a", "mean": 0, "deviation": "1"}]},
        {"categorical": [{"name": "c", "categories": [1]}]},
        {"classes": []},
        {"classes": None},
    ],
)
def test_damaged_json_is_refused(change: dict[str, Any]) -> None:
    whole = fitted(a=np.array([1.0, 3.0])).as_json()
    assert from_json(whole, "columns.json").numeric[0].mean == 2
    for values in (whole | change, [], None):
        with pytest.raises(UserError, match=r"columns\.json is damaged"):
            from_json(values, "columns.json")


def test_columns_are_described() -> None:
    p = fitted(a=np.array([1.0, NAN, 2.0]), **{f"n{i}": np.arange(3.0) for i in range(20)}, c=names("x", "y", None))
    numbers, categories = described(p)
    assert numbers.startswith("21 columns of numbers: a (missing marked), n0, ") and numbers.endswith(" and 9 more")
    assert categories == "1 column of categories: c (2)"
