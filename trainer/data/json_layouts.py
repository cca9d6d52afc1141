"""Reads JSON as a table: records, columns, and what pandas and other programs write around them."""

from __future__ import annotations

import json
import re
from typing import Any

from .sources import ALIASES

# Keys that usually hold the records, beside others that describe them.
RECORD_KEYS = ("data", "rows", "records", "examples", "samples", "instances")
_LAYOUTS = (
    'The usual layouts are an object on each line, a list of objects, {"text": [...], "label": [...]}, '
    '{"data": [objects]} and {"train": [objects], "test": [objects]}; trainer/data/README.md lists all.'
)

Columns = dict[str, list[Any]]


def read_json(text: str, lines: bool) -> tuple[Columns, list[str]]:
    """Columns, and notes on what is not read.

    Args:
        text: of the file.
        lines: the file is called json lines: an object on its only line is then a record, not a table.

    Raises:
        ValueError: it is no JSON, or its layout is another one.
    """
    try:
        columns, notes = _read(text, lines)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply for a table. {_LAYOUTS}") from error
    if re.search(r"\\u[dD][89a-fA-F]", text) is None:
        return columns, notes
    # JSON writes an emoji as a pair of surrogates. If the text was cut between them, half a character is left, which
    # UTF-8 cannot write.
    whole = {_whole(name): [_whole(value) for value in values] for name, values in columns.items()}
    halves = sum(a != b for name in columns for a, b in zip(columns[name], whole.get(name, columns[name])))
    if halves:
        many = f"{halves:,} texts hold" if halves > 1 else "1 text holds"
        notes = [*notes, f"{many} half of a character, such as half an emoji: it is read as \ufffd"]
    return whole, notes


def _whole(value: Any) -> Any:
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _read(text: str, lines: bool) -> tuple[Columns, list[str]]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        return _of_records(_records_of_lines(text, error)), []
    if not isinstance(whole, dict) or (lines and "\n" not in text.strip()):
        return _of_records(whole if isinstance(whole, list) else [whole]), []
    return _of_object(whole)


def _records_of_lines(text: str, whole: json.JSONDecodeError) -> list[Any]:
    """The value of each line that is not blank. whole: why the text as a whole is no JSON, for the message."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if error.msg == "Extra data" and line[error.pos :].lstrip()[:1] in ("{", "["):
                    raise ValueError(
                        f"line {number} holds several JSON values. Put each on a line of its own"
                    ) from error
                if not rows:  # not even the first line is a value, so the file was meant to be a single one
                    raise ValueError(f"{whole}. {_LAYOUTS}") from error
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _of_object(whole: dict[str, Any]) -> tuple[Columns, list[str]]:
    values = list(whole.values())
    if {"columns", "data"} <= set(whole) <= {"columns", "data", "index"}:  # pandas, orient="split"
        return _of_lists(whole["columns"], whole["data"]), []
    inner = [key for key, value in whole.items() if key in RECORD_KEYS and _holds_lists(value)]
    if len(inner) == 1:
        columns, notes = _of_object(whole[inner[0]])
        return columns, notes + _not_read(whole, inner)
    tables = [key for key, value in whole.items() if _are_records(value)]
    if tables and all(key.lower() in ALIASES for key in tables):
        rows = [{**row, "split": key} for key in tables for row in whole[key]]
        return _of_records(rows), _not_read(whole, tables)
    named = [key for key in tables if key in RECORD_KEYS or len(whole) == 1]
    if len(named) == 1:
        return _of_records(whole[named[0]]), _not_read(whole, named)
    if all(isinstance(value, list) for value in values) and values and len(tables) < 2:
        if len({len(value) for value in values}) > 1:
            lengths = ", ".join(f"{name} {len(column):,}" for name, column in whole.items())
            raise ValueError(f"its columns differ in length: {lengths}")
        return whole, []
    if all(isinstance(value, dict) and value for value in values) and len({tuple(value) for value in values}) == 1:
        if all(key.isdecimal() for key in values[0]):  # pandas, orient="columns", its default
            return {name: list(column.values()) for name, column in whole.items()}, []
        names = [] if all(key.isdecimal() for key in whole) else ["the names of the records are not read"]
        return _of_records(values), names  # pandas, orient="index", and records by their names
    if all(isinstance(value, (dict, list)) for value in values):
        raise ValueError(f"it holds {_described(whole)}. {_LAYOUTS}")
    return _of_records([whole]), []


def _of_lists(names: Any, rows: Any) -> Columns:
    lists = all(isinstance(row, list) for row in (names, rows, *rows))
    if not lists or any(len(row) != len(names) for row in rows):
        raise ValueError(f'the rows in "data" must be lists, each as long as "columns". {_LAYOUTS}')
    return {str(name): [row[i] for row in rows] for i, name in enumerate(names)}


def _are_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _holds_lists(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(inner, list) for inner in value.values())


def _not_read(whole: dict[str, Any], read: list[str]) -> list[str]:
    rest = [key for key in whole if key not in read]
    return [f"not read beside {', '.join(read)}: {', '.join(rest)}"] if rest else []


def _of_records(rows: list[Any]) -> Columns:
    odd = next((number for number, row in enumerate(rows) if not isinstance(row, dict)), None)
    if odd is not None:
        raise ValueError(f"row {odd + 1} is no record of column and value, but {str(rows[odd])[:50]!r}. {_LAYOUTS}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}


def _described(whole: dict[str, Any]) -> str:
    parts = [f"{key} ({'a list' if isinstance(value, list) else 'an object'})" for key, value in whole.items()]
    return f"an object with {', '.join(parts[:6])}{', ...' if len(parts) > 6 else ''}" if parts else "an empty object"
