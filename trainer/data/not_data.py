"""Files that lie beside data but are not data: settings of runs, files of models, descriptions, what runs write."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .cache import folder as cache_folder

# Keys of DeepSpeed. A config of the trainer or of a study has one of them.
_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")
# Names of files of models, of descriptions of datasets, and of projects in JavaScript.
_NAMES = re.compile(
    r"(.*[._-])?config\.json|(tokenizer|special_tokens_map|added_tokens|vocab|dataset_infos|dataset-metadata|package|"
    r"package-lock)\.json|(vocab|merges)\.txt",
    re.IGNORECASE,
)
# Texts about a folder, at its top.
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|changelog|requirements)([._-].*)?\.txt", re.IGNORECASE)
# First bytes of files that are no text, whatever their names say; what each is, and what to do.
_OTHER_KINDS = (
    (
        b"PK\x03\x04",
        "a zip archive, or a workbook of Excel or LibreOffice",
        "Unpack it, or save its sheet as CSV (UTF-8)",
    ),
    (b"\xd0\xcf\x11\xe0", "a workbook of an old Excel", "Save its sheet as CSV (UTF-8)"),
    (b"\x1f\x8b", "compressed by gzip", "Add .gz to its name"),
    (b"BZh", "compressed by bzip2", "Add .bz2 to its name"),
    (b"\xfd7zXZ", "compressed by xz", "Add .xz to its name"),
    (b"PAR1", "a Parquet file", "Call it .parquet"),
    (b"ARROW1", "an Arrow file", "Write it as Parquet"),
    (b"SQLite format 3", "an SQLite database", "Write its table as CSV"),
    (b"%PDF-", "a PDF", "Write its text into a table"),
    (b"\x93NUMPY", "an array of NumPy", "Write it as CSV or Parquet"),
)
# No config is larger.
_MOST_BYTES = 1_000_000


def is_config(file: Path) -> bool:
    """Whether a file is a config of DeepSpeed, of this trainer or of a study, by its content."""
    if file.suffix.lower() != ".json":
        return False
    try:
        content = file.read_bytes() if file.stat().st_size <= _MOST_BYTES else b""
        values = json.loads(content) if any(key.encode() in content for key in _KEYS) else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and any(key in values for key in _KEYS)


def is_beside_data(file: Path, root: Path) -> bool:
    """Whether a file in the folder `root`, or below it, holds settings or a description."""
    return (
        _NAMES.fullmatch(file.name) is not None
        or (file.parent == root and _ABOUT.fullmatch(file.name) is not None)
        or is_config(file)
    )


def is_of_a_run(path: Path) -> bool:
    """Whether a folder beside the data holds our cache, or what a run has written: it changes while data is read."""
    written = ("logs/deepspeed.log", "metrics.jsonl", "manifest.json")
    return path.resolve() == cache_folder().resolve() or any((path / name).is_file() for name in written)


def other_kind(content: bytes, table: bool) -> str | None:
    """What a file is instead of a text, and what to do, by its first bytes; None if they say nothing.

    Args:
        content: its first bytes.
        table: whether it is meant to be a table. A text may well be a web page.
    """
    for start, what, remedy in _OTHER_KINDS:
        if content.startswith(start):
            return f"it is {what}. {remedy}."
    if table and content.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page, perhaps one that asks to sign in. Download the file itself."
    return None
