"""Decoding images, and what is done to whole batches of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.images import decode, erase, normalise, shift_and_flip


def some_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------- batches


def shifted_and_flipped(image: np.ndarray, padding: int, row: int, column: int, flipped: bool) -> np.ndarray:
    """The slow reference, for one image (C, H, W)."""
    C, H, W = image.shape
    padded = np.zeros((C, H + 2 * padding, W + 2 * padding), image.dtype)
    padded[:, padding : padding + H, padding : padding + W] = image
    crop = padded[:, row : row + H, column : column + W]
    return crop[:, :, ::-1] if flipped else crop


@pytest.mark.parametrize("shape", [(9, 1, 7, 5), (9, 3, 6, 8)])
@pytest.mark.parametrize(("padding", "mirror"), [(0, True), (2, False), (3, True)])
def test_crops_and_flips_against_one_image_at_a_time(shape: tuple[int, ...], padding: int, mirror: bool) -> None:
    pixels = some_images(*shape)
    rng = np.random.default_rng(1)
    moves = rng.integers(0, 2 * padding + 1, (len(pixels), 2))
    flipped = rng.random(len(pixels)) < 0.5
    assert 0 < flipped.sum() < len(flipped)
    ours = shift_and_flip(
        torch.from_numpy(pixels), padding, torch.from_numpy(moves), torch.from_numpy(flipped) if mirror else None
    )
    assert ours.is_contiguous()
    for image, (row, column), flip, result in zip(pixels, moves, flipped, ours.numpy()):
        np.testing.assert_array_equal(result, shifted_and_flipped(image, padding, row, column, mirror and bool(flip)))


def erased(image: np.ndarray, probability: float, draws: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """The slow reference, for one image (C, H, W); draws (5,) float32."""
    image, (_, H, W) = image.copy(), image.shape
    whether, area, ratio, row, column = (np.float32(d) for d in draws)
    if whether >= probability:
        return image
    area = (np.float32(0.02) + np.float32(0.4 - 0.02) * area) * np.float32(H * W)
    ratio = np.float32(0.3) + np.float32(1 / 0.3 - 0.3) * ratio
    height = min(max(int(np.round(np.sqrt(area * ratio))), 1), H)
    width = min(max(int(np.round(np.sqrt(area / ratio))), 1), W)
    top, left = int(row * np.float32(H - height + 1)), int(column * np.float32(W - width + 1))
    image[:, top : top + height, left : left + width] = fill[:, None, None]
    return image


def test_erasing_against_one_image_at_a_time() -> None:
    pixels, fill = some_images(200, 3, 9, 11), np.array([7, 8, 9], np.uint8)
    draws = np.random.default_rng(2).random((200, 5), dtype=np.float32)
    ours = erase(torch.from_numpy(pixels), 0.7, torch.from_numpy(draws), torch.from_numpy(fill)).numpy()
    for image, numbers, result in zip(pixels, draws, ours):
        np.testing.assert_array_equal(result, erased(image, 0.7, numbers, fill))
    changed = (ours != pixels).any(axis=(1, 2, 3))
    assert 0.6 < changed.mean() < 0.8
    # All of an image's area is within reach, its corners included.
    assert (ours != pixels).any(axis=(0, 1)).all()


def test_normalisation_against_float64() -> None:
    pixels = some_images(4, 3, 5, 5)
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    scale, shift = ((torch.from_numpy(v).float().view(1, 3, 1, 1)) for v in (1 / (255 * std), -mean / std))
    ours = normalise(torch.from_numpy(pixels), scale, shift)
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- one image


def test_grey_stays_grey_unless_told() -> None:
    pixels = some_images(5, 7)
    data = encoded(Image.fromarray(pixels))
    np.testing.assert_array_equal(decode(data, None, None)[0], pixels)
    np.testing.assert_array_equal(decode(data, 3, None)[0], np.repeat(pixels[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 65535, 32768]], np.uint16)
    pixels, done = decode(encoded(Image.fromarray(values)), None, None)
    np.testing.assert_array_equal(pixels, [[0, 1, 255, 128]])
    assert "16 bits" in done


def test_orientation_transparency_palette_and_one_bit() -> None:
    picture = Image.fromarray(some_images(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    pixels, done = decode(encoded(picture, exif=exif.tobytes()), None, None)
    np.testing.assert_array_equal(pixels, np.rot90(np.array(picture), -1))
    assert "EXIF" in done

    clear = picture.convert("RGBA")
    clear.putalpha(3)
    pixels, done = decode(encoded(clear), None, None)
    np.testing.assert_array_equal(pixels, np.array(picture))
    assert "transparency" in done

    palette = picture.quantize(8)
    assert decode(encoded(palette), None, None)[0].shape == (4, 6, 3)
    assert "transparency" in decode(encoded(palette, transparency=b"\x00\x80"), None, None)[1]
    assert set(np.unique(decode(encoded(picture.convert("1")), None, None)[0])) <= {0, 255}
    assert "made grey" in decode(encoded(picture), 1, None)[1]


def test_resizing_is_pillows_bilinear() -> None:
    picture = Image.fromarray(some_images(8, 6, 3))
    pixels, done = decode(encoded(picture), None, (4, 5))
    np.testing.assert_array_equal(pixels, np.array(picture.resize((5, 4), Image.Resampling.BILINEAR)))
    assert "resized to 4 x 5" in done


def test_pixels_that_are_no_bytes_are_refused() -> None:
    for values in (np.full((2, 2), 0.5, np.float32), np.array([[1, 70000]], np.int32), np.array([[-1, 3]], np.int32)):
        with pytest.raises(ValueError, match="8 or 16 bits"):
            decode(encoded(Image.fromarray(values), "tiff"), None, None)
    small = np.array([[1, 255]], np.int32)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(small), "tiff"), None, None)[0], small)


@pytest.mark.parametrize(("kind", "several"), [("tiff", True), ("gif", True), ("tiff", False)])
def test_an_image_of_several_frames_is_its_first_one_and_that_is_said(kind: str, several: bool) -> None:
    frames = [Image.fromarray(some_images(6, 6, seed=i)) for i in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:] if several else [])
    pixels, done = decode(data, None, None)
    assert pixels.shape[:2] == (6, 6)
    assert ("reduced to its first frame of several" in done) == several
