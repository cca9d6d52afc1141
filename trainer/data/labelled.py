"""Samples with labels, such as decoded images or clips of sound: choosing rows, folds, and what a run says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import held_out, sources, tables, targets
from .cut import Cut
from .labelled_files import Contents, Kind
from .table_files import Table

LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "fine_label", "y")


@dataclass(frozen=True)
class LabelledSplit:
    """One split: the fields that every kind of samples has. All are tensors with a row for each sample.

    Attributes:
        label: (N,) int64, (N, classes) float32 of 0 and 1, or (N,) float64: see `targets.numbered`.
        sums: (N, C, 2) int64, each sample's sum of numbers and of squares: exact for any choice of samples.
        digest: (N, 16) uint8, a hash of each sample.
    """

    label: Tensor
    sums: Tensor
    digest: Tensor

    def select(self: Part, rows: np.ndarray) -> Part:
        """Some of the samples. rows: (n,) int64."""
        index = torch.from_numpy(rows)
        return replace(self, **{f.name: getattr(self, f.name).index_select(0, index) for f in fields(self)})

    def moments(self, numbers: int) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel. The sums are of whole numbers, so they agree on every machine.

        Args:
            numbers: how many numbers one channel of a sample has.
        """
        totals, count = self.sums.sum(0).tolist(), len(self.label) * numbers
        mean = [total / count for total, _ in totals]
        return mean, [max(squares / count - m * m, 0.0) ** 0.5 for (_, squares), m in zip(totals, mean)]


Part = TypeVar("Part", bound=LabelledSplit)


@dataclass(frozen=True)
class Labelled(Generic[Part]):
    """A dataset.

    Attributes:
        splits: its splits.
        classes: their names; none where numbers are predicted.
        notes: what was left out, and what was done to the samples, in sentences.
        first: the name of the first sample of train, and its class.
        groups: split -> the group of each sample, where a column of groups is named.
        label_columns: the columns that the labels come from.
        files: finds the file of each sample, split by split; None where samples are no files.
    """

    splits: dict[str, Part]
    classes: list[str]
    notes: list[str]
    first: tuple[str, str]
    groups: dict[str, list[Any]]
    label_columns: list[str]
    files: Callable[[], dict[str, list[str]]] | None = None

    def cut(self, cut: Cut | None, fractions: Mapping[str, float], seed: int) -> Labelled[Part]:
        """The dataset with its splits in order; parts of train become those that it lacks. Or the splits of a fold.

        Args:
            cut: of a fold; None in an ordinary run.
            fractions: split -> share of train that it gets if the data lacks it.
            seed: see `held_out`.

        Raises:
            UserError: there are too few samples for the folds.
        """
        if cut is not None:
            return self._in_fold(cut)
        train = self.splits["train"]
        wanted = {name: part for name, part in fractions.items() if name not in self.splits}
        strata = targets.strata(train.label.numpy())
        chosen = held_out.held_out(len(train.label), wanted, seed, strata, self.groups.get("train"))
        if list(chosen) == ["train"]:
            return self
        splits = sources.in_order(self.splits | {name: train.select(rows) for name, rows in chosen.items()})
        return replace(self, splits=splits, groups=self.groups | tables.parted(self.groups.get("train"), chosen))

    def _in_fold(self, cut: Cut) -> Labelled[Part]:
        chosen = cut.chosen(self.splits)
        first, *_ = parts = list(chosen.values())
        whole = replace(first, **{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(first)})
        known = [self.groups.get(name) for name in chosen]
        groups = [group for own in known if own is not None for group in own]
        if groups and None in known:
            raise UserError("The column of groups must be in all splits that are put together and cut into folds.")
        rows = cut(len(whole.label), targets.classes(whole.label.numpy()), groups or None)
        if self.files is not None:
            files = self.files()
            cut.files = [file for name in chosen for file in files[name]]
        splits = {name: whole.select(own) for name, own in rows.items()}
        return replace(self, splits=splits, groups=tables.parted(groups or None, rows))


def duplicates_note(splits: Mapping[str, LabelledSplit]) -> list[str]:
    """A sentence for each split that shares samples with train."""
    return tables.duplicates_note({name: [d.tobytes() for d in s.digest.numpy()] for name, s in splits.items()})


