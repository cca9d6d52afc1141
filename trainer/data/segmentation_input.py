"""The images that segmentation predicts on, and the masks that it writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import image_files, images, npz, segmentation_files, sources
from .segmentation_data import image_array, shown

# (file or row, image (C, *S), the image's own size before it was resized)
Input = tuple[Any, np.ndarray, tuple[int, ...]]
_NAMES = ("x", "image", "images", "test_x")


def inputs(source: Path, channels: int, size: tuple[int, ...], notes: list[str]) -> tuple[str, Iterator[Input]]:
    """The word file or row, and each image. Image files are resized to the size that the model was trained on.

    Args:
        source: an image, a .npy array, a folder of such (also with folders of images and masks), or an .npz.
        channels, size: of the images in training.
        notes: sentences are added.

    Raises:
        UserError: nothing is there, or an image does not fit.
    """
    if source.suffix.lower() == ".npz":
        return "row", _rows(source, channels, size)
    found = sources.find(str(source))
    if found is None:
        raise UserError(f"--input {source} does not exist (looked from {Path.cwd()}).")
    files = [file for file in found.files if file.suffix.lower() == ".npy" or image_files.is_image(file)]
    if not files:
        raise UserError(f"--input {source} holds no images, and no .npy arrays.")
    notes += sources.left_out_note(found, found.others(files), "no image")
    files, left_out = segmentation_files.images_alone(found, files)
    notes += left_out
    return "file", _files(files, channels, size)


def _rows(path: Path, channels: int, size: tuple[int, ...]) -> Iterator[Input]:
    with npz.npz_arrays(path) as file:
        name = next((n for n in _NAMES if n in file.files), None)
        if name is None:
            raise UserError(f"{path} needs an array x of images. It has {', '.join(file.files) or 'none'}.")
        array = npz.npz_array(path, file, name)
    for row, image in enumerate(array):
        own = _fitting(f"{name}[{row}] of {path}", image, channels, size)
        yield row, own, own.shape[1:]


def _files(files: list[Path], channels: int, size: tuple[int, ...]) -> Iterator[Input]:
    for file in files:
        if file.suffix.lower() == ".npy":
            try:
                array = np.load(file, allow_pickle=False)
            except Exception as error:  # numpy has several kinds
                raise UserError(f"--input: {file} cannot be read as an array: {error}") from error
            own = _fitting(str(file), array, channels, size)
            yield str(file), own, own.shape[1:]
            continue
        if len(size) != 2 or channels not in (1, 3):
            raise UserError(
                f"--input: {file} is an image file, but the model takes arrays of {shown(size)} with {channels} "
                f"channel{'s' * (channels > 1)}."
            )
        for _, image, _ in images.decode_all([(str(file), file)], channels, (size[0], size[1])):
            yield str(file), image_array(str(file), image, 2), _own_size(file)


def _own_size(file: Path) -> tuple[int, int]:
    """The height and width of an image file, turned upright."""
    from PIL import Image

    with Image.open(file) as picture:
        width, height = picture.size
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def _fitting(name: str, image: np.ndarray, channels: int, size: tuple[int, ...]) -> np.ndarray:
    own = image_array(name, image, len(size))
    if own.shape != (channels, *size):
        raise UserError(
            f"--input: {name} is {shown(own.shape[1:])} with {len(own)} channel{'s' * (len(own) > 1)}, but the model "
            f"was trained on {shown(size)} with {channels}."
        )
    return own


def write_mask(values: np.ndarray, size: tuple[int, ...], folder: Path, name: Any, taken: set[str]) -> str:
    """Writes one mask: a png of the image's own size, or an .npz with the array mask for volumes. Returns its name.

    Args:
        values: (H, W) or (D, H, W) integers.
        size: the image's own.
        folder: where it goes.
        name: of the image's file, or its row.
        taken: names of files that were written before; the new one is added.
    """
    stem = f"row_{name:05d}" if isinstance(name, int) else re.sub(r"[^\w.-]", "_", Path(name).stem) or "image"
    small = values.min() >= 0 and values.max() <= 255
    suffix = ".png" if values.ndim == 2 and small else ".npz"
    number, file = 1, stem + suffix
    while file in taken:  # the same name in two folders
        number += 1
        file = f"{stem}_{number}{suffix}"
    taken.add(file)
    if suffix == ".npz":
        np.savez_compressed(folder / file, mask=values.astype(np.uint8 if small else np.int64))
        return file
    from PIL import Image

    picture = Image.fromarray(values.astype(np.uint8))
    if (picture.height, picture.width) != size:
        picture = picture.resize((size[1], size[0]), Image.Resampling.NEAREST)
    picture.save(folder / file)
    return file
