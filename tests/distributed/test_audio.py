"""The promise for audio: BatchNorm, moves and masks of log-mel features, a pretrained model; with packs and without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.data.test_audio_data import tones
from tests.distributed.jobs import small_config, train
from tests.distributed.test_exactness import same_everywhere
from tests.tasks.test_audio_classification import SMALL, WAV2VEC2, pretrained_folder
from trainer.config.keys import Config
from trainer.ranks.place import Ranks

# Each number of ranks has packs of another size.
PACKS = {1: 4, 2: 1, 3: 3}


def train_cached(ranks: Ranks, config: Config) -> dict[str, Any]:
    """`train`, with the features of one cache, beside the data."""
    os.environ["TRAINER_CACHE"] = str(Path(config.trainer.task_options["data"]).parent / "cache")
    return train(ranks, config)


def configs(folder: Path, options: dict[str, Any], **more: Any) -> Any:
    data = tones(folder / "tones", ("train", "test"), each=9)

    def of(W: int) -> Config:
        # 16 samples of train: a step of 5 micro-batches, and one of 6 samples in 3.
        sizes = {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2, "epochs": 2, "pack": PACKS[W]}
        task = {"task": "audio_classification", "task_options": {"data": str(data), **options}}
        return small_config(folder / f"run{W}", **sizes, **task, **more)

    return of


def test_log_mel_features(tmp_path: Path) -> None:
    options = {**SMALL, "shift_seconds": 0.05, "mask_seconds": 0.05, "mask_bands": 4, "class_weights": "balanced"}
    summary = same_everywhere(configs(tmp_path, options), [1, 2, 3], train_cached)
    assert summary["steps"] == 4
    assert summary["pack"]["size"] == 4 and "refused" not in summary["pack"]
    assert set(summary["metrics"]["test"]) >= {"loss", "accuracy", "macro_f1", "auroc"}


def test_a_pretrained_model(tmp_path: Path) -> None:
    """wav2vec2, whose clips have lengths, dropout, and a convolution with weight norm."""
    folder = pretrained_folder(tmp_path / "base", WAV2VEC2, return_attention_mask=True)
    summary = same_everywhere(configs(tmp_path, {"model": str(folder), "max_seconds": 0.25}), [1, 2, 3], train_cached)
    assert summary["steps"] == 4
