"""Datasets of images as uint8 tensors: class folders, tables, saved datasets and .npz, decoded once and cached."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import image_arrays, npz, sources, tables, targets
from .cache import cached
from .cut import Cut
from .image_files import image_folder
from .images import BLOCK, Size, decode_all
from .table_files import Table

IMAGE_COLUMNS = ("image", "img", "images", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "fine_label", "y")
# Increase it when the same content is read in another way.
_VERSION = 4
_ONE_CLASS = targets.Wish()


@dataclass(frozen=True)
class ImageSplit:
    """Decoded images of one split.

    Attributes:
        image: (N, C, H, W) uint8.
        label: (N,) int64, (N, classes) float32 of 0 and 1, or (N,) float64: see `targets.numbered`.
        sums: (N, C, 2) int64, each image's sum of pixels and of squared pixels: exact for any choice of images.
        digest: (N, 16) uint8, a hash of each image.
    """

    image: Tensor
    label: Tensor
    sums: Tensor
    digest: Tensor

    def select(self, rows: np.ndarray) -> ImageSplit:
        """Some of the images. rows: (n,) int64."""
        index = torch.from_numpy(rows)
        return ImageSplit(*(t.index_select(0, index) for t in (self.image, self.label, self.sums, self.digest)))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, pixels from 0 to 1. Exact sums: the same on every machine."""
        totals = self.sums.sum(0).tolist()  # of each channel
        count = len(self.image) * self.image[0, 0].numel()
        mean = [pixels / count for pixels, _ in totals]
        std = [max(squares / count - m * m, 0.0) ** 0.5 for (_, squares), m in zip(totals, mean)]
        # A channel that is constant is only centred.
        return [round(m / 255, 6) for m in mean], [round(s / 255, 6) or 1.0 for s in std]


@dataclass(frozen=True)
class Images:
    """A dataset of images.

    Attributes:
        splits: its splits.
        classes: their names; none where numbers are predicted.
        label_columns: the columns that the labels come from.
        notes: what was left out, and what was done to the images, in sentences.
        first: the name of the first image of train, and its class.
        groups: split -> the group of each image, where a column of groups is named.
    """

    splits: dict[str, ImageSplit]
    classes: list[str]
    notes: list[str]
    first: tuple[str, str]
    groups: dict[str, list[Any]]
    label_columns: list[str]


def in_fold(found: Images, cut: Cut) -> dict[str, ImageSplit]:
    """The splits of one fold. Raises UserError."""
    chosen = cut.chosen(found.splits)
    parts = [(s.image, s.label, s.sums, s.digest) for s in chosen.values()]
    whole = ImageSplit(*(torch.cat(tensors) for tensors in zip(*parts)))
    known = [found.groups.get(name) for name in chosen]
    groups = [group for own in known if own is not None for group in own]
    if groups and None in known:
        raise UserError("The column of groups must be in all splits that are put together and cut into folds.")
    rows = cut(len(whole.label), targets.classes(whole.label.numpy()), groups or None)
    return {name: whole.select(own) for name, own in rows.items()}


@dataclass
class _Source:
    """Where a split's images come from, before they are decoded."""

    count: int
    named: Iterable[tuple[str, Any]]  # (name for messages, bytes or path or pixels)
    labels: targets.Labels  # what `targets.read` gives
    groups: list[Any] | None = None


def read_images(
    data: sources.Data,
    *,
    config_name: str | None = None,
    split_column: str | None = None,
    image_column: str | None = None,
    wish: targets.Wish = _ONE_CLASS,
    group_column: str | None = None,
    channels: int | None = None,
    size: Size | None = None,
) -> Images:
    """A dataset of labelled images, decoded; from the cache where it was decoded before.

    Args:
        data: what `tables.read` takes, or an .npz file.
        config_name, split_column: see `tables.read`.
        image_column: needed if the column does not have a usual name.
        wish: what is learnt of an image, and the columns that say it.
        group_column: of a table, whose groups are wanted.
        channels: 1 or 3; None for 1 if every image is grey, else 3.
        size: the size of all images; None if they all have the same size already.

    Raises:
        UserError: anything about the data that must change.
    """
    arrays_file = isinstance(data, str) and data.lower().endswith(".npz")
    columns = {
        "config_name": config_name,
        "split_column": split_column,
        "image_column": image_column,
        "label_column": wish.column,
        "label_columns": list(wish.columns) or None,
        "label_separator": wish.separator,
        "group_column": group_column,
    }
    for name, given in columns.items():
        if arrays_file and given is not None:
            raise UserError(f'"trainer.task_options.{name}" has no effect on an .npz file. Leave it out.')
    read = partial(tables.read, data, config_name=config_name, split_column=split_column, folder=image_folder)
    content, found = tables.content_of(data, read)
    key = {
        "data": content,
        **columns,
        "problem": wish.problem,
        "channels": channels,
        "size": size,
        "versions": [importlib.metadata.version(name) for name in ("pillow", "datasets")],
        "reading": _VERSION,
    }

    def build() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if isinstance(data, str) and arrays_file:
            parts = _npz_sources(Path(data).expanduser(), wish)
            return _decoded(parts, wish, None, ["y"], channels, size, [])
        splits = found or read()
        label_columns = _label_columns(splits["train"], data, wish)
        parts = _table_sources(splits, data, content, image_column, label_columns, group_column, wish)
        declared = targets.declared_names(splits["train"], label_columns, wish)
        return _decoded(parts, wish, declared, label_columns, channels, size, tables.notes_of(splits))

    arrays, facts = cached("images", key, build)
    names = ("image", "label", "sums", "digest")
    read_splits = {name: ImageSplit(*(arrays[f"{name}_{part}"] for part in names)) for name in facts["splits"]}
    first = tuple(facts["first"])
    return Images(read_splits, facts["classes"], facts["notes"], first, facts["groups"], facts["label_columns"])


