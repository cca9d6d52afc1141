"""Datasets of images and masks as tensors, in two or three dimensions: folders and .npz, decoded once and cached."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from . import images, npz, reading, sources
from .cache import Cached, cached, hash_files
from .images import Size
from .mask_values import Classes, checked_mask, classes_of, decode_mask
from .segmentation_files import pairs

_DATA = '"trainer.task_options.data"'
_IMAGES, _MASKS = ("x", "image", "images"), ("y", "mask", "masks", "label", "labels")
# Increase it when the same content is read in another way.
_VERSION = 1


@dataclass(frozen=True)
class Scenes:
    """Images and masks of one split.

    Attributes:
        image: (N, C, *S) uint8, or float32 if the data is not uint8; S is (H, W) or (D, H, W).
        mask: (N, *S) uint8, numbers of classes, or `mask_values.IGNORED`.
        sums: (N, C, 2) float64, each image's sum of pixels and of squared pixels.
        digest: (N, 16) uint8, a hash of each image.
    """

    image: Tensor
    mask: Tensor
    sums: Tensor
    digest: Tensor

    def select(self, rows: np.ndarray) -> Scenes:
        """Some of them. rows: (n,) int64."""
        index = torch.from_numpy(rows)
        return Scenes(*(t.index_select(0, index) for t in (self.image, self.mask, self.sums, self.digest)))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, in the units of the data, to six digits."""
        count = self.mask.numel()
        means, stds = [], []
        for channel in self.sums.unbind(1):  # (N, 2)
            total, squares = (math.fsum(column.tolist()) / count for column in channel.unbind(1))
            means.append(float(f"{total:.6g}"))
            # A constant channel is only centred: a deviation of 0 cannot divide.
            stds.append(float(f"{max(squares - total * total, 0.0) ** 0.5:.6g}") or 1.0)
        return means, stds


@dataclass(frozen=True)
class Segmented:
    """A dataset of images and masks.

    Attributes:
        splits: its splits.
        classes: their names and values.
        notes: what was left out or done, in sentences.
        first: the name of the first image of train.
    """

    splits: dict[str, Scenes]
    classes: Classes
    notes: list[str]
    first: str


@dataclass
class _Part:
    """A split before it is stacked: (name, image (*S) or (*S, C), mask (*S) of whole numbers)."""

    samples: Iterable[tuple[str, np.ndarray, np.ndarray]]
    count: int


def read(
    data: sources.Data,
    *,
    size: Size | None = None,
    channels: int | None = None,
    classes: Any = None,
    ignore_value: int | None = None,
) -> Segmented:
    """A dataset of images and masks; from the cache if it was read before.

    Args:
        data: a folder, {split: folder}, or an .npz file.
        size: (height, width) to which image files are resized; None for their own.
        channels: 1 or 3 of image files; None for their own.
        classes: the option: {name: value}, or names for the values 0, 1, 2, ...; None for the values in train.
        ignore_value: the value of pixels that do not count.

    Raises:
        UserError: anything about the data that must change.
    """
    file = Path(data).expanduser() if isinstance(data, str) and data.lower().endswith(".npz") else None
    if file is not None and not file.is_file():
        raise UserError(f"{_DATA}: {data} does not exist (looked from {Path.cwd()}).")
    content = hash_files(file) if file is not None else sources.fingerprint(data)
    if content is None:
        raise UserError(
            f"{_DATA}: {data} is not here (looked from {Path.cwd()}). Give a folder of images and masks, or an .npz."
        )
    options = [size, channels, classes, ignore_value]
    versions = [importlib.metadata.version(name) for name in ("pillow", "numpy")]
    key = {"data": content, "options": options, "versions": versions, "reading": _VERSION}

    def build() -> Cached:
        notes: list[str] = []
        if file is not None:
            _refuse_size(size, channels, str(file))
        parts = _npz_parts(file) if file is not None else _folder_parts(data, size, channels, notes)
        return _stacked(parts, classes, ignore_value, notes)

    arrays, facts = cached("segmentation", key, build)
    names = ("image", "mask", "sums", "digest")
    splits = {split: Scenes(*(arrays[f"{split}_{name}"] for name in names)) for split in facts["splits"]}
    return Segmented(splits, Classes(*facts["classes"]), facts["notes"], facts["first"])


def _refuse_size(size: Size | None, channels: int | None, where: str) -> None:
    for option, value in (("image_size", size), ("channels", channels)):
        if value is not None:
            raise UserError(
                f'"trainer.task_options.{option}" has an effect only on image files, and {where} holds arrays. Leave '
                "it out."
            )


