"""The task image_segmentation: data, augmentation, what it refuses, saves and predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.errors import UserError
from trainer.exact.order import SampleRandom
from trainer.tasks.image_segmentation import ImageSegmentation

pytest.importorskip("monai")
pytestmark = pytest.mark.usefixtures("own_caches", "one_thread")
SMALL: dict[str, Any] = {"widths": [2, 4, 4], "residual_units": 1}


def squares(path: Path, count: int = 12, shape: tuple[int, ...] = (16, 16)) -> str:
    """Bright squares, or cubes, in noise; their masks."""
    random = np.random.default_rng(0)
    x = random.integers(0, 100, (count, *shape), dtype=np.uint8)
    y = np.zeros((count, *shape), np.uint8)
    for row in range(count):
        place = tuple(slice(first := int(random.integers(0, side // 2)), first + side // 3) for side in shape)
        x[row][place] += 100
        y[row][place] = 1
    np.savez(path, x=x, y=y)
    return str(path)


def made(data: str, **options: Any) -> tuple[ImageSegmentation, Any, Any]:
    task = ImageSegmentation(data=data, **SMALL | options)
    splits = task.splits()
    torch.manual_seed(0)
    return task, splits, task.model()


@pytest.mark.parametrize("shape", [(16, 16), (8, 16, 16)])
def test_training_and_evaluation(tmp_path: Path, shape: tuple[int, ...]) -> None:
    task, splits, model = made(squares(tmp_path / "d.npz", shape=shape), validation_fraction=0.25, test_fraction=0.25)
    assert {name: len(split["mask"]) for name, split in splits.items()} == {"train": 6, "validation": 3, "test": 3}
    logits = task.forward(model, splits["train"])
    assert logits["logits"].shape == (6, 2, *shape)
    loss, count = task.loss(logits, splits["train"])
    loss.backward()
    assert count == 6 and all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        outputs = task.forward(model.eval(), splits["test"])
    assert outputs["chosen"].shape == (3, *shape[-2:]) and outputs["loss"].shape == (3,)
    assert {"mean_iou", "mean_dice", "pixel_accuracy", "iou_0", "iou_1"} == set(task.metrics(outputs, splits["test"]))
    assert task.pictures(outputs, splits["test"])["image_mask_prediction"].shape[0] == 3
    assert "train 6" in task.data_lines[0] and "grey" in task.data_lines[0]


@pytest.mark.parametrize("options", [{"crop_size": 8}, {"flip": "horizontal"}, {"crop_size": [8, 12], "flip": "all"}])
def test_an_image_and_its_mask_are_augmented_alike_whatever_the_micro_batch(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    task, splits, _ = made(squares(tmp_path / "d.npz"), **options)
    train = splits["train"]
    train["image"] = train["mask"][:, None].clone()  # so that both must stay the same
    random = SampleRandom(0, len(train["mask"]), torch.device("cpu"))

    def augmented(*rows: int) -> Any:
        index = torch.tensor(rows)
        return task.augment({name: array[index] for name, array in train.items()}, random.of(index))

    whole = augmented(0, 1, 2, 3, 4, 5)
    assert torch.equal(whole["image"][:, 0], whole["mask"])
    assert torch.equal(whole["mask"][3:5], augmented(3, 4)["mask"])
    if "crop_size" not in options:
        original = train["mask"][:6]
        flips = [torch.equal(own, first) for own, first in zip(whole["mask"], original)]
        assert 0 < sum(flips) < 6
        assert all(torch.equal(a, b) or torch.equal(a, b.flip(1)) for a, b in zip(whole["mask"], original))
    random.start_epoch(1)
    assert not torch.equal(whole["mask"], augmented(0, 1, 2, 3, 4, 5)["mask"])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((16, 18), {}, r"16 x 18.*multiple of 4.*\n.*16 or 20 for 18"),
        ((4, 4), {}, "a single pixel would be left"),
        ((16, 16), {"crop_size": 10}, r"crops of crop_size are 10 x 10.*multiple of 4"),
        ((16, 16), {"crop_size": 32}, "within images of 16 x 16"),
        ((16, 16), {"crop_size": [8, 8, 8]}, "within images of 16 x 16"),
        ((16, 16), {"crop_size": 1.5}, "a side, or a list"),
        ((16, 16), {"widths": [4]}, "at least two numbers"),
        ((16, 16), {"dice_weight": 0, "cross_entropy_weight": 0}, "nothing would be learnt"),
    ],
)
def test_refused(tmp_path: Path, shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        made(squares(tmp_path / "d.npz", shape=shape), **options)


def test_saved_loaded_and_predicted(tmp_path: Path) -> None:
    options = {"classes": {"rest": 0, "cell": 1}}
    task, splits, model = made(squares(tmp_path / "d.npz"), **options)
    (tmp_path / "model").mkdir()
    task.save(model, tmp_path / "model")
    again = ImageSegmentation(data="gone.npz", **SMALL, **options)
    loaded = again.load(tmp_path / "model").eval()
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for row in range(3):
        Image.fromarray(splits["train"]["image"][row, 0].numpy()).save(tmp_path / "in" / f"{row}.png")
    rows = list(again.predict_files(loaded, tmp_path / "in", 2, tmp_path / "out"))
    assert [row["mask"] for row in rows] == ["0.png", "1.png", "2.png"]
    with torch.no_grad():
        wanted = task.forward(model.eval(), {name: array[:3] for name, array in splits["train"].items()})["chosen"]
    for row, mask in zip(rows, wanted):
        with Image.open(tmp_path / "out" / row["mask"]) as file:
            assert (np.array(file) == mask.numpy()).all()
        assert row["share_cell"] == pytest.approx(float(mask.float().mean()), abs=1e-6)
        assert row["share_cell"] + row["share_rest"] == pytest.approx(1, abs=1e-5)
    assert list(again.predict(loaded, tmp_path / "in", 3)) == [
        {name: value for name, value in row.items() if name != "mask"} for row in rows
    ]
    (tmp_path / "model" / "segmentation.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        again.load(tmp_path / "model")
