"""The promise for image classification: BatchNorm, dropout, crops, flips, erasing, smoothing and class weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed.jobs import small_config, train
from tests.distributed.test_exactness import BF16, same_everywhere
from trainer.config.keys import Config
from trainer.ranks.place import Ranks

RESNET = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
VIT = {
    "model_type": "vit",
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.1,
}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resnet fp32": (RESNET, {}),
    "resnet bf16": (RESNET, BF16),
    "vit fp32": (VIT, {}),
    "vit bf16": (VIT, BF16),
}


def train_all(ranks: Ranks, configs: dict[str, Config]) -> dict[str, Any]:
    """Several runs, one after the other: a rank imports transformers once, which takes longer than they do."""
    runs = {}
    for name, config in configs.items():
        os.environ["TRAINER_CACHE"] = str(Path(config.trainer.task_options["data"]).parent / "cache")
        runs[name] = train(ranks, config)
    (exactness,) = {run["exactness"] for run in runs.values()}
    return {
        "exactness": exactness,
        "trace": [{f"{name}: {n}": v for n, v in step.items()} for name, run in runs.items() for step in run["trace"]],
        **{
            fact: {name: run[fact] for name, run in runs.items()}
            for fact in ("parameters_sha256", "model_sha256", "metrics", "steps")
        },
    }


def test_image_classification(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.permutation(np.repeat([0, 1, 2], [60, 50, 20]))
    x = rng.integers(0, 128, (130, 12, 12, 3), dtype=np.uint8) + (50 * y).astype(np.uint8)[:, None, None, None]
    np.savez(tmp_path / "data.npz", train_x=x, train_y=y, test_x=x[:30], test_y=y[:30])
    options = {
        "data": str(tmp_path / "data.npz"),
        "image_size": 16,
        "crop_padding": 2,
        "flip": True,
        "erasing": 0.5,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
    }

    def configs(W: int) -> dict[str, Config]:
        # 117 samples: a step of 104 and one of 13, whose second micro-batch has 5.
        return {
            name: small_config(
                tmp_path / f"{name} {W}",
                task="image_classification",
                task_options={**options, "model": spec},
                epochs=2,
                **precision,
            )
            for name, (spec, precision) in CASES.items()
        }

    summary = same_everywhere(configs, [1, 2, 3], train_all)
    assert summary["steps"] == dict.fromkeys(CASES, 4)
    assert len(set(summary["parameters_sha256"].values())) == len(CASES)
    for metrics in summary["metrics"].values():
        assert set(metrics["test"]) >= {"loss", "accuracy", "macro_f1", "auroc"}
