"""Images as uint8: decoding one, and changing whole batches of them on the device."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .reading import read_each

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # height, width

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


# ---------------------------------------------------------------- one image


def decode(
    source: bytes | str | Path | np.ndarray | None, channels: int | None, size: Size | None
) -> tuple[np.ndarray, str]:
    """One image: its pixels, (H, W) or (H, W, 3) uint8, and what was done to it, in words.

    The orientation that cameras note (EXIF) is applied. 16 bits are reduced to 8. Transparency is dropped. The first
    frame of an animation is taken.

    Args:
        source: an encoded file or its path; or pixels, (H, W) or (H, W, 3) uint8; None for a missing value.
        channels: 1 or 3; None leaves grey images grey and makes all others RGB.
        size: to which an image of another size is resized (bilinear); None for its own.

    Raises:
        OSError, ValueError, SyntaxError: as Pillow does, for files of no known kind, truncated ones, and others.
    """
    from PIL import Image, ImageOps

    if source is None:
        raise ValueError("missing")
    if isinstance(source, np.ndarray):
        return _fitted(Image.fromarray(source), channels, size)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
        frames = getattr(picture, "n_frames", 1)
        orientation = picture.getexif().get(0x0112, 1)
        picture.load()
        if orientation in range(2, 9):
            picture = ImageOps.exif_transpose(picture)
        pixels, done = _fitted(picture, channels, size)
    if frames > 1:
        done += "reduced to its first frame of several; "
    return pixels, ("turned upright, as EXIF data says; " if orientation in range(2, 9) else "") + done


def _fitted(picture: Image.Image, channels: int | None, size: Size | None) -> tuple[np.ndarray, str]:
    from PIL import Image

    done = ""
    if picture.mode == "F" or (picture.mode == "I" and np.asarray(picture).view(np.uint32).max() > 255):
        raise ValueError("its pixels are no whole numbers of 8 or 16 bits")
    mode = "L" if channels == 1 or (channels is None and picture.mode in _GREY_MODES) else "RGB"
    if picture.mode.startswith("I;16"):
        done += "reduced from 16 bits to 8; "
        # 65535 = 255 * 257, so this is rounding to the nearest, and white stays white.
        pixels = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    elif picture.mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in picture.info:
        done += "stripped of transparency; "
        if picture.mode == "P":
            picture = picture.convert("RGBA")  # Pillow warns of the direct way
    if mode == "L" and picture.mode not in _GREY_MODES:
        done += "made grey; "
    if picture.mode != mode:
        # What transformers' image processors do as well.
        picture = picture.convert(mode)
    if size is not None and (picture.height, picture.width) != size:
        done += f"resized to {size[0]} x {size[1]}; "
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(picture, dtype=np.uint8), done


def decode_all(
    named: Iterable[tuple[str, Any]], channels: int | None, size: Size | None
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Decodes named sources in order, on all processors: (name, pixels, what was done) of each.

    Raises:
        UserError: at the end, with all files that cannot be read.
    """
    each = read_each(named, lambda source: decode(source, channels, size), "image", _reason)
    return ((name, pixels, done) for name, (pixels, done) in each)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no kind of image that Pillow knows"
    if isinstance(error, FileNotFoundError):
        return "not there"
    return str(error) or type(error).__name__


# ---------------------------------------------------------------- batches on the device


def shift_and_flip(images: Tensor, padding: int, moves: Tensor, flipped: Tensor | None) -> Tensor:
    """A crop of each image after padding; some crops are mirrored.

    Rows are gathered first, then columns. These are two passes over the pixels, without an index for each pixel.

    Args:
        images: (B, C, H, W).
        padding: black pixels on each side.
        moves: (B, 2) int64 in 0..2 padding, the crop's row and column; `padding` leaves an image in its place.
        flipped: (B,) bool, which crops to mirror left to right; None for none.

    Returns:
        (B, C, H, W), contiguous.
    """
    B, C, H, W = images.shape
    device = images.device
    columns = torch.arange(W, device=device).expand(B, W)
    if flipped is not None:
        columns = torch.where(flipped[:, None], W - 1 - columns, columns)
    if padding:
        images = F.pad(images, (padding, padding, padding, padding))
        tall, wide = H + 2 * padding, W + 2 * padding
        first = (torch.arange(B * C, device=device) * tall).view(B, C, 1)
        rows = first + (moves[:, :1] + torch.arange(H, device=device))[:, None]  # (B, C, H)
        images = images.view(-1, wide).index_select(0, rows.flatten()).view(B, C, H, wide)
        columns = columns + moves[:, 1:]
    return images.gather(3, columns.view(B, 1, 1, W).expand(B, C, H, W))


# Shares of the image's area, and the bounds of height / width, as the authors set them.
ERASED_AREA, ERASED_RATIO = (0.02, 0.4), (0.3, 1 / 0.3)


def erase(images: Tensor, probability: float, draws: Tensor, fill: Tensor) -> Tensor:
    """Random erasing (Zhong et al. 2017): a rectangle of some images is filled.

    A rectangle that does not fit is cut to the image. The authors draw again, but here the number of draws for a sample
    is fixed.

    Args:
        images: (B, C, H, W).
        probability: of erasing in an image.
        draws: (B, 5) in [0, 1): whether, area, ratio, row and column.
        fill: (C,) of the images' type.

    Returns:
        (B, C, H, W).
    """
    H, W = images.shape[2:]
    whether, area, ratio, row, column = draws.unbind(1)
    area = (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area) * (H * W)
    ratio = ERASED_RATIO[0] + (ERASED_RATIO[1] - ERASED_RATIO[0]) * ratio
    height = (area * ratio).sqrt().round().clamp(1, H)
    width = (area / ratio).sqrt().round().clamp(1, W)

    def covered(side: int, length: Tensor, place: Tensor) -> Tensor:
        first = (place * (side - length + 1)).floor()[:, None]  # (B, 1)
        at = torch.arange(side, device=images.device)
        return (at >= first) & (at < first + length[:, None])  # (B, side)

    rows = covered(H, height, row) & (whether < probability)[:, None]
    columns = covered(W, width, column)
    erased = rows[:, None, :, None] & columns[:, None, None, :]  # (B, 1, H, W)
    return torch.where(erased, fill.view(1, -1, 1, 1), images)


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(B, C, H, W) uint8 -> float32, pixel * scale + shift: scale and shift are (1, C, 1, 1) float32."""
    return torch.addcmul(shift, images.float(), scale)


def is_size(value: Any) -> bool:
    """Whether an option is a size: a side, or [height, width]."""
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(isinstance(s, int) and not isinstance(s, bool) and 1 <= s <= 16384 for s in sides)