def _label_columns(train: Table, data: sources.Data, wish: targets.Wish) -> list[str]:
    """The columns of labels. Raises UserError."""
    named = wish.column is not None or wish.columns or wish.problem == targets.SEVERAL
    if not named and not {c.lower() for c in train.column_names} & set(LABEL_COLUMNS):
        raise UserError(
            f'"trainer.task_options.data": the images of {data} have no labels, only the columns '
            f"{', '.join(train.column_names)}.\nPut each class's images into a folder of its own, or name the column "
            "with label_column in trainer.task_options."
        )
    return targets.columns_of(train, wish, LABEL_COLUMNS)


def _table_sources(
    splits: dict[str, Table],
    data: sources.Data,
    content: Any,
    image_column: str | None,
    label_columns: Sequence[str],
    group_column: str | None,
    wish: targets.Wish,
) -> dict[str, _Source]:
    """Images and labels of tables."""
    train = splits["train"]
    if image_column is None:
        image_column = train.images[0] if len(train.images) == 1 else None
    image_column = tables.find_column(train.column_names, image_column, IMAGE_COLUMNS, "image_column")
    roots = [] if isinstance(content, dict) else data.values() if not isinstance(data, str) else [data]
    folders = [Path(os.path.abspath(Path(root).expanduser())) for root in roots]
    parts = {}
    for split, table in splits.items():
        for column in (image_column, *label_columns):
            if column not in table.column_names:
                raise UserError(
                    f'"trainer.task_options.data": the split {split} has no column "{column}", only '
                    f"{', '.join(table.column_names)}."
                )
        parts[split] = _Source(
            len(table),
            table_images(table, split, image_column, folders),
            targets.read(table, label_columns, wish, split),
            tables.groups(table, group_column, split),
        )
    return parts


def table_images(
    table: Table, split: str, column: str, folders: Sequence[Path] | None = None
) -> Iterator[tuple[str, bytes | str | np.ndarray | None]]:
    """(name, bytes or path or pixels or None) for each row of a column of images.

    Args:
        table: whose column holds files as bytes, {"bytes": ..., "path": ...} as the datasets library has it, paths, or
            nested lists of pixels.
        split: for messages.
        column: which.
        folders: where files that are only named by the table may lie: what the cache knows about. None or none
            of them for anywhere.

    Raises:
        UserError: the column holds something else, or a file lies elsewhere.
    """
    for start in range(0, len(table), BLOCK):
        try:
            values = table.values(column, start, start + BLOCK)
        except Exception as error:  # such as paths in a parquet file that are not UTF-8
            raise UserError(f'The column "{column}" in {split} cannot be read: {error}') from error
        for row, value in enumerate(values, start=start):
            content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            if isinstance(value, str):
                content, path = None, value
            if isinstance(value, list):
                content = _pixels(value)
            if not isinstance(content, (bytes, np.ndarray, type(None))) or not isinstance(path, (str, type(None))):
                raise UserError(
                    f'The column "{column}" holds {str(value)[:50]} ({type(value).__name__}), not images. Name the '
                    "right one with image_column in trainer.task_options."
                )
            name = f"row {row} of {split}" + (f", {path}" if path else "")
            if (content is not None and len(content)) or not path:
                yield name, content if content is not None and len(content) else None
                continue
            if folders and not any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in folders):
                raise UserError(
                    f"{name}: the table only names its images, so changed images would not be noticed.\nPut the table "
                    "into the folder of the images as metadata.csv, with their names in the column file_name, and "
                    "give that folder as data."
                )
            yield path, path


def _pixels(rows: list[Any]) -> np.ndarray | None:
    """Nested lists as (H, W) or (H, W, 3) uint8; None for anything else."""
    try:
        return np.asarray(rows, dtype=np.uint8)
    except (ValueError, TypeError, OverflowError):
        return None


