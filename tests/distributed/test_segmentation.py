"""Segmentation: the same bits at every number of ranks and with packs, crops and mirrors included; masks of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.distributed.jobs import small_config, train
from tests.standing import run_ranks
from tests.tasks.test_image_segmentation import SMALL, squares
from trainer.commands.cli import main

pytest.importorskip("monai")
pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8)], ids=["2D", "3D"])
def test_the_same_bits_with_packs_and_masks(
    tmp_path: Path, shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    data = squares(tmp_path / "data.npz", 16, shape)
    norm = "instance" if len(shape) == 2 else "batch"
    options = {**SMALL, "data": data, "crop_size": 8, "flip": "all", "validation_fraction": 0.1, "norm": norm}
    if len(shape) == 3:
        del options["crop_size"]

    def run(W: int, pack: int) -> dict[str, Any]:
        # 14 samples: a step of 5 micro-batches, and one of 4 samples in 2.
        sizes = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2, "epochs": 2, "pack": pack}
        more = {"task": "image_segmentation", "task_options": options, "evaluate_micro_batch_size": 2}
        environment = {"TRAINER_CACHE": str(tmp_path / "cache")}
        result: dict[str, Any] = run_ranks(
            train, W, small_config(tmp_path / f"run{W}", **sizes, **more), environment=environment
        )[0]
        return result

    one, three = run(1, 5), run(3, 1)
    assert one["exactness"] == "bitwise" and len(one["trace"]) == 4
    assert one["trace"] == three["trace"]
    assert one["pack"]["size"] == 5 and "refused" not in one["pack"]
    target = tmp_path / "masks"
    command = ["predict", "--model", str(tmp_path / "run1"), "--input", data, "--output", str(target)]
    assert main(command) == 0
    suffix = "png" if len(shape) == 2 else "npz"
    assert (target / "predictions.csv").read_text().splitlines()[0] == "row,share_0,share_1,mask"
    assert len(list(target.glob(f"row_*.{suffix}"))) == 16
    if len(shape) == 2:
        with Image.open(target / "row_00000.png") as mask:
            assert mask.size == shape
    capsys.readouterr()
    assert main(command) != 0 and "is not empty" in capsys.readouterr().err
