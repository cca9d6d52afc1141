"""What a model learns of each sample: one class, several classes, or a number. It is read from tables and checked.

The names of the three problems are those of transformers.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..wording import row_at
from . import features, preparation, report, tables
from .table_files import Table

ONE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (ONE, SEVERAL, NUMBER)
# For each row a label or a list of labels; or an array of numbers.
Labels = Sequence[Any] | np.ndarray
# Between the labels of a sample in a prediction, where no option says otherwise.
SEPARATOR = "|"
# What usually stands between the labels of one text.
_SEPARATORS = ("|", ";", ",")
_MULTI = f'"problem_type": "{SEVERAL}"'
# A column of 0 and 1, as csv, json and Python write them.
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
# Two quoted texts without a comma between them, as numpy prints a list. Python would join them.
_NO_COMMA = re.compile(r"""['"]\s+['"]""")


@dataclass(frozen=True)
class Wish:
    """The options on labels.

    Attributes:
        problem: one of `PROBLEMS`.
        column: of labels, or of numbers; None for the one with a usual name.
        columns: of 0 and 1, one a label.
        separator: between the labels of one text.
    """

    problem: str = ONE
    column: str | None = None
    columns: tuple[str, ...] = ()
    separator: str | None = None

    @property
    def key(self) -> list[Any]:
        """Its part of a cache's key."""
        return [self.problem, self.column, list(self.columns), self.separator]


def wish(problem: str, column: str | None, columns: Sequence[str], separator: str | None) -> Wish:
    """The options, checked. Raises UserError if they contradict one another."""
    for name, value in (("label_columns", columns), ("label_separator", separator)):
        if value and problem != SEVERAL:
            raise UserError(f'"trainer.task_options.{name}" has an effect only with {_MULTI}.')
    if columns and (column is not None or separator is not None):
        other = "label_column" if column is not None else "label_separator"
        raise UserError(f'"trainer.task_options.label_columns" and "{other}" are both given. Leave one of them out.')
    if len(set(columns)) < len(columns):
        raise UserError(f'"trainer.task_options.label_columns" names a column twice: {", ".join(columns)}.')
    if len(columns) == 1:
        raise UserError(
            f'"trainer.task_options.label_columns" names only one column, {columns[0]}. For a single label, leave '
            f'"problem_type" out and name the column in "label_column".'
        )
    return Wish(problem, column, tuple(columns), separator)


def columns_of(table: Table, wanted: Wish, usual: Sequence[str]) -> list[str]:
    """The columns that hold labels. Raises UserError if one is not there, or none has a usual name."""
    if wanted.columns:
        return [tables.find_column(table.column_names, c, (), "label_columns") for c in wanted.columns]
    lower = {column.lower() for column in table.column_names}
    if wanted.problem == SEVERAL and wanted.column is None and not lower & set(usual):
        flags = [c for c in table.column_names if all(_flag(v) is not None for v in table.values(c, 0, 1000))]
        shown = json.dumps(flags if len(flags) > 1 else ["COLUMN", "COLUMN"], ensure_ascii=False)
        raise UserError(
            '"trainer.task_options.label_columns" is needed: which columns hold the labels? The data has: '
            f"{', '.join(table.column_names)}.\n"
            + ("Of 0 and 1 are: " if len(flags) > 1 else "Name the columns of 0 and 1: ")
            + f"--set 'trainer.task_options.label_columns={shown}'. A single column of lists is \"label_column\"."
        )
    return [tables.find_column(table.column_names, wanted.column, usual, "label_column")]


def read(table: Table, columns: Sequence[str], wanted: Wish, split: str) -> Labels:
    """The labels of each row: a label; a list of labels; or a number, (rows,) float64. Raises UserError."""
    if wanted.problem == NUMBER:
        return _numbers(table, columns[0], split)
    if wanted.problem == ONE:
        return tables.labels(table, columns[0], split)
    if wanted.columns:
        flags = [_flags(table, column, split) for column in columns]
        return [[c for c, flag in zip(columns, row) if flag] for row in zip(*flags)]
    return _lists(table, columns[0], wanted, split)


def declared_names(table: Table, columns: Sequence[str], wanted: Wish) -> list[str] | None:
    """The names of classes, in the order that the data or the options give them; None without such."""
    if wanted.columns:
        return list(wanted.columns)
    return (table.list_classes if wanted.problem == SEVERAL else table.classes).get(columns[0])


def _numbers(table: Table, column: str, split: str) -> np.ndarray:
    if column in table.classes:
        raise UserError(
            f'"problem_type" is "{NUMBER}", but the column "{column}" in {split} holds classes '
            f'({", ".join(table.classes[column][:5])}), not numbers. For classes, leave "problem_type" out.'
        )
    numbers, wrong = features.parsed(table, column, split)
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f'The column "{column}" in {split} must hold numbers, but {row_at(row)} is '
            f"{str(table.values(column, row, row + 1)[0])[:50]!r}"
            + features.others_are_none(len(wrong) - 1)
            + '.\nCorrect it. For classes instead of numbers, leave "problem_type" out.'
        )
    return finite(numbers, column, split)


