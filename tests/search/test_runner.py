"""Whole searches, on one device: stopped and continued, the test split once, and a config that gives the same bits."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import train
from tests.search.small import evaluations, trials, write_own
from trainer.config.keys import load_config
from trainer.errors import UserError
from trainer.ranks.workers import run_ranks
from trainer.search.runner import search
from trainer.search.trials import Trials

ROOT = Path(__file__).resolve().parents[2]
LR = "optimizer.params.lr"


def test_the_best_config_gives_the_trials_bits_on_two_ranks(whole: Path, tmp_path: Path) -> None:
    choice = json.loads((whole / "out" / "choice.json").read_text())
    overrides = {"trainer.output_dir": str(tmp_path / "run"), "tensorboard.enabled": False}
    config = load_config(whole / "out" / "best.json", overrides)
    assert run_ranks(train, 2, config)[0]["parameters_sha256"] == choice["parameters_sha256"]


def test_what_has_been_tested_is_closed(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [trials(whole), evaluations(whole).count("test")]
    assert search(str(whole / "search.json"), {"search.trials": 9}) == 0
    assert [trials(whole), evaluations(whole).count("test")] == before
    said = capsys.readouterr().out
    assert "It makes no more trials" in said
    assert "measured once, after the choice" in said


def test_another_search_is_not_mixed_in(whole: Path) -> None:
    with pytest.raises(UserError, match=r"holds another search: base differs in trainer"):
        search(str(whole / "search.json"), {"trainer.epochs": 3})
    task = whole / "task.py"
    before = task.read_text()
    try:
        task.write_text(before + "\nCHANGED = True\n")
        with pytest.raises(UserError, match="holds runs of another version of the task"):
            search(str(whole / "search.json"))
    finally:
        task.write_text(before)


def test_a_search_that_is_stopped_goes_on_to_the_same_trials(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by Ctrl-C, in the middle of the second trial, and again in the middle of the tests."""
    path, report = write_own(tmp_path), Trials.report

    def stopping(self: Trials, job: Any, event: dict[str, Any]) -> str | None:
        if job.name == "trial-0001":
            raise KeyboardInterrupt
        return report(self, job, event)

    monkeypatch.setattr(Trials, "report", stopping)
    assert search(str(path)) == 75
    assert "stopped. What has ended is kept (1 trial: 1 finished)." in capsys.readouterr().out
    monkeypatch.setattr(Trials, "report", report)
    assert search(str(path)) == 0
    assert trials(tmp_path) == trials(whole)
    assert evaluations(tmp_path).count("test") == 2


def test_a_search_that_is_killed_goes_on_to_the_same_trials(tmp_path: Path, whole: Path) -> None:
    """By SIGKILL, so that nothing of it can tidy up; its processes end by themselves."""
    path = write_own(tmp_path)
    begun = subprocess.Popen(
        [sys.executable, "-m", "trainer", "search", str(path)], cwd=ROOT, stdout=subprocess.DEVNULL
    )  # fmt: skip
    journal = tmp_path / "out" / "journal.log"
    try:
        while not (trials(tmp_path) and '"trial_id":1' in journal.read_text().replace(" ", "")):
            assert begun.poll() is None
            time.sleep(0.02)
    finally:
        begun.kill()
        begun.wait()
    done = trials(tmp_path)
    assert len(done) < 4
    assert search(str(path)) == 0
    assert trials(tmp_path) == trials(whole)


def test_all_devices_for_one_trial_give_its_bits_and_heed_the_pruner(tmp_path: Path) -> None:
    """Two ranks for each trial; the second is much worse."""
    path = write_own(
        tmp_path, sampler="grid", parameters={LR: [0.1, 1e-7]}, trials=None, test_seeds=1, max_parallel=2,
        devices_per_trial="all", pruner={"type": "median", "first_trials": 1},
    )  # fmt: skip
    config = load_config(path, {"trainer.epochs": 8, "trainer.log_every_steps": 1, "tensorboard.enabled": False})
    assert search(str(path), {"trainer.epochs": 8, "trainer.log_every_steps": 1}) == 0
    (_, _, first, _, parameters), (_, _, second, _, _) = trials(tmp_path)
    assert (first, second) == ("complete", "pruned")
    alone = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, output_dir=str(tmp_path / "run")))
    assert run_ranks(train, 1, alone)[0]["parameters_sha256"] == parameters


def test_the_example_of_the_readme_is_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names accuracy, and not that a high one is better."""
    readme = (ROOT / "trainer" / "search" / "README.md").read_text()
    (tmp_path / "mine.json").write_text(readme.split("```json\n", 1)[1].split("```", 1)[0])
    short = {"trainer.epochs": 1, "search.trials": 1, "search.test_seeds": 1, "search.devices_per_trial": "one"}
    assert search(str(tmp_path / "mine.json"), short | {"search.output_dir": str(tmp_path / "out")}) == 0
    assert "best: trial 1" in capsys.readouterr().out


def test_trials_that_fail_are_listed_and_end_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not finite, values that contradict one another, and a process that dies."""
    path = write_own(
        tmp_path, sampler="grid", test_seeds=1, trials=None,
        parameters={"trainer.task_options.factor": [1.0, 1e38, 2.0], "train_batch_size": [16, 32],
                    "train_micro_batch_size_per_gpu": [8, 32]},
    )  # fmt: skip
    source = (tmp_path / "task.py").read_text()
    dies = "        if self.factor == 2.0: __import__('os')._exit(3)\n"
    (tmp_path / "task.py").write_text(source.replace("        return model(batch", dies + "        return model(batch"))
    assert search(str(path), {"trainer.epochs": 1}) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    states = [state for _, _, state, _, _ in trials(tmp_path)]
    assert (states.count("complete"), states.count("failed")) == (3, 9)
    for text in ("is larger than train_batch_size (16)", "exit code 3", "must be finite"):
        assert text in said
        assert text in page


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"search.metric": "acuracy"}, 'does not measure on validation. Did you mean "accuracy"?'),
        ({"search.metric": "margin"}, '"search.mode" is needed'),
    ],
)
def test_what_only_the_task_knows_is_said_before_a_trial_ends(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        search(str(write_own(tmp_path)), changed)
    assert said in str(caught.value)


def test_a_missing_optuna_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    with pytest.raises(
        UserError, match=r'^A search needs optuna. Install it: pip install "strong-scaling-trainer\[search\]"$'
    ):
        search(str(write_own(tmp_path)))
