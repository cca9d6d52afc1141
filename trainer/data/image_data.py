"""Datasets of images as uint8 tensors: class folders, tables, saved datasets and .npz, decoded once and cached."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import image_arrays, labelled, npz, sources, tables, targets
from .cache import cached
from .image_files import IMAGES
from .images import Size, decode_all
from .labelled import Labelled, LabelledSplit, Source
from .labelled_files import folder_of
from .table_files import Table

# Increase it when the same content is read in another way.
_VERSION = 6
_ONE_CLASS = targets.Wish()


@dataclass(frozen=True)
class ImageSplit(LabelledSplit):
    """Decoded images of one split.

    Attributes:
        image: (N, C, H, W) uint8.
    """

    image: Tensor

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, for pixels from 0 to 1. Exact sums: alike on every machine."""
        mean, std = self.moments(self.image[0, 0].numel())
        # A constant channel is only centred: a deviation of 0 cannot divide.
        return [round(m / 255, 6) for m in mean], [round(s / 255, 6) or 1.0 for s in std]


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
) -> Labelled[ImageSplit]:
    """A dataset of labelled images, decoded; from the cache if it was decoded before.

    Args:
        data: what `tables.read` takes, or an .npz file.
        config_name, split_column: see `tables.read`.
        image_column: needed if the column does not have a usual name.
        wish: what is learnt of an image, and the columns that hold it.
        group_column: the column of groups in a table; None for no groups.
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
    folder = partial(folder_of, kind=IMAGES)
    read = partial(tables.read, data, config_name=config_name, split_column=split_column, folder=folder)
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

    def parts_of(splits: dict[str, Table]) -> tuple[dict[str, Source], list[str]]:
        label_columns = labelled.label_columns(splits["train"], data, wish, IMAGES)
        column = labelled.file_column(splits["train"], image_column, IMAGES)
        roots = [] if isinstance(content, dict) else data.values() if not isinstance(data, str) else [data]
        folders = [Path(os.path.abspath(Path(root).expanduser())) for root in roots]
        parts = labelled.table_sources(splits, IMAGES, column, folders, label_columns, group_column, wish)
        return parts, label_columns

    def build() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if isinstance(data, str) and arrays_file:
            parts = _npz_sources(Path(data).expanduser(), wish)
            return _decoded(parts, wish, None, ["y"], channels, size, [])
        splits = found or read()
        parts, label_columns = parts_of(splits)
        declared = targets.declared_names(splits["train"], label_columns, wish)
        return _decoded(parts, wish, declared, label_columns, channels, size, tables.notes_of(splits))

    return labelled.from_cache(ImageSplit, *cached("images", key, build), lambda: parts_of(found or read())[0])


def _npz_sources(path: Path, wish: targets.Wish) -> dict[str, Source]:
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
            parts[split] = Source(len(images), named, targets.of_array(values, wish, y, split))
    return parts


def _decoded(
    parts: dict[str, Source],
    wish: targets.Wish,
    declared: list[str] | None,
    label_columns: Sequence[str],
    channels: int | None,
    size: Size | None,
    notes: list[str],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the cache holds. Labels are checked first, because this takes no time."""
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
                        f"{max(first[1])}: then all are resized to it."
                    )
                pixels[split].append(image)
                remarks.update(filter(None, done.split("; ")))
                progress.update()
    grey = sum(image.ndim == 2 for images in pixels.values() for image in images)
    if channels is None:
        channels = 1 if grey == sum(p.count for p in parts.values()) else 3
        if channels == 3 and grey:
            remarks["made RGB, because others are not grey"] = grey
    arrays: dict[str, Tensor] = {}
    for split, images in pixels.items():
        tensor = arrays[f"image_{split}"] = stacked(images, channels)
        arrays[f"label_{split}"] = torch.from_numpy(numbers[split])
        arrays[f"sums_{split}"], arrays[f"digest_{split}"] = labelled.sums(tensor), labelled.digests(tensor)
    notes += [f"{count:,} image{'s' * (count > 1)} had to be {remark}" for remark, count in remarks.items()]
    return arrays, labelled.facts_of(parts, classes, label_columns, notes, first[0] if first else "", numbers)


def stacked(images: list[np.ndarray], channels: int) -> Tensor:
    """(N, C, H, W) uint8. It empties the list while it copies, so the images are not in memory twice."""
    height, width = images[0].shape[:2]
    result = np.empty((len(images), channels, height, width), dtype=np.uint8)
    for row in range(len(images)):
        image, images[row] = images[row], images[0][:0]
        result[row] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(result)
