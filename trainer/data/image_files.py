"""Which files are images, in training and in prediction alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from . import sources
from .labelled_files import Kind

# Files with these suffixes are meant to be images. If Pillow cannot read one, that is an error.
SUFFIXES = (".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
            ".jpg", ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")  # fmt: skip
# Any other file is an image if its content is of one of these kinds.
_KINDS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def is_image(file: Path) -> bool:
    """Whether a file is an image: by its suffix, or, with another suffix or none, by its content."""
    suffix = file.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix in (*sources.READERS, ".npz"):
        return False
    from PIL import Image

    Image.init()
    try:
        with Image.open(file, formats=[kind for kind in _KINDS if kind in Image.OPEN]):
            return True
    except Exception:  # Pillow's readers raise a dozen kinds
        return False


def _pixels(rows: list[Any]) -> np.ndarray | None:
    """Nested lists as (H, W) or (H, W, 3) uint8; None for anything else."""
    try:
        return np.asarray(rows, dtype=np.uint8)
    except (ValueError, TypeError, OverflowError):
        return None


IMAGES = Kind(
    "image", "an image", is_image, SUFFIXES, ("image", "img", "images", "picture", "pixel_values"), nested=_pixels
)
