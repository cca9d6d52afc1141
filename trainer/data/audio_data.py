"""Datasets of clips as features of one shape: class folders, tables and saved datasets, computed once and cached."""

from __future__ import annotations

import importlib.metadata
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import audio, audio_files, labelled, sources, tables, targets
from .audio_files import CLIPS
from .cache import cached, hash_files
from .feature_extractors import Extractor
from .labelled import Labelled, LabelledSplit, Source
from .labelled_files import folder_of, with_paths
from .reading import read_each
from .table_files import Table

# Increase it when the same content is read in another way.
_VERSION = 2
# What features depend on. Some extractors compute in another way if torchaudio is installed.
_PACKAGES = ("datasets", "numpy", "scipy", "soundfile", "torch", "torchaudio", "transformers")

FrontEnd = audio.LogMel | Extractor


@dataclass(frozen=True)
class AudioSplit(LabelledSplit):
    """The features of one split's clips.

    Attributes:
        clip: (N, 1, bands, frames) int16 in 0.01 dB, or (N, ...) float32 from an extractor.
        length: (N,) int64, the samples of a clip that are not padding; -1 if the model does not take this length.
    """

    clip: Tensor
    length: Tensor

    def mean_and_std(self) -> tuple[float, float]:
        """Mean and standard deviation of log-mel features, in 0.01 dB."""
        (mean,), (std,) = self.moments(self.clip[0].numel())
        return round(mean, 4), round(std, 4) or 1.0


