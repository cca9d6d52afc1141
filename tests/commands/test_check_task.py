"""`check-task` finds each of the usual causes, in words, and passes what is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.jobs import USER_TASKS
from trainer.commands.cli import main

BAD = f"{USER_TASKS}/bad_tasks.py"


@pytest.mark.parametrize("task", [f"{USER_TASKS}/my_task.py:MyTask", "digits"])
def test_an_exact_task_passes(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-task", task]) == 0
    out = capsys.readouterr().out
    assert "is exact: rehearsed in micro-batches of 8" in out
    assert "two steps at 1, 2 and 3 ranks gave the same bits" in out
    assert "NOT EXACT" not in out


def test_it_uses_the_micro_batches_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ragged ones, too: 500 = 4 x 110 + 60, in micro-batches of 15 or 16."""
    config = {"train_batch_size": 110, "train_micro_batch_size_per_gpu": 16}
    (tmp_path / "config.json").write_text(json.dumps(config | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}))
    task = f"{USER_TASKS}/inexact_tasks.py:AugmentsByPowers"
    assert main(["check-task", task, "--ds_config", str(tmp_path / "config.json")]) == 0
    assert "rehearsed in micro-batches of 15 or 16 samples" in capsys.readouterr().out


def test_a_counter_that_changes_nothing_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-task", f"{USER_TASKS}/inexact_tasks.py:HarmlessState"]) == 0
    assert "note: the task's attribute calls changes with micro-batches. No number" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("PythonRandom", ["draws from Python's random module", "torch.rand"]),
        ("NumpyRandom", ["draws from numpy's global generator"]),
        ("RankNoise", ["generator of its own", "2 ranks differ from one, first at step 1, in loss"]),
        ("StatefulModel", ["buffer seen changes in its forward", "rank 0's"]),
        ("OtherDataEachCall", ["splits() gives other data at a second call"]),
    ],
)
def test_each_cause_is_named(task: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check-task", f"{BAD}:{task}"])
    captured = capsys.readouterr()
    assert code == 1, captured
    for word in ["NOT EXACT", *words]:
        assert word in captured.out


def test_samples_that_see_one_another_are_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-task", f"{BAD}:SeesItsNeighbours"]) == 0
    assert (
        "note: in evaluation, too, a sample's loss depends on the other samples of its micro-batch"
        in capsys.readouterr().out
    )


def test_what_gpus_would_refuse_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    """Exact on CPUs; on a GPU, its run would end in an error. Nobody needs a GPU to hear of it."""
    assert main(["check-task", f"{USER_TASKS}/inexact_tasks.py:PoolsToMoreThanOne"]) == 0
    out = capsys.readouterr().out
    note = (
        "note: on GPUs torch refuses this model, because it has no exact kernel there: the module pool "
        "(AdaptiveAvgPool1d) uses adaptive_avg_pool2d_backward. This computes the same, up to rounding: F.adaptive_"
    )
    assert out.count(note) == out.count("note: ") == 1
    assert "is exact" in out


@pytest.mark.parametrize("task", ["Mean", "RowsOfAMean"])
def test_a_loss_that_averages_is_an_error(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-task", f"{USER_TASKS}/mean_tasks.py:{task}"]) == 2
    assert f"{task}.loss() averages over its micro-batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("MeanLoss", "shape (8,)"),
        ("NoCount", "two things"),
        ("Crashes", "KeyError: 'nope'"),
        ("NoSuch", "no class NoSuch"),
    ],
)
def test_a_task_that_cannot_run_is_an_error(task: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-task", f"{BAD}:{task}"]) == 2
    assert words in capsys.readouterr().err


def test_a_class_of_another_type_is_explained_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As numpy and pandas give them on some machines."""
    (tmp_path / "typed.py").write_text(
        "import torch\nimport torch.nn.functional as F\n\n\nclass Typed:\n"
        "    def splits(self):\n"
        "        return {'train': {'x': torch.randn(64, 3), 'y': torch.zeros(64, dtype=torch.int32)}}\n\n"
        "    def model(self):\n        return torch.nn.Linear(3, 2)\n\n"
        "    def forward(self, model, batch):\n        return model(batch['x'])\n\n"
        "    def loss(self, outputs, batch):\n"
        "        return F.cross_entropy(outputs, batch['y'], reduction='sum'), len(batch['y'])\n\n"
        "    def metrics(self, outputs, batch):\n        return {}\n"
    )
    assert main(["check-task", f"{tmp_path}/typed.py:Typed"]) == 2
    err = capsys.readouterr().err
    assert "typed.py, line 16, in loss(), gets a tensor of the wrong type" in err and "int64" in err
