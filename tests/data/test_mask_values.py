"""The values of masks: which are classes, what is refused, and masks of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data.mask_values import IGNORED, Classes, check_classes, checked_mask, classes_of, decode_mask
from trainer.errors import UserError


def settled(
    masks: dict[str, list[list[int]]], given: Any = None, ignore_value: int | None = None
) -> tuple[Classes, dict[str, list[list[int]]], list[str]]:
    arrays = {split: [np.array([mask]) for mask in group] for split, group in masks.items()}
    names = {split: [f"{split}{row}.png" for row in range(len(group))] for split, group in masks.items()}
    notes: list[str] = []
    classes = classes_of(arrays, names, given, ignore_value, notes)
    return classes, {split: [mask[0].tolist() for mask in group] for split, group in arrays.items()}, notes


def test_values_of_train_are_classes() -> None:
    classes, masks, notes = settled({"train": [[0, 255], [0, 0]], "test": [[255, 255]]})
    assert (classes.names, classes.values) == (["0", "255"], [0, 255])
    assert masks == {"train": [[0, 1], [0, 0]], "test": [[1, 1]]}
    assert "0, 255" in notes[0]
    assert settled({"train": [[0, 1, 2]]})[2] == [], "nothing to say of 0, 1, 2"


def test_named_classes_and_ignored_pixels() -> None:
    classes, masks, _ = settled({"train": [[7, 0, 255]]}, {"cell": 7, "rest": 0}, 255)
    assert classes.names == ["cell", "rest"], "in the order that was given: the first is the background"
    assert masks["train"] == [[0, 1, IGNORED]]
    assert settled({"train": [[0, 1]]}, ["rest", "cell", "wall"])[0].values == [0, 1, 2]


@pytest.mark.parametrize(
    ("masks", "given", "ignore_value", "message"),
    [
        ({"train": [[0, 1]], "test": [[0, 3]]}, None, None, r"test0.png holds the value 3.*train are 0, 1"),
        ({"train": [[0, 255]]}, ["rest", "cell"], None, r"train0.png holds the value 255.*classes are 0, 1"),
        ({"train": [[0, 0]]}, None, None, "only the value 0"),
        ({"train": [[0, 1, 255]]}, None, None, r"is 255 a class.*\"ignore_value\": 255"),
        ({"train": [list(range(100))]}, None, None, "more than 64 different values.*JPEG"),
        ({"train": [[0, 1], [255, 255]]}, None, 255, "train1.png holds only the ignored value 255"),
        ({"train": [[0, 1]]}, {"a": 0, "b": 255}, 255, "is also the value of a class"),
    ],
)
def test_refused(masks: Any, given: Any, ignore_value: int | None, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        settled(masks, given, ignore_value)


@pytest.mark.parametrize("given", [["one"], ["a", "a"], {"a": 1, "b": 1}, {"a": 0, "b": True}, [1, 2], "a", {}])
def test_the_option_classes(given: Any) -> None:
    with pytest.raises(UserError, match="2 to 255 different names"):
        check_classes(given)


def test_masks_are_whole_numbers_without_channels() -> None:
    assert checked_mask("a", np.array([[True, False]])).dtype == np.uint8
    with pytest.raises(UserError, match="float64"):
        checked_mask("a", np.zeros((2, 2)))
    with pytest.raises(UserError, match="two or three dimensions"):
        checked_mask("a", np.zeros((2, 2, 2, 1), np.uint8))


def test_files(tmp_path: Path) -> None:
    values = np.array([[0, 5], [250, 0]], np.uint8)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([values] * 3, axis=2)).save(tmp_path / "as_rgb.png")
    palette = Image.fromarray(values)
    palette.putpalette(list(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    for name in ("grey", "as_rgb", "palette"):
        assert decode_mask(tmp_path / f"{name}.png", None).tolist() == values.tolist(), name
    assert set(decode_mask(tmp_path / "grey.png", (5, 7)).ravel().tolist()) == {0, 5, 250}, "no values between them"
    Image.new("RGB", (2, 2), (200, 0, 0)).save(tmp_path / "red.png")
    with pytest.raises(UserError, match="coloured"):
        decode_mask(tmp_path / "red.png", None)
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no.png cannot be read"):
        decode_mask(tmp_path / "no.png", None)