# --- sources ----------------------------------------------------------------------------------------------------------


def _folder_parts(data: sources.Data, size: Size | None, channels: int | None, notes: list[str]) -> dict[str, _Part]:
    splits = {}
    if isinstance(data, Mapping):
        for name, given in data.items():
            sources.check_split_name(name)
            own, more = pairs(_found(given))
            if list(own) != ["train"]:
                raise UserError(f"{_DATA}: {given}, the split {name}, has splits of its own: {', '.join(own)}.")
            splits[name], notes[len(notes) :] = own["train"], more
        if "train" not in splits:
            raise UserError(f"{_DATA} names no training set. Add train.")
    else:
        splits, more = pairs(_found(data))
        notes += more
    remarks: Counter[str] = Counter()
    parts = {}
    for split, files in sources.in_order(splits).items():
        arrays = [image.suffix.lower() == ".npy" for image, _ in files]
        if any(arrays):
            _refuse_size(size, channels, str(files[arrays.index(True)][0]))
        parts[split] = _Part(_decoded(files, size, channels, remarks, notes), len(files))
    return parts


def _found(given: str) -> sources.Found:
    found = sources.find(given)
    if found is None or found.single:
        raise UserError(f"{_DATA}: {given} is neither a folder of images and masks, nor an .npz file.")
    return found


