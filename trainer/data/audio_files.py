"""Which files are sound, in training and in prediction alike; tables that name such files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from . import sources
from .audio import OTHERS, SUFFIXES
from .labelled_files import Kind
from .table_files import Table

COLUMNS = ("audio", "path", "file", "file_name", "filename", "clip", "recording", "wav", "sound")


def is_audio(file: Path) -> bool:
    """Whether a file is meant to be sound, by its suffix."""
    return file.suffix.lower() in (*SUFFIXES, *OTHERS)


CLIPS = Kind("clip", "a clip", is_audio, SUFFIXES, COLUMNS)


def base_of(part: str) -> Path:
    """The folder at which the paths in a table begin: that of the table."""
    path = Path(part).expanduser()
    return path.parent if path.is_file() else path


def named_files(splits: Mapping[str, Table], column: str, data: sources.Data) -> list[Path]:
    """The files that tables name outside of the folders of the data. A hash of the data does not cover them."""
    parts = [data] if isinstance(data, str) else list(data.values())
    covered = [os.path.abspath(Path(part).expanduser()) for part in parts]
    found: dict[str, None] = {}
    for table in splits.values():
        first = table.values(column, 0, 1) if column in table.columns else []
        if first and isinstance(first[0], str):
            found |= dict.fromkeys(value for value in table.values(column) if isinstance(value, str) and value)

    def outside(path: str) -> bool:
        return not any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in covered)

    return [Path(path) for path in found if outside(path) and os.path.isfile(path)]
