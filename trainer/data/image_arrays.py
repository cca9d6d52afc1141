"""Arrays of images and of their labels in .npz files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import npz, sources

# train_x, x_train, train_images (MedMNIST), plain x; and the same for labels.
_NPZ_IMAGES, _NPZ_LABELS = ("x", "images", "image"), ("y", "labels", "label")


def pairs(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Split -> (array of images, array of labels)."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = name.lower().split("_")
        kinds = [k for k, known in (("x", _NPZ_IMAGES), ("y", _NPZ_LABELS)) if set(words) & set(known)]
        rest = [w for w in words if w not in _NPZ_IMAGES + _NPZ_LABELS]
        split = sources.ALIASES.get(rest[0]) if len(rest) == 1 else None if rest else "train"
        if len(kinds) == 1 and split is not None:
            found.setdefault(split, {}).setdefault(kinds[0], name)
    return {split: (found[split]["x"], found[split]["y"]) for split in sources.SPLITS if len(found.get(split, {})) == 2}


def npz_images(path: Path, file: Any, name: str) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3) uint8, the array `name` of an open .npz file. Raises UserError."""
    images = npz.npz_array(path, file, name)
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))):
        hint = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            hint = "\nFor channels in the second place: images.transpose(0, 2, 3, 1)."
        elif images.dtype != np.uint8:
            hint = "\nFor pixels from 0 to 1: (images * 255).round().astype(numpy.uint8)."
        raise UserError(
            f"{path}: {name} is {images.dtype} of shape {images.shape}. Images must be uint8 of shape (N, H, W), "
            f"(N, H, W, 1) or (N, H, W, 3).{hint}"
        )
    return images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images


def read_npz_images(path: Path) -> np.ndarray:
    """The images of an .npz file to predict on, as `npz_images` gives them: x, or the only array of images.

    Raises:
        UserError: there is no such array, or it holds no images.
    """
    with npz.npz_arrays(path) as file:
        names = [n for n in file.files if set(n.lower().split("_")) & set(_NPZ_IMAGES)]
        chosen = "x" if "x" in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise UserError(f"{path} needs an array x of images. It has {', '.join(file.files) or 'none'}.")
        return npz_images(path, file, chosen)
