"""The chosen configuration is tested with fresh seeds: each of them once, whatever happens in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.search.small import evaluations, write
from trainer.search.declaration import Plan, load_search
from trainer.search.finals import test_best as make_tests  # pytest would take it for a test
from trainer.search.places import How, Job

CHOICE = {"number": 3, "point": {"optimizer.params.lr": 0.02}, "metric": "accuracy", "seeds": [1, 2, 3]}


class Pretended:
    """In place of `places.Places`: each run ends at once, as `how` says of its seed."""

    def __init__(self, how: Callable[[int], tuple[How, Any]]) -> None:
        self._how = how
        self.jobs: list[Job] = []

    def run(self, together: bool, jobs: Callable[[], Job | None], report: Any, done: Callable[..., None]) -> None:
        while (job := jobs()) is not None:
            self.jobs.append(job)
            done(job, *self._how(job.config.trainer.seed))


def finished(seed: int) -> tuple[How, Any]:
    metrics = {"validation": {"accuracy": 0.75}, "test": {"accuracy": 0.5 + seed / 100}}
    return "done", {"status": "finished", "metrics": metrics, "wall_time_s": 2.0}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "out" / "test").mkdir(parents=True)
    return load_search(str(write(tmp_path)), {"search.output_dir": str(tmp_path / "out")})


def make(plan: Plan, places: Pretended) -> str | None:
    return make_tests(plan, CHOICE, places, lambda runs: False)  # type: ignore[arg-type]


def test_the_test_split_is_evaluated_once_for_each_fresh_seed(whole: Path) -> None:
    out = whole / "out"
    tests = [json.loads(file.read_text()) for file in (out / "test").glob("*.json")]
    assert sorted(test["seed"] for test in tests) == [1, 2]
    seen = evaluations(whole)
    assert seen.count("test") == 2
    assert "test" not in seen[: 1 + 4 * 2]  # a look at the task, and four trials of two epochs
    assert all("test" not in json.loads(f.read_text())["metrics"] for f in (out / "trials").glob("*.json"))


def test_each_run_has_the_chosen_point_and_a_seed_of_its_own(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    places = Pretended(finished)
    assert make(plan, places) is None
    assert [(job.config.trainer.seed, job.config.optimizer.params["lr"]) for job in places.jobs] == [
        (1, 0.02), (2, 0.02), (3, 0.02),
    ]  # fmt: skip
    assert all(job.tested for job in places.jobs)
    said = capsys.readouterr().out
    assert "trial 4 is chosen (lr 0.02)" in said, "trials are counted from 1"
    assert "seed 3  validation accuracy 0.7500  test accuracy 0.5300  2.0 s" in said


def test_a_seed_that_was_tested_is_not_tested_again(plan: Plan) -> None:
    """A second measurement would be a second look at the test split."""
    first = plan.folder / "test" / "seed-2.json"
    first.write_text(json.dumps({"seed": 2, "metrics": {}, "status": "finished"}))
    before, places = first.read_text(), Pretended(finished)
    assert make(plan, places) is None
    assert [job.config.trainer.seed for job in places.jobs] == [1, 3]
    assert first.read_text() == before
    again = Pretended(finished)
    assert make(plan, again) is None
    assert not again.jobs


def test_a_run_that_fails_ends_the_tests_and_the_others_are_kept(plan: Plan) -> None:
    places = Pretended(
        lambda seed: finished(seed) if seed == 1 else ("traceback", "Traceback ...\nValueError: no disk")
    )
    assert make(plan, places) == "ValueError: no disk"
    assert [job.config.trainer.seed for job in places.jobs] == [1, 2], "the third is not begun"
    assert [file.name for file in (plan.folder / "test").iterdir()] == ["seed-1.json"]
