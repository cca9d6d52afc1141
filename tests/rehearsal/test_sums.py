"""A run begins only with a loss that is a sum: a mean is refused, however it is written, and no sum is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import USER_TASKS, kept_state, rehearsed_state, small_config, train
from trainer.errors import UserError
from trainer.ranks.workers import run_ranks

MEANS = f"{USER_TASKS}/mean_tasks.py"


@pytest.mark.parametrize("task", ["Mean", "MeanInForward", "MeanOfNoise", "WholeMicroBatch", "MeanWithAPenalty"])
def test_a_loss_that_averages_is_refused(tmp_path: Path, task: str) -> None:
    with pytest.raises(UserError, match=rf"{task}\.loss\(\) averages over its micro-batch.*\nSum instead"):
        run_ranks(kept_state, 1, small_config(tmp_path / "run", task=f"{MEANS}:{task}"))


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (3, {}),
        (2, {"zero_optimization": {"stage": 1}}),
        (1, {"train_batch_size": 8}),
        (1, {"train_batch_size": 13, "train_micro_batch_size_per_gpu": 1}),
    ],
)
def test_it_is_refused_at_any_number_of_ranks_and_micro_batches(
    tmp_path: Path, world_size: int, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"loss\(\) averages over its micro-batch"):
        run_ranks(train, world_size, small_config(tmp_path / "run", task=f"{MEANS}:Mean", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("my_task.py:MyTask", {}),
        ("more_tasks.py:Words", {}),
        ("more_tasks.py:Pulls", {}),
        ("mean_tasks.py:SumInForward", {}),
        ("mean_tasks.py:SumWithAPenalty", {}),
        ("mean_tasks.py:WholeMicroBatchTimesItsSize", {}),
        ("mean_tasks.py:Scales", {}),
        ("mean_tasks.py:Cancels", {}),
        ("mean_tasks.py:OneSize", {"drop_last": True}),
        ("my_task.py:MyTask", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    ],
)
def test_a_sum_is_not_taken_for_a_mean(tmp_path: Path, task: str, changes: dict[str, Any]) -> None:
    run_ranks(kept_state, 1, small_config(tmp_path / "run", task=f"{USER_TASKS}/{task}", **changes))


@pytest.mark.parametrize("task", ["SumInForward", "Scales"])
def test_looking_at_the_loss_changes_nothing(tmp_path: Path, task: str) -> None:
    before, after = run_ranks(rehearsed_state, 1, small_config(tmp_path / "run", task=f"{MEANS}:{task}"))[0]
    assert before == after
