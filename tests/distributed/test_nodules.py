"""The nodule autoencoders give the same bits at every world size: BatchNorm, drawn codes and turned masks included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import small_config
from tests.distributed.test_exactness import BF16, same_everywhere
from tests.tasks.test_nodules import write_balls


@pytest.mark.parametrize(
    ("model", "precision"), [("vae", {}), ("vae", BF16), ("autoencoder", {})], ids=["vae", "vae bf16", "autoencoder"]
)
def test_nodules(tmp_path: Path, model: str, precision: dict[str, Any]) -> None:
    data = write_balls(tmp_path / "balls.npz", patients=40, masks_each=2)
    options = {"data": str(data), "model": model, "latent": 4, "width": 2}

    # M = 7 micro-batches a step, the last of 2 masks, and a smaller last step in an epoch.
    summary = same_everywhere(
        lambda W: small_config(
            tmp_path / str(W),
            task="nodules",
            task_options=options,
            train_batch_size=26,
            train_micro_batch_size_per_gpu=4,
            epochs=2,
            evaluate_micro_batch_size=4,
            **precision,
        ),
        [1, 2, 3],
    )
    assert summary["steps"] == 6
    metrics = summary["metrics"]["test"]
    assert ("kl" in metrics) == (model == "vae")
    if model == "vae":
        assert metrics["loss"] == pytest.approx(metrics["negative_elbo"], rel=1e-6)