def _decoded(
    files: list[tuple[Path, Path]], size: Size | None, channels: int | None, remarks: Counter[str], notes: list[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each image with its mask, as in the files, or resized."""
    for block in reading.blocks(files, reading.BLOCK):
        pixels: dict[str, np.ndarray] = {}
        pictures = [(str(image), image) for image, _ in block if image.suffix.lower() != ".npy"]
        for name, image, done in images.decode_all(pictures, channels, size):
            pixels[name] = image
            remarks.update(filter(None, done.split("; ")))
        for image_file, mask_file in block:
            array = image_file.suffix.lower() == ".npy"
            image = _load(image_file) if array else pixels.pop(str(image_file))
            mask = _load(mask_file) if mask_file.suffix.lower() == ".npy" else decode_mask(mask_file, size)
            yield str(image_file), image, mask
    notes += [f"{count:,} image{'s' * (count > 1)} had to be {remark}" for remark, count in remarks.items()]
    remarks.clear()


def _load(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except Exception as error:  # numpy has several kinds
        raise UserError(f"{_DATA}: {file} cannot be read as an array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{_DATA}: {file} holds no single array.")
    return array


def _npz_parts(path: Path) -> dict[str, _Part]:
    parts = {}
    with npz.npz_arrays(path) as file:
        for split, (x, y) in _npz_pairs(file.files).items():
            image, mask = npz.npz_array(path, file, x), npz.npz_array(path, file, y)
            if len(image) != len(mask) or not len(image):
                raise UserError(
                    f"{path}: {x} has {len(image):,} images and {y} has {len(mask):,} masks. Each image needs a mask, "
                    "and a split at least one image."
                )
            parts[split] = _Part(_rows(f"{x}[{{}}] of {path}", image, mask), len(image))
        if "train" not in parts:
            raise UserError(
                f"{_DATA}: {path} needs the arrays train_x and train_y (and test_x and test_y, ...), or x and y: "
                f"images and masks. It has {', '.join(file.files) or 'none'}."
            )
    return parts


def _rows(name: str, image: np.ndarray, mask: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for row in range(len(image)):
        yield name.format(row), image[row], mask[row]


def _npz_pairs(names: list[str]) -> dict[str, tuple[str, str]]:
    """Split -> (array of images, array of masks)."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.lower().split("_")
        rest = [word for word in words if word not in _IMAGES + _MASKS]
        split = sources.ALIASES.get(rest[0]) if len(rest) == 1 else None if rest else "train"
        kind = "x" if set(words) & set(_IMAGES) else "y"
        if split is not None and len(words) - len(rest) == 1:
            found.setdefault(split, {}).setdefault(kind, name)
    return {split: (found[split]["x"], found[split]["y"]) for split in sources.SPLITS if len(found.get(split, {})) == 2}


# --- arrays -----------------------------------------------------------------------------------------------------------


def image_array(name: str, image: np.ndarray, dims: int) -> np.ndarray:
    """An image as (C, *S), uint8 or float32.

    Args:
        name: for messages.
        image: (*S) or (*S, C) of any type of numbers.
        dims: the number of dimensions of S.

    Raises:
        UserError: it has another number of dimensions, or values that are no finite numbers.
    """
    if image.ndim not in (dims, dims + 1) or image.dtype.kind not in "biuf" or not image.size:
        raise UserError(
            f"{name} is {image.dtype} of shape {image.shape}. An image must hold numbers, in {dims} dimensions like "
            "its mask, or with its channels as a further, last dimension."
        )
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise UserError(f"{name} holds values that are infinite or nan. Correct the image.")
    channels_first = np.moveaxis(image, -1, 0) if image.ndim > dims else image[None]
    return channels_first.astype(np.uint8 if image.dtype in (np.uint8, np.bool_) else np.float32)


def _stacked(parts: dict[str, _Part], classes: Any, ignore_value: int | None, notes: list[str]) -> Cached:
    """Everything that the cache holds."""
    from tqdm import tqdm

    total = sum(part.count for part in parts.values())
    read_images: dict[str, list[np.ndarray]] = {}
    read_masks: dict[str, list[np.ndarray]] = {}
    names: dict[str, list[str]] = {}
    with tqdm(total=total, desc="images", unit="image", leave=False, disable=None) as progress:
        for split, part in parts.items():
            read_images[split], read_masks[split], names[split] = [], [], []
            for name, image, mask in part.samples:
                mask = checked_mask(name, mask)
                own = image_array(name, image, mask.ndim)
                if own.shape[1:] != mask.shape:
                    raise UserError(_sizes_differ(name, own.shape[1:], mask.shape))
                read_images[split].append(own)
                read_masks[split].append(mask)
                names[split].append(name)
                progress.update()
    _check_alike(read_images, names)
    found = classes_of(read_masks, names, classes, ignore_value, notes)
    arrays: dict[str, Tensor] = {}
    plain = all(image.dtype == np.uint8 for group in read_images.values() for image in group)
    for split, group in read_images.items():
        stacked = np.stack(group).astype(np.uint8 if plain else np.float32, copy=False)
        group.clear()  # or the images would be in memory twice
        arrays[f"{split}_image"] = torch.from_numpy(stacked)
        arrays[f"{split}_mask"] = torch.from_numpy(np.stack(read_masks[split]))
        # float64 sums of uint8 are whole numbers, and exact.
        axes = tuple(range(1, stacked.ndim - 1))
        sums = [np.stack([(wide := i.astype(np.float64)).sum(axes), (wide * wide).sum(axes)], axis=1) for i in stacked]
        arrays[f"{split}_sums"] = torch.from_numpy(np.stack(sums))
        digests = b"".join(hashlib.blake2b(i.tobytes(), digest_size=16).digest() for i in stacked)
        arrays[f"{split}_digest"] = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, 16)
    first = "/".join(names["train"][0].split("/")[-3:])
    facts = {"splits": list(parts), "classes": [found.names, found.values], "notes": notes, "first": first}
    return arrays, facts


def _sizes_differ(name: str, image: tuple[int, ...], mask: tuple[int, ...]) -> str:
    said = f"The image {name} is {shown(image)}, but its mask {shown(mask)}."
    if len(image) == len(mask) and len(mask) > 1 and (image[1:] == mask[:-1]):
        return f"{said}\nThe channels of an array come last: numpy.moveaxis(image, 0, -1)."
    return f"{said}\nBoth must have the same size. Resize one of them, or set image_size for image files."


def _check_alike(read: Mapping[str, list[np.ndarray]], names: Mapping[str, list[str]]) -> None:
    """Raises UserError unless all images have one size and number of channels."""
    first, first_name = read["train"][0], names["train"][0]
    for split, group in read.items():
        for name, image in zip(names[split], group):
            if image.shape[1:] != first.shape[1:]:
                remedy = "Set image_size in trainer.task_options: then all are resized to it"
                raise UserError(
                    f"The images differ in size: {first_name} is {shown(first.shape[1:])}, {name} is "
                    f"{shown(image.shape[1:])}.\n"
                    + (f"{remedy}." if image.ndim == 3 else "Arrays are not resized here: give them one size.")
                )
            if len(image) != len(first):
                raise UserError(
                    f"The images differ in channels: {first_name} has {len(first)}, {name} has {len(image)}.\nSet "
                    "channels in trainer.task_options to 1 or 3: then image files are converted."
                )


def shown(size: Iterable[int]) -> str:
    """A size for people: 512 x 512."""
    return " x ".join(map(str, size))
