"""Tables: the same bits at every number of ranks and with packs, and predictions of what a run saved."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import small_config, train
from tests.standing import run_ranks
from tests.tasks.test_tabular import CLASSES, PRICES, rows, write
from trainer.commands.cli import main

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.mark.parametrize(
    ("options", "columns"),
    [(CLASSES | {"class_weights": "balanced"}, ["label", "score"]), (PRICES | {"model": "mlp"}, ["value"])],
    ids=["classes-resnet", "prices-mlp"],
)
def test_the_same_bits_with_packs_and_predictions(tmp_path: Path, options: dict[str, Any], columns: list[str]) -> None:
    data = write(tmp_path / "data.csv", rows())

    def run(W: int, pack: int) -> dict[str, Any]:
        # 72 samples: three steps of 5 micro-batches of 4, and one of 12 samples in 3.
        sizes = {"train_batch_size": 20, "train_micro_batch_size_per_gpu": 4, "epochs": 2, "pack": pack}
        more = {"task": "tabular", "task_options": {"data": data, **options}}
        environment = {"TRAINER_CACHE": str(tmp_path / "cache")}
        result: dict[str, Any] = run_ranks(
            train, W, small_config(tmp_path / f"run{W}", **sizes, **more), environment=environment
        )[0]
        return result

    one, three = run(1, 5), run(3, 1)
    assert one["exactness"] == "bitwise" and len(one["trace"]) == 8
    assert one["trace"] == three["trace"]
    assert one["pack"]["size"] == 5 and "refused" not in one["pack"]
    target = tmp_path / "out.csv"
    assert main(["predict", "--model", str(tmp_path / "run1"), "--input", data, "--output", str(target)]) == 0
    with target.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 80 and list(found[0]) == columns
