"""Columns of a table as features: numbers or categories, distinguished by what they hold.

A column holds numbers if each of its filled fields is a number. Other columns hold categories, if their values repeat.
A column that is neither, such as names or the numbers of rows, is refused: it is not left out silently, and the message
says what to type.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..wording import counted, row_at
from . import tables
from .table_files import Table

NUMBERS, CATEGORIES = "numbers", "categories"
# A column of texts may always have this many different ones. If it has more, each has to occur twice on average:
# otherwise nothing could be learnt of most of them.
FEW = 20
# Beyond it, sums over rows could overflow in float64.
LARGEST = 1e300
_AN_ID = re.compile(r"(?i:(^|[_\- ])id$)|[a-z]I[dD]$")


class Names(NamedTuple):
    """A column of categories: `codes` (rows,) int64 are positions in `names`, -1 where a value is missing."""

    codes: np.ndarray
    names: list[str]


Column = np.ndarray | Names


@dataclass(frozen=True)
class Wish:
    """What a user says of the columns.

    Attributes:
        numeric, categorical: columns whose kind the user decides.
        ignored: columns that are no features.
        missing: texts that mark a missing value, as an empty field does.
    """

    numeric: Sequence[str] = ()
    categorical: Sequence[str] = ()
    ignored: Sequence[str] = ()
    missing: Collection[str] = ()


def rows_of(column: Column, rows: np.ndarray) -> Column:
    """Some rows of a column."""
    return Names(column.codes[rows], column.names) if isinstance(column, Names) else column[rows]


def find(table: Table, columns: Sequence[str], wish: Wish, notes: list[str]) -> dict[str, Column]:
    """The features of a training set, in the order of the table, without those that are left out.

    Args:
        table: of the training set.
        columns: its columns that may be features.
        wish: what the user says of them.
        notes: takes sentences on columns that hold nothing, or another number in each row.

    Raises:
        UserError: a column is neither, or nothing could be learnt of it. The message names all of them.
    """
    _check_wish(table, columns, wish)
    found: dict[str, Column] = {}
    refused: dict[str, str] = {}
    for column in columns:
        if column in wish.ignored:
            continue
        if column in wish.numeric:
            found[column] = read_numbers(table, column, "train", wish.missing)
        elif column in wish.categorical:
            found[column] = read_names(table, column, "train", wish.missing)
        else:
            values, why = _told_apart(table, column, wish.missing)
            if why:
                refused[column] = why
            elif values is None:
                notes.append(f'the column "{column}" holds nothing and is left out')
            else:
                found[column] = values
    if refused:
        listed = "\n".join(f'  "{column}" {why}' for column, why in refused.items())
        flag = json.dumps([*wish.ignored, *refused], ensure_ascii=False)
        raise UserError(
            f"No model can learn from {'these columns' if len(refused) > 1 else 'this column'} as "
            f"{'they are' if len(refused) > 1 else 'it is'}:\n{listed}\n"
            f"To leave {'them' if len(refused) > 1 else 'it'} out: "
            f"--set 'trainer.task_options.ignored_columns={flag}'\n"
            'To use one, name it in "numeric_columns" or "categorical_columns". Texts that mark a missing value are '
            'named in "missing_values".'
        )
    if not found:
        raise UserError(
            '"trainer.task_options.data": there is no column to learn from. The data has: '
            f"{', '.join(table.column_names)}."
        )
    return found


def _check_wish(table: Table, columns: Sequence[str], wish: Wish) -> None:
    seen: dict[str, str] = {}
    named = {"numeric_columns": wish.numeric, "categorical_columns": wish.categorical, "ignored_columns": wish.ignored}
    for option, names in named.items():
        for column in names:
            tables.find_column(table.column_names, column, (), option)
            if column not in columns and option != "ignored_columns":
                raise UserError(
                    f'"trainer.task_options.{option}" names "{column}", which is the column to predict, or that of '
                    "splits or groups. Such a column is no feature."
                )
            if seen.setdefault(column, option) != option:
                raise UserError(
                    f'"trainer.task_options.{option}" names "{column}", and so does "{seen[column]}". Name it once.'
                )


def _told_apart(table: Table, column: str, missing: Collection[str]) -> tuple[Column | None, str]:
    """A column of the training set, None if it holds nothing; and why it is refused, an empty text if it is not."""
    if column in table.classes:
        return read_names(table, column, "train", missing), ""
    numbers, wrong = parsed(table, column, "train", missing)
    filled = len(numbers) - int(np.isnan(numbers).sum()) + len(wrong)
    if not filled:
        return None, ""
    if not len(wrong):
        return _finite(numbers, column, "train"), _an_id(column, numbers)
    try:
        names = read_names(table, column, "train", missing)
    except UserError:
        kind = type(table.values(column, int(wrong[0]), int(wrong[0]) + 1)[0]).__name__
        return None, f"holds neither numbers nor texts: {row_at(int(wrong[0]))} is a {kind}"
    different = len(names.names)
    if different <= FEW:
        return names, ""
    if 2 * len(wrong) <= filled:
        row = int(wrong[0])
        return None, (
            f"holds numbers in {counted(filled - len(wrong), 'row')}, but {row_at(row)} is "
            f"{names.names[names.codes[row]][:50]!r}"
        )
    if 2 * different > filled:
        comma = all(re.fullmatch(r"-?\d+,\d+", name) for name in names.names[:FEW])
        return None, f"holds {different:,} different texts in {filled:,} rows" + (
            ". They look like numbers with a decimal comma: write a point" if comma else ""
        )
    return names, ""


def _an_id(column: str, numbers: np.ndarray) -> str:
    """Why a column of numbers only numbers or names its rows; an empty text if it does not."""
    if len(numbers) <= FEW or np.isnan(numbers).any() or np.isinf(numbers).any() or (numbers % 1).any():
        return ""
    different = len(np.unique(numbers))
    if different < len(numbers):
        return ""
    if numbers.max() - numbers.min() + 1 == len(numbers):
        return f"numbers its rows, from {numbers.min():.0f} to {numbers.max():.0f}"
    return "is called like an id, and each row has its own" if _AN_ID.search(column) else ""


def read_numbers(
    table: Table, column: str, where: str, missing: Collection[str], *, target: bool = False
) -> np.ndarray:
    """A column of numbers, (rows,) float64, nan where a value is missing.

    Args:
        table: the data.
        column: its name.
        where: the split, or --input, for messages.
        missing: texts that mark a missing value.
        target: it is the column to predict, and no feature; for messages.

    Raises:
        UserError: a value is no number, or is not finite.
    """
    numbers, wrong = parsed(table, column, where, missing)
    if len(wrong):
        row = int(wrong[0])
        value = table.values(column, row, row + 1)[0]
        remedy = 'If it marks a missing value, name it in "missing_values" of trainer.task_options'
        remedy += '; if the column holds categories, name it in "categorical_columns".' if where == "train" else "."
        if target:
            remedy = 'If the column holds classes, set "problem" in trainer.task_options to "classification".'
        raise UserError(
            f'The column "{column}" in {where} must hold numbers, but {row_at(row)} is '
            f"{str(value)[:50]!r}" + others_are_none(len(wrong) - 1) + f".\nCorrect it. {remedy}"
        )
    return _finite(numbers, column, where)


def others_are_none(count: int) -> str:
    """A clause for a message on further rows that hold no number; an empty text if there are none."""
    return f"; {counted(count, 'more row holds', 'more rows hold')} no number" if count else ""


def _finite(numbers: np.ndarray, column: str, where: str) -> np.ndarray:
    """The same numbers. Raises UserError if one is infinite, or nearly so."""
    beyond = np.flatnonzero(np.abs(numbers) > LARGEST)  # nan is not
    if len(beyond):
        row = int(beyond[0])
        raise UserError(
            f'The column "{column}" in {where} must hold finite numbers, but {row_at(row)} is '
            f"{numbers[row]:g}. Correct it, or leave the field empty if the value is missing."
        )
    return numbers


def read_names(table: Table, column: str, where: str, missing: Collection[str]) -> Names:
    """A column of categories, as they are written, without blanks around them. Arguments as of `read_numbers`.

    Raises:
        UserError: a value is neither a text nor a number, nor true or false.
    """
    declared = table.classes.get(column)
    place: dict[str, int] = {}
    # Texts repeat, so each is looked at only once. Other values are not looked up, because True == 1 in a dictionary.
    known: dict[str, int] = {}
    codes = [-1] * len(table)
    for row, value in enumerate(tables.values_of(table, column, where)):
        if type(value) is str and value in known:
            codes[row] = known[value]
            continue
        if declared is not None:
            value = declared[value] if value is not None and 0 <= value < len(declared) else None
        if value is None or value != value:
            continue
        if isinstance(value, (list, tuple, dict, bytes)):
            raise UserError(
                f'The column "{column}" in {where} must hold categories, but {row_at(row)} is a '
                f"{type(value).__name__}. Leave the column out: name it in "
                '"trainer.task_options.ignored_columns".'
            )
        name = str(value).strip()
        if name and name not in missing:
            codes[row] = place.setdefault(name, len(place))
            if type(value) is str:
                known[value] = codes[row]
    return Names(np.array(codes, dtype=np.int64), list(place))


def kind_of(column: Column) -> str:
    """NUMBERS or CATEGORIES."""
    return CATEGORIES if isinstance(column, Names) else NUMBERS


def read(table: Table, kinds: Mapping[str, str], where: str, missing: Collection[str]) -> dict[str, Column]:
    """The features of another table than the training set. Its columns may have another order, and there may be more.

    Args:
        table: the data.
        kinds: column -> its kind.
        where, missing: as of `read_numbers`.

    Raises:
        UserError: the table lacks some, which the message names; or a value is not of its column's kind.
    """
    lacking = [f'"{column}"' for column in kinds if column not in table.column_names]
    if lacking:
        raise UserError(
            f"{where} lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}, which the model needs. It "
            f"has: {', '.join(table.column_names)}.\nAdd {'them' if len(lacking) > 1 else 'it'}; a field may be empty."
        )
    return {
        column: (read_numbers if kind == NUMBERS else read_names)(table, column, where, missing)
        for column, kind in kinds.items()
    }


def parsed(table: Table, column: str, where: str, missing: Collection[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """(rows,) float64 with nan for what is missing or no number, and the rows that hold no number."""
    raw = table.columns[column]
    none = np.zeros(0, dtype=np.int64)
    if not isinstance(raw, list):
        quick = _arrow_numbers(raw)
        if quick is not None:
            return quick, none
    values = tables.values_of(table, column, where)
    if missing:
        values = [None if isinstance(value, str) and value.strip() in missing else value for value in values]
    try:
        # The quick way for csv. Python reads 1_000 as a number, people do not.
        if "_" not in "".join(values):
            return np.array([float(value) if value else math.nan for value in values]), none
    except (TypeError, ValueError):
        pass
    if all(type(value) is str or value is None for value in values):
        once = {value: _number(value) for value in set(values)}  # texts repeat
        found = [once[value] for value in values]
    else:
        found = [_number(value) for value in values]
    wrong = np.array([row for row, number in enumerate(found) if number is None], dtype=np.int64)
    return np.array([math.nan if number is None else number for number in found], dtype=np.float64), wrong


def _arrow_numbers(values: Any) -> np.ndarray | None:
    """A pyarrow column of numbers as (rows,) float64; None for another."""
    import pyarrow

    kind = values.type
    types = pyarrow.types
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)):
        return None
    numbers: np.ndarray = values.cast(pyarrow.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers


def _number(value: Any) -> float | None:
    """A value as a number, nan if it is missing; None if it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        value = value.strip()
        if not value:
            return math.nan
        if "_" in value:
            return None
    elif isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf
