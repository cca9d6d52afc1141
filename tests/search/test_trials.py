"""Which trial comes next, and what is written of one that has ended. No run is made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.search.small import write
from trainer.search.declaration import load_search
from trainer.search.ledger import Ledger
from trainer.search.places import Job
from trainer.search.trial import PRUNED
from trainer.search.trials import Trials

LR = "optimizer.params.lr"
SAMPLES = 24


def opened(folder: Path, **search: Any) -> Trials:
    """The trials of a search whose validation split has `SAMPLES` samples; a further call continues it."""
    block = {"output_dir": str(folder / "out"), "pruner": {"type": "none"}} | search
    plan = load_search(str(write(folder, **block)))
    (plan.folder / "trials").mkdir(parents=True, exist_ok=True)
    return Trials(plan, Ledger(plan.folder, plan.search, plan.space, plan.values, "max"), "accuracy", "max", SAMPLES)


def ended(accuracy: float | None, **more: Any) -> dict[str, Any]:
    """The summary of a run, as `trial.make` returns it."""
    curves = {} if accuracy is None else {"accuracy": {"epoch": [1, 2], "value": [accuracy - 0.1, accuracy]}}
    metrics = {"validation": {"accuracy": accuracy, "loss": 0.5}}
    summary = {"status": "finished", "metrics": metrics, "curves": curves, "validation_samples": SAMPLES}
    return summary | {"exactness": "bitwise", "steps": 8, "wall_time_s": 1.5, "parameters_sha256": "ab" * 32} | more


def begun(trials: Trials) -> Job:
    job = trials.next()
    assert job is not None
    return job


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((folder / "out" / "trials").glob("*.json"))]


def test_a_configuration_that_is_drawn_twice_is_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the file's own rate of 0.1, the list holds only one other."""
    trials, runs = opened(tmp_path, parameters={LR: [0.1, 0.2]}, sampler="random", trials=6), 0
    while (job := trials.next()) is not None:
        runs += 1
        trials.done(job, "done", ended(job.config.optimizer.params["lr"]))
    assert runs == 2
    found = written(tmp_path)
    assert [result["value"] for result in found] == [result["point"][LR] for result in found]
    again = [result for result in found if "as" in result]
    assert len(again) == 4
    assert all(found[result["as"]]["point"] == result["point"] for result in again)
    assert "the same as trial 1" in capsys.readouterr().out


def test_values_that_contradict_one_another_are_a_failed_trial_without_a_run(tmp_path: Path) -> None:
    parameters = {"train_batch_size": [16, 64], "train_micro_batch_size_per_gpu": [32, 8]}
    trials = opened(tmp_path, parameters=parameters, sampler="grid", trials=None)
    job = begun(trials)  # the first combination has micro-batches of 32 samples and a batch of 16
    assert (job.name, job.config.train_micro_batch_size_per_gpu) == ("trial-0001", 8)
    (failed,) = written(tmp_path)
    assert failed["state"] == "failed"
    assert "is larger than train_batch_size (16)" in failed["reason"]


@pytest.mark.parametrize(
    ("summary", "state", "reason"),
    [
        (ended(0.9), "complete", None),
        (ended(0.9, validation_samples=23), "failed", "its validation split has 23 samples, others have 24"),
        (ended(None), "failed", "validation accuracy is not a finite number, or not measured"),
        (ended(float("nan")), "failed", "validation accuracy is not a finite number, or not measured"),
        (ended(None, status="not finite", metrics={}, reason="the loss is nan"), "failed", "the loss is nan"),
        (ended(0.2, status="pruned", metrics={}), "pruned", None),
    ],
)
def test_only_a_trial_that_can_be_compared_is_complete(
    tmp_path: Path, summary: dict[str, Any], state: str, reason: str | None
) -> None:
    trials = opened(tmp_path)
    trials.done(begun(trials), "done", summary)
    (found,) = written(tmp_path)
    assert (found["state"], found["reason"]) == (state, reason)
    assert (found["value"] is None) == (state != "complete")


def test_three_failures_before_any_success_end_the_search(tmp_path: Path) -> None:
    trials = opened(tmp_path, trials=9)
    for _ in range(3):
        assert trials.hopeless is None
        trials.done(begun(trials), "traceback", "Traceback ...\nValueError: no such file")
    assert str(trials.hopeless).startswith("The first 3 trials could not be made.")
    assert trials.next() is None
    assert {result["reason"] for result in written(tmp_path)} == {"ValueError: no such file"}


def test_failures_after_a_success_end_nothing(tmp_path: Path) -> None:
    trials = opened(tmp_path, trials=9)
    trials.done(begun(trials), "done", ended(0.9))
    for _ in range(4):
        trials.done(begun(trials), "died", "exit code 3")
    assert trials.hopeless is None
    assert trials.left() == 4


def test_a_trial_that_was_under_way_is_made_again_and_one_that_had_ended_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process is killed with two trials under way. The file of one is written, but Optuna was not told."""
    trials = opened(tmp_path)
    trials.done(begun(trials), "done", ended(0.9))
    first, second = begun(trials), begun(trials)
    trials._ledger.finish = lambda *_, **__: None  # type: ignore[method-assign]
    trials.done(first, "done", ended(0.8))
    again = opened(tmp_path)
    assert again.left() == 3, "two under way, and one that was not begun"
    job = begun(again)
    assert (job.name, job.config) == (second.name, second.config)
    again.done(job, "done", ended(0.7))
    last = begun(again)
    assert last.name == "trial-0003"
    again.done(last, "done", ended(0.6))
    assert again.next() is None
    assert [result["value"] for result in written(tmp_path)] == [0.9, 0.8, 0.7, 0.6]
    assert not any("as" in result for result in written(tmp_path)), "none is a repetition of another"
    assert "1 trial ended before; the search continues" in capsys.readouterr().out


def test_a_trial_that_is_to_end_early_hears_it_until_it_ends(tmp_path: Path) -> None:
    """With several ranks the answer is heard only at a later question, which has no new value."""
    trials = opened(tmp_path, pruner={"type": "median", "first_trials": 1})
    first = begun(trials)
    for epoch in (1, 2):
        assert trials.report(first, {"epoch": epoch, "metrics": {"accuracy": 0.9}}) is None
    trials.done(first, "done", ended(0.9))
    second = begun(trials)
    assert trials.report(second, {"epoch": 1, "metrics": {"accuracy": float("nan")}}) is None, "nothing to compare"
    assert trials.report(second, {"epoch": 2, "metrics": {"accuracy": 0.1}}) == PRUNED
    assert trials.report(second, None) == PRUNED


def test_no_trial_begins_after_the_time_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("trainer.search.trials.time.monotonic", lambda: now[0])
    trials = opened(tmp_path, trials=None, max_wall_time_s=60.0)
    assert trials.left() is None, "the time decides"
    job = begun(trials)
    now[0] += 45
    trials.done(job, "done", ended(0.9))
    again = opened(tmp_path, trials=None, max_wall_time_s=60.0)
    assert begun(again).name == "trial-0001"
    now[0] += 16  # 45 s were used by the first call
    assert again.next() is None