def versions() -> list[str]:
    """The versions of what features depend on. Nothing is imported: no rank needs it if the cache has the features."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found


@dataclass(frozen=True)
class Columns:
    """The options that say where clips are."""

    config_name: str | None = None
    split_column: str | None = None
    audio_column: str | None = None
    audio_folder: str | None = None
    group_column: str | None = None


def read_clips(
    data: sources.Data, front: FrontEnd, seconds: float | None, columns: Columns, wish: targets.Wish
) -> tuple[Labelled[AudioSplit], FrontEnd]:
    """A dataset of labelled clips as features; from the cache if they were computed before.

    Args:
        data: what `tables.read` takes.
        front: makes features. Its `samples` are not used.
        seconds: clips are cut or padded to it; None for the longest clip of all splits.
        columns: where clips are.
        wish: what is learnt of a clip, and the columns that hold it.

    Returns:
        The dataset, and what makes the same features of other clips.

    Raises:
        UserError: anything about the data that must change.
    """
    audio.soundfile()
    read = partial(
        tables.read,
        data,
        config_name=columns.config_name,
        split_column=columns.split_column,
        folder=partial(folder_of, kind=CLIPS),
    )
    content, found = tables.content_of(data, read)
    loaded = found
    if loaded is None and _are_tables(data):
        loaded = read()
    named: list[Path] = []
    if loaded is not None:
        loaded = _with_paths(loaded, data, columns)
        column = labelled.file_column(loaded["train"], columns.audio_column, CLIPS)
        named = audio_files.named_files(loaded, column, data)
    key = {
        "data": content,
        "named": hash_files(*named) if named else None,
        "columns": [columns.config_name, columns.split_column, columns.audio_column, columns.group_column, *wish.key],
        "folder": columns.audio_folder,
        "front": [front.rate, {name: value for name, value in front.facts.items() if name != "samples"}],
        "seconds": seconds,
        "versions": versions(),
        "reading": _VERSION,
    }

    def parts_of(splits: dict[str, Table]) -> tuple[dict[str, Source], list[str]]:
        label_columns = labelled.label_columns(splits["train"], data, wish, CLIPS)
        column = labelled.file_column(splits["train"], columns.audio_column, CLIPS)
        parts = labelled.table_sources(splits, CLIPS, column, None, label_columns, columns.group_column, wish)
        return parts, label_columns

    def build() -> tuple[dict[str, Tensor], dict[str, Any]]:
        splits = loaded or _with_paths(read(), data, columns)
        parts, label_columns = parts_of(splits)
        declared = targets.declared_names(splits["train"], label_columns, wish)
        return _computed(parts, front, seconds, wish, declared, label_columns, tables.notes_of(splits))

    arrays, facts = cached("audio", key, build)
    clips = labelled.from_cache(
        AudioSplit, arrays, facts, lambda: parts_of(loaded or _with_paths(read(), data, columns))[0]
    )
    return clips, fitted(front, facts["samples"])


def fitted(front: FrontEnd, samples: int) -> FrontEnd:
    """The front end for clips of this number of samples."""
    if isinstance(front, Extractor):
        front.samples = samples
        return front
    return replace(front, samples=samples)


def _are_tables(data: sources.Data) -> bool:
    """Whether data are tables, not folders of clips. Tables may name clips that lie elsewhere."""
    for part in [data] if isinstance(data, str) else data.values():
        found = sources.find(part)
        if found is not None and not found.saved and not any(map(audio_files.is_audio, found.files)):
            return True
    return False


def _with_paths(splits: Mapping[str, Table], data: sources.Data, columns: Columns) -> dict[str, Table]:
    """The splits with paths that can be opened."""
    column = labelled.file_column(splits["train"], columns.audio_column, CLIPS)
    result = {}
    for split, table in splits.items():
        given = columns.audio_folder or (data if isinstance(data, str) else data.get(split, ""))
        base = Path(given).expanduser() if columns.audio_folder else audio_files.base_of(given)
        result[split] = with_paths(table, column, base) if column in table.columns else table
        own = result[split].columns.get(column)
        # Paths stand in a list; an array of pyarrow holds files themselves.
        paths = Counter(value for value in own if isinstance(value, str)) if isinstance(own, list) else Counter()
        twice = next((path for path, count in paths.items() if count > 1), None)
        if twice is not None:
            raise UserError(
                f'"trainer.task_options.data": {twice} has two rows in {split}, so it would count twice. Remove one of '
                "them."
            )
    return result


def _computed(
    parts: Mapping[str, Source],
    front: FrontEnd,
    seconds: float | None,
    wish: targets.Wish,
    declared: list[str] | None,
    label_columns: list[str],
    notes: list[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the cache holds. Labels are checked first, and headers before any clip is decoded."""
    from tqdm import tqdm

    numbers, classes = targets.numbered({split: part.labels for split, part in parts.items()}, wish, declared)
    longest, name = 0.0, ""
    entries = [entry for part in parts.values() for entry in part.named]
    for own, length in read_each(entries, audio.length_s, CLIPS.word, audio.reason):
        longest, name = max((longest, name), (length, own), key=lambda pair: pair[0])
    if seconds is None and longest > audio.LONGEST_S:
        raise UserError(
            f"The longest clip, {name}, has {longest:,.1f} s, and all clips would be padded to it.\nSet max_seconds in "
            "trainer.task_options: longer clips are cut to it, and shorter ones are padded."
        )
    # Less a little, because a length in seconds is rounded.
    samples = math.ceil(longest * front.rate - 1e-6) if seconds is None else round(seconds * front.rate)
    front = fitted(front, max(1, samples))
    front.check()
    progress = tqdm(total=len(entries), desc="clips", unit="clip", leave=False, disable=None)
    remarks: Counter[str] = Counter()
    arrays: dict[str, Tensor] = {}
    with progress:
        for split, source in parts.items():
            rows, lengths, silent = [], [], 0
            reads = partial(audio.read_clip, rate=front.rate, samples=front.samples)
            for _, (clip, done) in read_each(source.named, reads, CLIPS.word, audio.reason):
                features, length = prepared(front, clip)
                rows.append(features)
                lengths.append(length)
                silent += not clip.any()
                remarks.update(filter(None, done.split("; ")))
                progress.update()
            if silent:
                notes.append(f"{silent:,} clip{'s' * (silent > 1)} of {split} are silent")
            arrays |= _arrays(split, rows, lengths, numbers[split])
    notes += [f"{count:,} clip{'s' * (count > 1)} had to be {remark}" for remark, count in sorted(remarks.items())]
    first = next(name for name, _ in next(iter(parts.values())).named)
    facts = labelled.facts_of(parts, classes, label_columns, notes, first, numbers)
    return arrays, facts | {"samples": front.samples}


def prepared(front: FrontEnd, clip: np.ndarray) -> tuple[np.ndarray, int]:
    """The features of a clip (n,) float64, and its length in samples; -1 if the model does not take it."""
    if isinstance(front, Extractor):
        features, length = front(clip)
        return features, -1 if length is None else length
    return front(clip), -1


def _arrays(split: str, rows: list[np.ndarray], lengths: list[int], labels: np.ndarray) -> dict[str, Tensor]:
    """What the cache holds of one split. It empties `rows` while it copies: features are not in memory twice."""
    clip = torch.empty((len(rows), *rows[0].shape), dtype=torch.from_numpy(rows[0]).dtype)
    for row in range(len(rows)):
        clip[row] = torch.from_numpy(rows[row])
        rows[row] = rows[0][:0]
    # Only whole numbers are standardised here.
    whole = not clip.is_floating_point()
    return {
        f"clip_{split}": clip,
        f"length_{split}": torch.tensor(lengths),
        f"label_{split}": torch.from_numpy(labels),
        f"sums_{split}": labelled.sums(clip) if whole else torch.zeros(len(clip), 1, 2, dtype=torch.int64),
        f"digest_{split}": labelled.digests(clip),
    }
