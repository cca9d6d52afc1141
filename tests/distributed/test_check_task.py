"""`check-task` finds each of the usual causes, in words, and passes what is exact."""

from __future__ import annotations

import pytest

from tests.distributed.jobs import USER_TASKS
from trainer.cli import main

BAD = f"{USER_TASKS}/bad_tasks.py"


@pytest.mark.parametrize("task", [f"{USER_TASKS}/my_task.py:MyTask", "digits"])
def test_an_exact_task_passes(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-task", task]) == 0
    out = capsys.readouterr().out
    assert "is exact: two steps at 1, 2 and 3 ranks gave the same bits" in out
    assert "NOT EXACT" not in out


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("AveragesItsLoss", ["loss() averages over its micro-batch", 'reduction="sum"']),
        ("PythonRandom", ["draws from Python's random module", "torch.rand"]),
        ("NumpyRandom", ["draws from numpy's global generator"]),
        ("RankNoise", ["generator of its own", "2 ranks differ from one, first at step 1, in loss"]),
        ("StatefulModel", ["buffer seen changes in forward()"]),
        ("OtherDataEachCall", ["splits() gives other data at a second call"]),
        ("AugmentsFromElsewhere", ["augment() gives other values for 'x' at a second call"]),
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
    assert "note: in evaluation, too, a sample's loss depends on the samples beside it" in capsys.readouterr().out


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