def sums(samples: Tensor) -> Tensor:
    """(N, C, 2) int64: the sum of each sample's numbers, (N, C, ...) whole ones, and of their squares."""
    parts = []
    # In blocks of 16 Mi numbers: as int64, all samples at once would take several times their memory.
    for block in samples.split(max(1, (16 << 20) // samples[0].numel())):
        wide = block.flatten(2).to(torch.int64)
        parts.append(torch.stack([wide.sum(2), (wide * wide).sum(2)], dim=2))
    return torch.cat(parts)


def digests(samples: Tensor) -> Tensor:
    """(N, 16) uint8: a hash of each sample's bytes."""
    hashes = b"".join(hashlib.blake2b(s.contiguous().numpy().data, digest_size=16).digest() for s in samples)
    return torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, 16)


@dataclass
class Source:
    """A split before its samples are decoded: where they come from, and their labels."""

    count: int
    named: Iterable[tuple[str, Any]]  # (name for messages, bytes or path or array)
    labels: targets.Labels  # what `targets.read` gives
    groups: list[Any] | None = None

    def files(self) -> list[str] | None:
        """The file of each sample; None if a sample has no file of its own, such as a row of an array."""
        found = []
        for _, content in self.named:
            if not isinstance(content, str):
                return None
            found.append(content)
        return found if len(found) == self.count else None


def files_of(parts: Mapping[str, Source]) -> dict[str, list[str]]:
    """The file of each sample, split by split; empty unless every sample is a file."""
    found = {split: part.files() for split, part in parts.items()}
    return {split: files for split, files in found.items() if files is not None} if None not in found.values() else {}


def label_columns(train: Table, data: sources.Data, wish: targets.Wish, kind: Kind) -> list[str]:
    """The columns of labels. Raises UserError."""
    named = wish.column is not None or wish.columns or wish.problem == targets.SEVERAL
    if not named and not {c.lower() for c in train.column_names} & set(LABEL_COLUMNS):
        raise UserError(
            f'"trainer.task_options.data": the {kind.word}s of {data} have no labels, only the columns '
            f"{', '.join(train.column_names)}.\nPut each class's {kind.word}s into a folder of its own, or name the "
            "column with label_column in trainer.task_options."
        )
    return targets.columns_of(train, wish, LABEL_COLUMNS)


def file_column(train: Table, given: str | None, kind: Kind) -> str:
    """The column of files: the option's, the one that the data declares, or that of a usual name. Raises UserError."""
    if given is None:
        given = train.images[0] if len(train.images) == 1 else None
    return tables.find_column(train.column_names, given, kind.columns, kind.option)


def table_sources(
    splits: Mapping[str, Table],
    kind: Kind,
    column: str,
    folders: Sequence[Path] | None,
    labels: Sequence[str],
    group_column: str | None,
    wish: targets.Wish,
) -> dict[str, Source]:
    """Files and labels of tables. folders: see `Contents`. Raises UserError."""
    parts = {}
    for split, table in splits.items():
        for name in (column, *labels):
            if name not in table.column_names:
                raise UserError(
                    f'"trainer.task_options.data": the split {split} has no column "{name}", only '
                    f"{', '.join(table.column_names)}."
                )
        parts[split] = Source(
            len(table),
            Contents(table, split, column, kind, folders),
            targets.read(table, labels, wish, split),
            tables.groups(table, group_column, split),
        )
    return parts


def facts_of(
    parts: Mapping[str, Source],
    classes: list[str],
    columns: Sequence[str],
    notes: list[str],
    first: str,
    numbers: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """What a cache keeps beside the arrays. first: the name of the first sample."""
    label = targets.shown(classes, next(iter(numbers.values()))[0])
    name = "/".join(first.split("/")[-3:])  # of a file, with its folder
    return {
        "splits": list(parts),
        "classes": classes,
        "notes": notes,
        "first": [name, label],
        "groups": {split: part.groups for split, part in parts.items() if part.groups},
        "label_columns": list(columns),
        "files": bool(files_of(parts)),
    }


def from_cache(
    cls: type[Part], arrays: Mapping[str, Tensor], facts: Mapping[str, Any], read: Callable[[], Mapping[str, Source]]
) -> Labelled[Part]:
    """The dataset that a cache holds.

    Args:
        cls: of its splits.
        arrays: a tensor "field_split" for each field of the splits.
        facts: see `facts_of`.
        read: reads where samples come from. The cache knows no paths: the same content may lie elsewhere today.
    """
    names = [f.name for f in fields(cls)]
    splits = {split: cls(**{name: arrays[f"{name}_{split}"] for name in names}) for split in facts["splits"]}
    first, label = facts["first"]
    return Labelled(
        splits,
        facts["classes"],
        list(facts["notes"]),
        (first, label),
        facts["groups"],
        facts["label_columns"],
        (lambda: files_of(read())) if facts["files"] else None,
    )
