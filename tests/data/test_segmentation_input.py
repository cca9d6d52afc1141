"""What segmentation predicts on, and the masks that it writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data.segmentation_input import inputs, write_mask
from trainer.errors import UserError


def test_images_are_resized_and_masks_have_their_own_size(tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    for name in ("a.png", "b/a.png"):
        Image.new("L", (20, 10), 7).save(tmp_path / "in" / name)
    kind, found = inputs(tmp_path / "in", 3, (4, 8), [])
    rows = list(found)
    assert kind == "file" and [row[1].shape for row in rows] == [(3, 4, 8)] * 2
    assert [row[2] for row in rows] == [(10, 20)] * 2
    taken: set[str] = set()
    names = [write_mask(np.full((4, 8), 255), size, tmp_path / "out", name, taken) for name, _, size in rows]
    assert names == ["a.png", "a_2.png"], "one does not overwrite the other"
    with Image.open(tmp_path / "out" / "a.png") as mask:
        assert mask.size == (20, 10) and np.unique(np.array(mask)).tolist() == [255]


def test_a_folder_as_training_takes_it_has_no_masks_to_predict_on(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 7).save(tmp_path / "train" / name / "0.png")
    notes: list[str] = []
    _, found = inputs(tmp_path, 1, (8, 8), notes)
    assert [name for name, _, _ in found] == [str(tmp_path / "train" / "images" / "0.png")]
    assert len(notes) == 1 and "images alone (train/images). 1 other file is left out" in notes[0]
    _, found = inputs(tmp_path / "train" / "masks", 1, (8, 8), notes)
    assert len(list(found)) == 1 and len(notes) == 1, "a folder that is named itself is predicted on"


def test_volumes(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros((2, 4, 4, 4), np.float32))
    kind, found = inputs(tmp_path / "in.npz", 1, (4, 4, 4), [])
    assert kind == "row" and [row for row, _, _ in found] == [0, 1]
    assert write_mask(np.full((4, 4, 4), 2), (4, 4, 4), tmp_path, 0, set()) == "row_00000.npz"
    with np.load(tmp_path / "row_00000.npz") as file:
        assert file["mask"].dtype == np.uint8 and (file["mask"] == 2).all()
    for channels, size in ((2, (4, 4, 4)), (1, (4, 4, 8))):
        with pytest.raises(UserError, match="the model was trained on"):
            list(inputs(tmp_path / "in.npz", channels, size, [])[1])


def test_nothing_to_predict_on(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(UserError, match="holds no images"):
        inputs(tmp_path, 1, (4, 4), [])
