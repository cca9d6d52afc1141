"""Files that lie beside data and are none: settings of runs, files of models, descriptions, and what runs write."""

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
