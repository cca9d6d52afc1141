"""The promise on a GPU. With a single one, its ranks share it (trainer.ranks_per_gpu), over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.jobs import small_config, train, train_interrupted
from tests.distributed.test_text import classification, train_here
from trainer.config.keys import Config
from trainer.errors import NonFiniteError, UserError
from trainer.ranks.workers import run_ranks

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


def test_a_text_model_is_exact_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    """Padding of its own in each micro-batch, class weights, and a stop whose flag the host reads two steps later."""
    folder = tmp_path / "data"
    folder.mkdir()

    def config(name: str, W: int) -> Config:
        share = -(-W // torch.cuda.device_count())
        task = {"task": "text_classification", "task_options": classification(folder), "ranks_per_gpu": share}
        batch = {"train_batch_size": 20, "train_micro_batch_size_per_gpu": 4}
        return small_config(tmp_path / name, device="cuda", epochs=4, **task, **batch)

    whole = run_ranks(train_here, 1, config("whole", 1), cuda=True)[0]
    other = run_ranks(train_here, 3, config("other", 3), cuda=True)[0]
    assert other["trace"] == whole["trace"]
    stopped = run_ranks(train_interrupted, 2, config("parts", 2), {3: 1}, cuda=True)[0]
    assert "SIGTERM" in stopped["stopped"]
    resumed = run_ranks(train_interrupted, 1, config("parts", 1), {}, cuda=True)[0]
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]
    assert resumed["metrics"] == whole["metrics"]


@pytest.mark.parametrize("pack", [1, 4])
def test_cuda_graphs_have_the_same_bits(tmp_path: Path, pack: int) -> None:
    runs = []
    for graph in (None, "auto"):
        options = {"task": "digits", "task_options": {"model": "cnn"}, "max_steps": 14, "pack": pack}
        config = small_config(tmp_path / str(graph), device="cuda", cuda_graph=graph, **options)
        runs.append(run_ranks(train, 1, config, cuda=True)[0])
    assert runs[1]["trace"] == runs[0]["trace"]
    assert runs[1]["cuda_graph"]["shapes"]


def test_a_non_finite_loss_is_found_without_waiting_for_the_device(tmp_path: Path) -> None:
    task = str(Path(__file__).parent / "user_tasks" / "bad_tasks.py") + ":InfiniteLater"
    with pytest.raises(NonFiniteError, match="micro-batch"):
        run_ranks(train, 1, small_config(tmp_path / "run", task=task, device="cuda"), cuda=True)


def test_more_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    W = torch.cuda.device_count() + 1
    with pytest.raises(UserError, match=f"{W} ranks on this machine"):
        run_ranks(train, W, small_config(tmp_path / "run", device="cuda"), cuda=True)
