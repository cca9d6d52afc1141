"""Folders of images and masks: which mask belongs to which image, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.data import sources
from trainer.data.segmentation_files import pairs
from trainer.errors import UserError


def touch(root: Path, *names: str) -> sources.Found:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    found = sources.find(str(root))
    assert found is not None
    return found


def paired(found: sources.Found) -> dict[str, list[tuple[str, str]]]:
    return {split: [(found.name(i), found.name(m)) for i, m in own] for split, own in pairs(found)[0].items()}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["images/a.png", "masks/a.png"], {"train": [("images/a.png", "masks/a.png")]}),
        (["imgs/a.jpg", "imgs/b.jpg", "labels/a_mask.png", "labels/b.png"],
         {"train": [("imgs/a.jpg", "labels/a_mask.png"), ("imgs/b.jpg", "labels/b.png")]}),
        (["train/images/a.png", "train/masks/a.png", "val/images/a.png", "val/masks/a.png"],
         {"train": [("train/images/a.png", "train/masks/a.png")],
          "validation": [("val/images/a.png", "val/masks/a.png")]}),
        (["images/train/a.npy", "masks/train/a.npy", "images/test/b.npy", "masks/test/b.npy"],
         {"train": [("images/train/a.npy", "masks/train/a.npy")], "test": [("images/test/b.npy", "masks/test/b.npy")]}),
        (["train_images/a.png", "train_masks/a.png", "test_images/a.png", "test_masks/a.png"],
         {"train": [("train_images/a.png", "train_masks/a.png")],
          "test": [("test_images/a.png", "test_masks/a.png")]}),
        (["images/p1/a.png", "images/p2/a.png", "masks/p1/a.png", "masks/p2/a.png"],
         {"train": [("images/p1/a.png", "masks/p1/a.png"), ("images/p2/a.png", "masks/p2/a.png")]}),
    ],
    ids=["plain", "ends of names", "splits above", "splits below", "splits in names", "folders below"],
)  # fmt: skip
def test_layouts(tmp_path: Path, names: list[str], wanted: dict[str, list[tuple[str, str]]]) -> None:
    assert paired(touch(tmp_path, *names)) == wanted


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["images/a.png", "images/b.png", "masks/a.png"], "1 image has no mask: images/b.png"),
        (["images/a.png", "masks/a.png", "masks/b.png", "masks/c.png"],
         "2 masks have no image: masks/b.png, masks/c.png"),
        (["images/a.png", "masks/a_mask.png", "masks/a_seg.png"],
         "masks/a_mask.png and masks/a_seg.png are both the mask of one sample"),
        (["a.png", "masks/a.png"], "no folder of images was found"),
        (["images/a.nii.gz", "masks/a.nii.gz"], "nibabel"),
        (["test/images/a.png", "test/masks/a.png"], "has the splits test, but none for training"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pairs(touch(tmp_path, *names))
