"""The promise on a GPU. With a single one, its ranks share it (trainer.ranks_per_gpu), over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import small_config, train
from trainer.errors import NonFiniteError, UserError
from trainer.workers import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16 = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_one_hash(tmp_path: Path, model: str, precision: dict[str, Any]) -> None:
    runs = []
    for W in (1, 2, 3):
        share = -(-W // torch.cuda.device_count())
        options = {"task": "digits", "task_options": {"model": model}, "max_steps": 14, "ranks_per_gpu": share}
        config = small_config(tmp_path / str(W), device="cuda", **options, **precision)
        runs.append(run_ranks(train, W, config, cuda=True)[0])
    for run in runs[1:]:
        assert run["trace"] == runs[0]["trace"]
        assert run["metrics"] == runs[0]["metrics"]


def test_a_non_finite_loss_is_found_without_waiting_for_the_device(tmp_path: Path) -> None:
    task = str(Path(__file__).parent / "user_tasks" / "bad_tasks.py") + ":InfiniteLater"
    with pytest.raises(NonFiniteError, match="micro-batch"):
        run_ranks(train, 1, small_config(tmp_path / "run", task=task, device="cuda"), cuda=True)


def test_more_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    W = torch.cuda.device_count() + 1
    with pytest.raises(UserError, match=f"{W} ranks on this machine"):
        run_ranks(train, W, small_config(tmp_path / "run", device="cuda"), cuda=True)
