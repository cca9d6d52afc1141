"""Images and masks as tensors: folders and arrays, two and three dimensions, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data.segmentation_data import read
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches", "one_thread")


def folder(root: Path, images: list[Any], masks: list[Any]) -> str:
    for kind, arrays in (("images", images), ("masks", masks)):
        (root / kind).mkdir(parents=True)
        for row, array in enumerate(arrays):
            Image.fromarray(array).save(root / kind / f"{row}.png")
    return str(root)


def square(side: int = 6, channels: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mask = np.zeros((side, side), np.uint8)
    mask[1:3, 1:3] = 255
    shape = (side, side) if channels == 1 else (side, side, channels)
    return random.integers(0, 256, shape, dtype=np.uint8), mask


def test_a_folder(tmp_path: Path) -> None:
    made = [square(channels=3, seed=seed) for seed in range(3)]
    found = read(folder(tmp_path / "d", [image for image, _ in made], [mask for _, mask in made]))
    train = found.splits["train"]
    assert train.image.shape == (3, 3, 6, 6) and train.image.dtype == torch.uint8
    assert (train.image[1].permute(1, 2, 0).numpy() == made[1][0]).all()
    assert train.mask.unique().tolist() == [0, 1] and found.classes.values == [0, 255]
    every = np.stack([image for image, _ in made]).astype(float)
    mean, std = train.mean_and_std()
    np.testing.assert_allclose(mean, every.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, every.std(axis=(0, 1, 2)), rtol=1e-5)


def test_images_and_masks_are_resized_alike(tmp_path: Path) -> None:
    (one, mask), (other, larger) = square(6), square(12, seed=1)
    data = folder(tmp_path / "d", [one, other], [mask, larger])
    with pytest.raises(UserError, match=r"differ in size: .*6 x 6.*12 x 12.*\n.*image_size"):
        read(data)
    train = read(data, size=(12, 12), channels=1).splits["train"]
    assert train.image.shape == (2, 1, 12, 12)
    assert train.mask[0, 2:6, 2:6].all() and int(train.mask[0].sum()) == 16


@pytest.mark.parametrize(
    ("x", "y", "shape"),
    [
        (np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), bool), (3, 1, 8, 8)),
        (np.zeros((3, 8, 8, 2), np.int16), np.zeros((3, 8, 8), np.int64), (3, 2, 8, 8)),
        (np.zeros((3, 4, 8, 8), np.float64), np.zeros((3, 4, 8, 8), np.uint8), (3, 1, 4, 8, 8)),
        (np.zeros((3, 4, 8, 8, 2), np.uint8), np.zeros((3, 4, 8, 8), np.uint8), (3, 2, 4, 8, 8)),
    ],
    ids=["2D", "2D channels", "3D", "3D channels"],
)
def test_arrays(tmp_path: Path, x: np.ndarray, y: np.ndarray, shape: tuple[int, ...]) -> None:
    y[:, 0] = 1
    np.savez(tmp_path / "data.npz", train_x=x, train_masks=y, val_x=x[:1], val_y=y[:1])
    found = read(str(tmp_path / "data.npz"))
    assert tuple(found.splits["train"].image.shape) == shape and list(found.splits) == ["train", "validation"]
    assert found.splits["train"].image.dtype == (torch.uint8 if x.dtype == np.uint8 else torch.float32)
    assert found.splits["train"].mask.shape == (3, *shape[2:]) and len(found.splits["validation"].mask) == 1


def arrays(tmp_path: Path, x: np.ndarray, y: np.ndarray) -> str:
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return str(tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 8, 8), np.uint8), np.eye(6, dtype=np.uint8)[None].repeat(2, 0), "is 8 x 8, but its mask 6 x 6"),
        (np.zeros((2, 8, 8), np.uint8), np.eye(8, dtype=np.uint8)[None], "has 2 images and y has 1 masks"),
        (np.full((2, 8, 8), np.nan), np.eye(8, dtype=np.uint8)[None].repeat(2, 0), "infinite or nan"),
        (np.zeros((2, 3, 8, 8), np.uint8), np.eye(8, dtype=np.uint8)[None].repeat(2, 0), "channels of an array come"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, x: np.ndarray, y: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(arrays(tmp_path, x, y))


def test_where_there_is_nothing(tmp_path: Path) -> None:
    for data, message in ((str(tmp_path / "no.npz"), "does not exist"), ("no_folder", "is not here")):
        with pytest.raises(UserError, match=message):
            read(data)
    path = arrays(tmp_path, np.zeros((2, 8, 8), np.uint8), np.eye(8, dtype=np.uint8)[None].repeat(2, 0))
    with pytest.raises(UserError, match=r"image_size.* only on image files"):
        read(path, size=(4, 4))
