"""Each layout of JSON that the page of trainer/data lists becomes the same rows; another one is refused with these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.data import tables
from trainer.data.json_layouts import read_json
from trainer.data.table_files import read_file
from trainer.errors import UserError

COLUMNS = {"text": ["good", "bad"], "label": ["a", "b"]}
RECORDS = [{"text": "good", "label": "a"}, {"text": "bad", "label": "b"}]


@pytest.mark.parametrize(
    "layout",
    [
        RECORDS,
        COLUMNS,
        {"data": RECORDS},
        {"reviews": RECORDS},
        {"version": "1.0", "rows": RECORDS, "licence": {"name": "MIT"}},
        {"data": COLUMNS},
        {"name": "reviews", "data": COLUMNS},
        {"text": {"0": "good", "1": "bad"}, "label": {"0": "a", "1": "b"}},  # DataFrame.to_json()
        {"0": RECORDS[0], "1": RECORDS[1]},  # orient="index"
        {"r17": RECORDS[0], "r4": RECORDS[1]},
        {"columns": ["text", "label"], "index": [0, 1], "data": [["good", "a"], ["bad", "b"]]},  # orient="split"
        {"schema": {"fields": []}, "data": RECORDS},  # orient="table"
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_layouts_that_are_read(layout: Any, indent: int | None) -> None:
    assert read_json(json.dumps(layout, indent=indent), lines=False)[0] == COLUMNS


@pytest.mark.parametrize("lines", [True, False])
def test_lines_whatever_the_suffix(lines: bool) -> None:
    text = "".join(json.dumps(record) + "\n\n" for record in RECORDS)
    assert read_json(text, lines) == (COLUMNS, [])
    assert read_json(json.dumps(RECORDS), lines) == (COLUMNS, [])
    one = {"text": ["two", "words"], "label": ["a", "b"]}
    assert read_json(json.dumps(one), lines)[0] == ({"text": [one["text"]], "label": [one["label"]]} if lines else one)


def test_lists_that_are_called_like_splits_are_splits(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 2, "train": RECORDS, "dev": RECORDS[:1]}))
    found = tables.read(str(tmp_path / "a.json"))
    assert {split: table.values("text") for split, table in found.items()} == {
        "train": ["good", "bad"],
        "validation": ["good"],
    }
    assert tables.notes_of(found) == ["in a.json, not read beside train, dev: version"]


def test_what_is_not_read_is_said() -> None:
    assert read_json(json.dumps({"version": 1, "data": RECORDS}), False)[1] == ["not read beside data: version"]
    assert read_json(json.dumps({"r17": RECORDS[0]}), False)[1] == ["the names of the records are not read"]


def test_half_a_character_is_read_as_one_that_stands_for_it() -> None:
    lines = "\n".join(json.dumps({"text": text, "label": "a"}) for text in ("cut \ud83d", "whole \U0001f600", "\u00e9"))
    columns, notes = read_json(lines, lines=True)
    assert columns["text"] == ["cut \ufffd", "whole \U0001f600", "\u00e9"]
    assert notes == ["1 text holds half of a character, such as half an emoji: it is read as \ufffd"]
    assert json.dumps(columns["text"], ensure_ascii=False).encode()


@pytest.mark.parametrize("lines", [True, False])
def test_deep_json_is_no_table(lines: bool) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json("[" * 100_000 + "]" * 100_000, lines)


def test_a_record_in_a_file_of_its_own_stays_one_row() -> None:
    record = {"text": "good", "entities": [{"from": 0}], "source": {"page": 1}}
    assert read_json(json.dumps(record, indent=1), False)[0] == {name: [value] for name, value in record.items()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": RECORDS, "b": RECORDS}, r"it holds an object with a \(a list\), b \(a list\)\. The usual layouts"),
        ({"a": {"x": 1}, "b": [1]}, r"it holds an object with a \(an object\), b \(a list\)\. The usual layouts"),
        ({}, "it holds an empty object. The usual layouts"),
        ([["text", "label"], ["good", "a"]], r"row 1 is no record .* but .*text.*\. The usual layouts"),
        ("text", "row 1 is no record .* The usual layouts"),
        ({"text": ["good"], "label": ["a", "b"]}, "its columns differ in length: text 1, label 2"),
        ({"columns": ["text"], "data": [["a", "b"]]}, 'the rows in "data" must be lists, each as long as "columns"'),
    ],
)
def test_another_layout_is_named_with_those_that_are_read(tmp_path: Path, content: Any, words: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="a.json cannot be read: " + words):
        read_file(tmp_path / "a.json")


def test_a_slip_in_a_file_of_one_value_is_shown_in_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "good"},\n]\n')
    with pytest.raises(UserError, match=r"cannot be read: .* line [23] column"):
        read_file(tmp_path / "a.json")
