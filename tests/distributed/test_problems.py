"""Several labels, numbers and tags: the same bits at every number of ranks, with packs, and once saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import small_config
from tests.distributed.test_text import train_here
from tests.standing import run_ranks
from tests.tasks import test_problems as problems
from tests.tasks import test_token_classification as tokens
from trainer.api import evaluation

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.mark.parametrize("case", ["texts-several", "texts-numbers", "images-several", "images-numbers", "tags"])
def test_the_same_bits_with_packs_and_once_saved(case: str, tmp_path: Path) -> None:
    options: dict[str, Any] = problems.TAGS if case.endswith("several") else problems.AMOUNT
    if case == "tags":
        task, options = "token_classification", {"data": tokens.conll(tmp_path / "a.conll"), "model": tokens.BERT}
    elif case.startswith("texts"):
        task = "text_classification"
        options = options | {"data": problems.texts(tmp_path / "data.csv"), "model": problems.BERT}
    else:
        task = "image_classification"
        options = options | {"data": problems.images(tmp_path / "images", 60), "model": problems.RESNET}

    def run(W: int, pack: int) -> dict[str, Any]:
        # About 54 samples: two steps of 5 micro-batches of 4, and a smaller one.
        sizes = {"train_batch_size": 20, "train_micro_batch_size_per_gpu": 4, "epochs": 2, "pack": pack}
        config = small_config(tmp_path / f"run{W}", task=task, task_options=options, **sizes)
        result: dict[str, Any] = run_ranks(train_here, W, config)[0]
        return result

    one, three = run(1, 5), run(3, 1)
    assert one["exactness"] == "bitwise" and len(one["trace"]) == 6
    assert one["trace"] == three["trace"] and one["metrics"] == three["metrics"]
    assert one["pack"]["size"] == 5 and "refused" not in one["pack"]
    again = evaluation.evaluate(tmp_path / "run1", "validation")
    expected = one["metrics"]["validation"]
    if case.startswith("images"):  # grey images are saved with three channels, which rounds
        expected = pytest.approx(expected, rel=1e-3)
    assert again == expected
