"""What the training split decides of features: means, deviations and categories; kept as JSON beside the model.

Training, validation, test and prediction are prepared by the same numbers, which only the training split determines:

- Numbers are standardised, z = (x - mean) / deviation, in float64. A missing number becomes the mean, which is z = 0.
  If some are missing in the training split, a further input is 1 for missing numbers and 0 for others.
- Categories are counted from 1. A missing category is 0, and so is one that the training split does not have.
- A column with one value in the whole training split teaches nothing. It is left out with a note.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from ..errors import UserError
from ..wording import counted, row_at
from . import tables
from .features import CATEGORIES, NUMBERS, Column, Names

# Beyond it, float32 would become infinite in a layer or two.
_FARTHEST = 1e30


@dataclass(frozen=True)
class Numeric:
    """A column of numbers. `marked`: whether a further input says which values are missing.

    A deviation of 0 means that all filled fields of the training split are alike: then only the further input teaches.
    """

    name: str
    mean: float
    deviation: float
    marked: bool = False


@dataclass(frozen=True)
class Categorical:
    """A column of categories. The number of a category is its position plus 1."""

    name: str
    categories: list[str]


@dataclass(frozen=True)
class Preparation:
    """How a table becomes arrays.

    Attributes:
        label: the column to predict.
        numeric, categorical: the features, in the order of the model's inputs.
        classes: the names of the classes; none for regression.
        target: mean and deviation of the target, for regression.
    """

    label: str
    numeric: list[Numeric]
    categorical: list[Categorical]
    classes: list[str] = dataclasses.field(default_factory=list)
    target: Numeric | None = None

    @property
    def kinds(self) -> dict[str, str]:
        """Column -> its kind, as `features.read` takes it."""
        return {c.name: NUMBERS for c in self.numeric} | {c.name: CATEGORIES for c in self.categorical}

    @property
    def inputs(self) -> int:
        """How many numbers a row has."""
        return len(self.numeric) + sum(column.marked for column in self.numeric)

    def as_json(self) -> dict[str, Any]:
        """JSON values; floats keep every bit."""
        return dataclasses.asdict(self)

    def encode(self, columns: Mapping[str, Column], where: str, notes: list[str]) -> dict[str, np.ndarray]:
        """Arrays: numbers (rows, inputs) float32 and categories (rows, columns) int64, where there are such.

        Args:
            columns: what `features.read` gives.
            where: the split, or --input, for messages.
            notes: takes sentences on values that the training split does not have.

        Raises:
            UserError: a number is too far from those of the training split.
        """
        arrays = {}
        if self.numeric:
            values = [_standardised(column, columns[column.name], where, notes) for column in self.numeric]
            marks = [np.isnan(cast(np.ndarray, columns[column.name])) for column in self.numeric if column.marked]
            arrays["numbers"] = np.stack([*values, *marks], axis=1).astype(np.float32)
        if self.categorical:
            codes = [_numbered(column, columns[column.name], where, notes) for column in self.categorical]
            arrays["categories"] = np.stack(codes, axis=1)
        return arrays


def from_json(values: Any, where: str) -> Preparation:
    """What `as_json` gave. Raises UserError if it is anything else."""
    try:
        target = values["target"]
        found = Preparation(
            str(values["label"]),
            [Numeric(**column) for column in values["numeric"]],
            [Categorical(**column) for column in values["categorical"]],
            list(values["classes"]),
            None if target is None else Numeric(**target),
        )
        numbers = [*found.numeric, *([] if found.target is None else [found.target])]
        good = all(math.isfinite(c.mean) and 0 <= c.deviation < math.inf for c in numbers)
        texts = [*found.classes, *(name for c in found.categorical for name in c.categories)]
        if not good or not all(isinstance(name, str) for name in texts) or bool(found.classes) == bool(target):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is damaged: it does not say how columns are prepared.") from error
    return found


def fit(columns: Mapping[str, Column], notes: list[str]) -> tuple[list[Numeric], list[Categorical]]:
    """The features, as the training split decides them.

    Args:
        columns: of the training split alone.
        notes: takes a sentence on each column that is left out.
    """
    numeric, categorical = [], []
    for name, column in columns.items():
        if isinstance(column, Names):
            present = np.unique(column.codes)
            categories = tables.distinct(column.names[code] for code in present if code >= 0)
            if len(categories) + bool(present[0] < 0) > 1:
                categorical.append(Categorical(name, categories))
                continue
        else:
            lacking = bool(np.isnan(column).any())
            mean, deviation = mean_and_deviation(column[~np.isnan(column)])
            if deviation or (lacking and not np.isnan(column).all()):
                numeric.append(Numeric(name, mean, deviation, lacking))
                continue
        notes.append(f'the column "{name}" has one value in the whole of train and is left out')
    return numeric, categorical


def mean_and_deviation(values: np.ndarray) -> tuple[float, float]:
    """The mean and the standard deviation (divided by n) of numbers (n,) float64; a deviation of 0 if all are equal.

    Sums are rounded once, by `math.fsum`. So neither the order of rows nor a machine's vector units change a bit.
    """
    if not len(values):
        return 0.0, 0.0
    least, most = float(values.min()), float(values.max())
    if least == most:
        return least, 0.0
    mean = math.fsum(values) / len(values)
    apart = values - mean
    scale = float(np.abs(apart).max())  # without it, squares of very large or small numbers would leave float64
    share = apart / scale
    return mean, scale * math.sqrt(math.fsum(share * share) / len(values))


def _standardised(column: Numeric, values: Any, where: str, notes: list[str]) -> np.ndarray:
    missing = np.isnan(values)
    result = np.zeros(len(values))
    if column.deviation:
        with np.errstate(over="ignore"):
            result = np.where(missing, 0.0, (values - column.mean) / column.deviation)
    far = np.flatnonzero(np.abs(result) > _FARTHEST)
    if len(far):
        row = int(far[0])
        raise UserError(
            f'The column "{column.name}" in {where}: {row_at(row)} is {values[row]:g}, which is too far '
            f"from those of train (mean {column.mean:g}, standard deviation {column.deviation:g}). Correct it, or "
            "leave the field empty if the value is missing."
        )
    if missing.any() and not column.marked:
        of = f'of "{column.name}"'
        values_are = counted(int(missing.sum()), f"value {of} is", f"values {of} are")
        notes.append(
            f"{values_are} missing in {where}, and none in train: the mean of train, {column.mean:g}, is taken"
        )
    return result


def _numbered(column: Categorical, values: Any, where: str, notes: list[str]) -> np.ndarray:
    place = tables.places(column.categories)
    found = [place(name) for name in values.names]
    # The 0 at the end is for the code -1, a missing value: numpy reads index -1 as the last one.
    table = np.array([*(0 if p is None else p + 1 for p in found), 0], dtype=np.int64)
    codes: np.ndarray = table[values.codes]
    unknown = np.array([p is None for p in found] + [False])[values.codes]
    if unknown.any():
        first = values.names[values.codes[np.flatnonzero(unknown)[0]]]
        of = f'of "{column.name}" in {where}'
        values_do = counted(int(unknown.sum()), f"value {of} does", f"values {of} do")
        notes.append(f"{values_do} not occur in train, such as {first!r}: counted as missing")
    return codes


def described(preparation: Preparation, most: int = 12) -> Sequence[str]:
    """Lines for people: the columns that are read as numbers, and as categories with how many there are."""
    numbers = [column.name + " (missing marked)" * column.marked for column in preparation.numeric]
    names = [f"{column.name} ({len(column.categories):,})" for column in preparation.categorical]
    return [
        f"{len(shown)} column{'s' * (len(shown) > 1)} of {kind}: {', '.join(shown[:most])}"
        + (f" and {len(shown) - most} more" if len(shown) > most else "")
        for kind, shown in (("numbers", numbers), ("categories", names))
        if shown
    ]