def finite(numbers: np.ndarray, column: str, split: str) -> np.ndarray:
    """The same numbers (n,) float64. Raises UserError if one is missing or infinite."""
    tables.check_complete(numbers.tolist(), split, column)
    beyond = np.flatnonzero(np.abs(numbers) > features.LARGEST)
    if len(beyond):
        raise UserError(
            f'The column "{column}" in {split} must hold finite numbers, but {row_at(int(beyond[0]))} is '
            f"{numbers[beyond[0]]:g}."
        )
    return numbers


def _flag(value: Any) -> int | None:
    return _FLAGS.get(str(value).strip().lower())


def _flags(table: Table, column: str, split: str) -> list[int]:
    values = tables.values_of(table, column, split)
    tables.check_complete(values, split, column)
    flags = [_flag(value) for value in values]
    odd = next((row for row, flag in enumerate(flags) if flag is None), None)
    if odd is not None:
        raise UserError(
            f'The column "{column}" in {split} must hold 0 or 1, but {row_at(odd)} is '
            f"{str(values[odd])[:50]!r}. Correct such rows, or leave them out."
        )
    return [flag or 0 for flag in flags]


def _lists(table: Table, column: str, wanted: Wish, split: str) -> list[list[Any]]:
    names = table.list_classes.get(column)
    values = tables.values_of(table, column, split)
    nothing = [row for row, value in enumerate(values) if value is None or (isinstance(value, str) and not value)]
    texts = any(isinstance(value, str) and value for value in values)
    if nothing and not texts:
        raise UserError(
            f'{len(nothing):,} value{"s" * (len(nothing) > 1)} of the column "{column}" in {split} '
            f"{'are' if len(nothing) > 1 else 'is'} missing (the first: {row_at(nothing[0])}). A sample "
            "without a label has an empty list: []."
        )
    if nothing and wanted.separator is None:  # the other rows are texts, so the user has to set a separator first
        row = next(row for row, value in enumerate(values) if value and isinstance(value, str))
        where = f'The column "{column}" in {split} must hold lists of labels, but {row_at(row)} is '
        raise UserError(where + _instead(values[row]))
    result = []
    for row, value in enumerate(values):
        labels = _list(value, wanted.separator)
        where = f'The column "{column}" in {split} must hold lists of labels, but {row_at(row)} is '
        if labels is None:
            raise UserError(where + _instead(value))
        odd = next((label for label in labels if not tables.is_label(label)), None)
        if odd is not None:
            raise UserError(f"{where}{value!r}, and {odd!r} is no label. Labels are whole numbers or texts.")
        if names is not None:
            if not all(isinstance(label, int) and 0 <= label < len(names) for label in labels):
                raise UserError(f"{where}{value!r}. The {len(names)} classes have the numbers from 0 on.")
            labels = [names[label] for label in labels]
        result.append(labels)
    return result


def _list(value: Any, separator: str | None) -> list[Any] | None:
    """The labels of a sample; None if the value is no list of such."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return list(value)
    if separator is not None and (value is None or isinstance(value, str)):
        return [part.strip() for part in (value or "").split(separator) if part.strip()]
    if isinstance(value, str) and value.strip()[:1] == "[" and not _NO_COMMA.search(value):
        for parse in (json.loads, ast.literal_eval):
            try:
                parsed = parse(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            return parsed if isinstance(parsed, list) else None
    return None


def _instead(value: Any) -> str:
    """What a value is, and what to do."""
    if isinstance(value, str) and not value.replace(".", "", 1).isdecimal():
        mark = next((m for m in (*_SEPARATORS, " ") if m in value.strip()), ",")
        return (
            f'the text {value[:50]!r}. If its labels stand in one text, name what is between them: "label_separator": '
            f'"{mark}" in trainer.task_options. For one class a sample, leave "problem_type" out.'
        )
    return (
        f'{value!r}. For one class a sample, leave "problem_type" out. If each label has a column of 0 and 1, name '
        'them in "label_columns".'
    )


def of_array(labels: np.ndarray, wanted: Wish, name: str, split: str) -> Labels:
    """As `read`, of an array in an .npz file: (rows,), or (rows, labels) of 0 and 1 for several labels.

    Args:
        labels: the array.
        wanted: the options.
        name, split: for messages.

    Raises:
        UserError: it holds something else.
    """
    if wanted.problem == ONE:
        result: list[Any] = labels.tolist()
        return result
    if wanted.problem == NUMBER:
        if labels.dtype.kind not in "iuf":
            raise UserError(f'"{name}" in {split} must hold numbers, but its type is {labels.dtype}.')
        return finite(labels.astype(np.float64), name, split)
    if labels.dtype.kind not in "biuf" or not np.isin(labels, (0, 1)).all():
        raise UserError(f'"{name}" in {split} must hold 0 and 1 only, a column for each label.')
    return [np.flatnonzero(row).tolist() for row in labels]


# --- as numbers -------------------------------------------------------------------------------------------------------


def numbered(
    raw: Mapping[str, Labels], wanted: Wish, declared: Sequence[str] | None, known: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The labels of each split as numbers, and the names of the classes.

    Args:
        raw: split -> what `read` gives.
        wanted: the options.
        declared: from `declared_names`.
        known: the classes of a model that was trained before: their order is kept if the data has the same.

    Returns:
        split -> (rows,) int64 positions in the names; or (rows, names) float32 of 0 and 1; or (rows,) float64, where
        there are no names.

    Raises:
        UserError: a value cannot be a label, a split has a label that train lacks, or train has fewer than two.
    """
    if wanted.problem == NUMBER:
        return {split: np.asarray(values, dtype=np.float64) for split, values in raw.items()}, []
    flat: Mapping[str, Sequence[Any]] = {split: list(rows) for split, rows in raw.items()}
    if wanted.problem == SEVERAL:
        flat = {split: [label for row in rows for label in row] for split, rows in flat.items()}
        if not flat["train"]:
            raise UserError("No sample of train has a label: nothing can be learnt.")
    # With a column for each label, one that never occurs in train is no mistake.
    names = list(wanted.columns) if wanted.columns else tables.class_names(flat, declared)
    place = {name.casefold(): i for i, name in enumerate(known)}
    if len(place) == len(names) and all(name.casefold() in place for name in names):
        names.sort(key=lambda name: place[name.casefold()])
    if wanted.problem == ONE:
        return {split: tables.label_numbers(rows, names) for split, rows in flat.items()}, names
    return {split: _matrix(list(rows), names) for split, rows in raw.items()}, names