def _npz_sources(path: Path, wish: targets.Wish) -> dict[str, _Source]:
    parts = {}
    with npz.npz_arrays(path) as file:
        pairs = image_arrays.pairs(file.files)
        if "train" not in pairs:
            raise UserError(
                f'"trainer.task_options.data": {path} needs the arrays train_x and train_y, and test_x and test_y, '
                f"or x and y. It has {', '.join(file.files) or 'none'}."
            )
        for split, (x, y) in pairs.items():
            images, labels = image_arrays.npz_images(path, file, x), npz.npz_array(path, file, y)
            if labels.ndim == 2 and labels.shape[1] == 1 and wish.problem != targets.SEVERAL:
                labels = labels[:, 0]
            several = wish.problem == targets.SEVERAL
            if len(labels) != len(images) or labels.ndim != 1 + several:
                raise UserError(
                    f"{path}: {y} has the shape {labels.shape}, but {x} has {len(images)} images. It must be "
                    + (f"({len(images)}, labels) of 0 and 1." if several else f"({len(images)},), one label an image.")
                )
            if len(labels) == 0:
                raise UserError(f'"trainer.task_options.data": the split {split} of {path} is empty ({x} has no rows).')
            named = ((f"{x}[{row}] of {path}", image) for row, image in enumerate(images))
            values = np.char.decode(labels, "utf-8") if labels.dtype.kind == "S" else labels
            parts[split] = _Source(len(images), named, targets.of_array(values, wish, y, split))
    return parts


def _decoded(
    parts: dict[str, _Source],
    wish: targets.Wish,
    declared: list[str] | None,
    label_columns: Sequence[str],
    channels: int | None,
    size: Size | None,
    notes: list[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the cache holds. Labels are checked first: that takes no time."""
    from tqdm import tqdm

    numbers, classes = targets.numbered({split: part.labels for split, part in parts.items()}, wish, declared)
    progress = tqdm(total=sum(p.count for p in parts.values()), desc="images", unit="image", leave=False, disable=None)
    remarks: Counter[str] = Counter()
    pixels: dict[str, list[np.ndarray]] = {}
    first: tuple[str, Size] | None = None
    with progress:
        for split, source in parts.items():
            pixels[split] = []
            for name, image, done in decode_all(source.named, channels, size):
                height, width = image.shape[:2]
                first = first or (name, (height, width))
                if (height, width) != first[1]:
                    raise UserError(
                        f"The images differ in size: {first[0]} is {first[1][0]} x {first[1][1]}, {name} is "
                        f"{height} x {width} (height x width).\nSet image_size in trainer.task_options, such as "
                        f"{max(first[1])}, and all are resized to it."
                    )
                pixels[split].append(image)
                remarks.update(filter(None, done.split("; ")))
                progress.update()
    grey = sum(image.ndim == 2 for images in pixels.values() for image in images)
    if channels is None:
        channels = 1 if grey == sum(p.count for p in parts.values()) else 3
        if channels == 3 and grey:
            remarks["made RGB, since others are not grey"] = grey
    arrays: dict[str, Tensor] = {}
    for split, images in pixels.items():
        tensor = arrays[f"{split}_image"] = stacked(images, channels)
        arrays[f"{split}_label"] = torch.from_numpy(numbers[split])
        arrays[f"{split}_sums"] = _sums(tensor)
        hashes = b"".join(hashlib.blake2b(i.numpy().data, digest_size=16).digest() for i in tensor)
        arrays[f"{split}_digest"] = torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, 16)
    notes += [f"{count:,} image{'s' * (count > 1)} had to be {remark}" for remark, count in remarks.items()]
    label = targets.shown(classes, next(iter(numbers.values()))[0])
    name = "/".join((first[0] if first else "").split("/")[-3:])  # of a file, with its folder
    facts: dict[str, Any] = {"splits": list(parts), "classes": classes, "notes": notes, "first": [name, label]}
    facts |= {"groups": {s: part.groups for s, part in parts.items() if part.groups}, "label_columns": label_columns}
    return arrays, facts


def stacked(images: list[np.ndarray], channels: int) -> Tensor:
    """(N, C, H, W) uint8; empties the list, so that the images are not there twice."""
    height, width = images[0].shape[:2]
    result = np.empty((len(images), channels, height, width), dtype=np.uint8)
    for row in range(len(images)):
        image, images[row] = images[row], images[0][:0]
        result[row] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(result)


def _sums(images: Tensor) -> Tensor:
    """(N, C, 2) int64: the sum of each image's pixels, and of their squares."""
    parts = []
    for block in images.split(max(1, (16 << 20) // images[0].numel())):
        wide = block.flatten(2).to(torch.int64)
        parts.append(torch.stack([wide.sum(2), (wide * wide).sum(2)], dim=2))
    return torch.cat(parts)
