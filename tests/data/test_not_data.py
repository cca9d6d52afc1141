"""Settings and descriptions beside the data are left out with a note, or refused by name where they alone are given."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trainer.data import tables
from trainer.data.sources import find, fingerprint
from trainer.errors import UserError

CONFIGS: dict[str, Any] = {
    "strong.json": {"train_batch_size": 8, "trainer": {"task": "causal_lm"}},
    "ds.json": {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}},
    "study.json": {"train_batch_size": 8, "study": {"seeds": 3}},
    "bert/config.json": {"model_type": "bert"},
    "bert/tokenizer.json": {"model": {"vocab": {}}},
    "accelerate_config.json": {"use_cpu": True},
    "dataset_infos.json": {"default": {"features": {}}},
}
CSV = "text,label\nx,1\ny,2\n"


def with_settings(folder: Path, **files: str) -> str:
    for name, values in CONFIGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    for name in ("requirements.txt", "README.txt", "bert/vocab.txt"):
        (folder / name).write_text("torch\n")
    for stem, content in files.items():
        (folder / stem.replace("_", ".")).write_text(content)
    return str(folder)


def test_tables_beside_settings(tmp_path: Path) -> None:
    found = tables.read(with_settings(tmp_path, a_csv=CSV, b_json='[{"text": "z", "label": "1"}]'))
    assert {split: table.values("text") for split, table in found.items()} == {"train": ["x", "y", "z"]}
    assert tables.notes_of(found) == [
        "10 files left out (settings or descriptions, not data): 7 .json, 3 .txt; the first is README.txt"
    ]


def test_a_corpus_beside_settings(tmp_path: Path) -> None:
    notes: list[str] = []
    data = with_settings(tmp_path, corpus_txt="To be, or not to be\n")
    assert tables.text_files(data, notes=notes) == {"train": ["To be, or not to be\n"]}
    assert notes[0].startswith("10 files left out (settings or descriptions, not data): ")


def test_folders_of_texts_beside_settings(tmp_path: Path) -> None:
    for name in ("good/readme.txt", "bad/2.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    found = tables.read(with_settings(tmp_path))
    assert sorted(found["train"].values("text")) == ["bad/2.txt", "good/readme.txt"]


def test_a_pattern_takes_no_settings_either(tmp_path: Path) -> None:
    with_settings(tmp_path, rows_json='{"text": ["x"], "label": ["1"]}')
    found = find(str(tmp_path / "*.json"))
    assert found is not None and [file.name for file in found.files] == ["rows.json"]


def test_settings_that_change_leave_the_data_as_it_is(tmp_path: Path) -> None:
    before = fingerprint(with_settings(tmp_path, a_csv=CSV))
    (tmp_path / "strong.json").write_text('{"train_batch_size": 16}')
    assert fingerprint(str(tmp_path)) == before


def test_settings_alone_are_refused_by_name(tmp_path: Path) -> None:
    data = with_settings(tmp_path)
    with pytest.raises(UserError, match=r"strong.json is a config of DeepSpeed or of this trainer, not data"):
        tables.read(data + "/strong.json")
    with pytest.raises(UserError, match=r"(?s)holds neither tables .* no files\.\n10 files left out \(settings or"):
        tables.read(data)


def test_records_that_speak_of_settings_are_data(tmp_path: Path) -> None:
    """A record in a file of its own, and files whose names only resemble those of settings."""
    for name, text in {"configs.json": "train_batch_size", "reading.json": "trainer"}.items():
        (tmp_path / name).write_text(json.dumps({"text": text, "label": "a"}))
    assert sorted(tables.read(str(tmp_path))["train"].values("text")) == ["train_batch_size", "trainer"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"PK\x03\x04 ...", "it is a zip archive, or a workbook of Excel or LibreOffice. Unpack it"),
        ("a.csv", b"\x1f\x8b\x08 ...", "it is compressed by gzip. Add .gz to its name"),
        ("a.json", b"PAR1 ...", "it is a Parquet file. Call it .parquet"),
        ("a.txt", b"%PDF-1.7", "it is a PDF"),
        ("a.csv", b"\n<!DOCTYPE html><html>", "it is a web page, perhaps one that asks to sign in"),
        ("a.csv", b'{"text": "x", "label": 1}\n', "are JSON and not separated values. Call it .jsonl"),
        ("a.jsonl", b'{"text": "x"} {"text": "y"}\n', "line 1 holds several JSON values"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        tables.read(str(tmp_path / name))


def test_a_text_may_be_a_web_page(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<html>\n</html>\n")
    assert tables.read(str(tmp_path / "a.txt"))["train"].values("text") == ["<html>", "</html>"]