def _matrix(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> np.ndarray:
    place = tables.places(names)
    result = np.zeros((len(rows), len(names)), dtype=np.float32)
    for line, labels in zip(result, rows):
        line[[at for label in labels if (at := place(label)) is not None]] = 1
    return result


def strata(labels: np.ndarray) -> np.ndarray | None:
    """The strata for `held_out`, (rows,) int64: the class of a row, or the rarest of several; None for numbers.

    With them, train keeps a sample of every rare label that has two.
    """
    return classes(labels) if labels.ndim == 1 else rarest(labels)


def classes(labels: np.ndarray) -> np.ndarray | None:
    """The labels (rows,) int64 if each row has one class; else None."""
    return labels if labels.ndim == 1 and labels.dtype.kind == "i" else None


def rarest(present: np.ndarray) -> np.ndarray:
    """For each row of 0 and 1, (rows, n): of its columns with 1, the one that is rarest in all rows; -1 if none is 1.

    Returns:
        (rows,) int64.
    """
    counts = present.sum(axis=0)
    order = np.argsort(counts, kind="stable")
    first = present[:, order].argmax(axis=1)
    return np.where(present.any(axis=1), order[first], -1)


# --- for people -------------------------------------------------------------------------------------------------------


def said(names: Sequence[str], labels: Mapping[str, np.ndarray]) -> str:
    """A line on the labels of each split."""
    train = labels["train"]
    if train.ndim == 2:
        each = f"{train.sum() / len(train):.2g}"
        many = f"{each} label{'s' * (each != '1')} a sample of train, {int((~train.any(axis=1)).sum()):,} have none"
        if all((own.sum(axis=1) == 1).all() for own in labels.values()):
            many += '. Each sample has exactly one label. If this is not by chance, leave "problem_type" out'
        return f"{report.classes_line(names, {s: np.nonzero(own)[1] for s, own in labels.items()})}; {many}"
    if names:
        return report.classes_line(names, labels)
    mean, deviation = preparation.mean_and_deviation(train)
    return (
        f"numbers to predict: in train mean {mean:.6g}, standard deviation {deviation:.6g}, from {train.min():.6g} to "
        f"{train.max():.6g}"
    )


def shown(names: Sequence[str], label: Any) -> str:
    """The label of one sample, a row of an array that `numbered` gave."""
    if not names:
        return f"{float(label):g}"
    if np.ndim(label):
        return ", ".join(name for name, there in zip(names, label) if there) or "no label"
    return names[int(label)]


def notes(names: Sequence[str], labels: np.ndarray, wanted: Wish) -> list[str]:
    """Sentences on what is odd about the labels of the training set, after other splits were held out."""
    return _never_in_train(names, labels) + _other_separator(names, wanted.separator)


def _other_separator(names: Sequence[str], separator: str | None) -> list[str]:
    """A note if most classes hold a mark that is probably between two labels."""
    if separator is None:
        return []
    for mark in _SEPARATORS:
        holding = [name for name in names if mark in name and separator not in name]
        if len(holding) > len(names) / 2:
            first = report.shortened(holding[0])
            return [
                f'{len(holding):,} of the {len(names):,} classes hold "{mark}", such as {first!r}, '
                f'and "label_separator" is "{separator}". If "{mark}" stands between labels, set "label_separator": '
                f'"{mark}" in trainer.task_options'
            ]
    return []


def _never_in_train(names: Sequence[str], labels: np.ndarray) -> list[str]:
    lacking = [] if labels.ndim == 1 else [names[int(i)] for i in np.flatnonzero(~labels.any(axis=0))]
    if not lacking:
        return []
    return [f"no sample of train has the label{'s' * (len(lacking) > 1)} {', '.join(lacking[:10])}: nothing is learnt"]
