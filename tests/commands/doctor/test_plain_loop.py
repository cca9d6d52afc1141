"""The loop that our speed is compared with computes what a person would write: the same samples, one mean gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.commands.doctor import plain_loop as loops
from trainer.commands.doctor.plain_loop import Samples, autocast, plain_loop
from trainer.config.keys import Config, parse
from trainer.ranks.place import Ranks

CPU = torch.device("cpu")
TASK = """
import torch
from torch import nn


class Task:
    def splits(self):
        x = torch.arange(24.0)[:, None]
        return {"train": {"x": x, "y": 3 * x}, "test": {"x": x, "y": 3 * x}}

    def model(self):
        layer = nn.Linear(1, 1)
        nn.init.zeros_(layer.weight)
        return layer

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, outputs, batch):
        return nn.functional.mse_loss(outputs, batch["y"], reduction="sum"), len(outputs)

    def metrics(self, outputs, batch):
        return {}
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "task.py").write_text(TASK)
    trainer: dict[str, Any] = {"task": f"{tmp_path}/task.py:Task", "device": "cpu"}
    return parse({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "trainer": trainer})


def steps(config: Config, ranks: Ranks, whole: bool, count: int = 1) -> list[list[list[float]]]:
    """The samples of each batch of each step."""
    samples = Samples(config, ranks, CPU)
    return [[a["x"].flatten().tolist() for a, _ in samples.next_step(whole)] for _ in range(count)]


def test_ranks_split_each_global_batch_and_leave_nothing_out(config: Config) -> None:
    (together,) = steps(config, Ranks(), True)
    parts = [steps(config, Ranks(rank, 2), True)[0] for rank in range(2)]
    assert [len(batches) for batches in (together, *parts)] == [1, 1, 1]
    assert parts[0][0] + parts[1][0] == together[0]
    assert len(set(together[0])) == 8


def test_micro_batches_have_the_samples_of_the_whole_batch(config: Config) -> None:
    for whole, parts in zip(steps(config, Ranks(), True, 3), steps(config, Ranks(), False, 3)):
        assert [len(part) for part in parts] == [2, 2, 2, 2]
        assert [x for part in parts for x in part] == whole[0]


def test_a_step_updates_the_model_by_the_mean_over_the_global_batch(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch or in micro-batches: else the comparison would be with another training."""
    given: list[torch.Tensor] = []
    clip = torch.nn.utils.clip_grad_norm_

    def seen(parameters: list[torch.nn.Parameter], most: float) -> torch.Tensor:
        given.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, most)

    monkeypatch.setattr(loops.torch.nn.utils, "clip_grad_norm_", seen)
    for whole in (True, False):
        torch.manual_seed(0)
        step = plain_loop(config, Ranks(), CPU, whole=whole)
        step()
    torch.testing.assert_close(given[0], given[1])
    x = torch.tensor(steps(config, Ranks(), True)[0][0])
    torch.manual_seed(0)
    bias = torch.nn.Linear(1, 1).bias.item()  # type: ignore[union-attr]
    error = bias - 3 * x  # the weight begins at 0
    torch.testing.assert_close(given[0], torch.stack([(2 * error * x).mean(), (2 * error).mean()]))


def test_the_forward_runs_in_the_configs_precision(config: Config) -> None:
    low = parse({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "torch_autocast": {"enabled": True}})
    x = torch.ones(2, 2)
    for one, dtype in ((config, torch.float32), (low, torch.bfloat16)):
        with autocast(one, CPU)():
            assert (x @ x).dtype == dtype
