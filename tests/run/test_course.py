"""A run made ready for its first step: rehearsed, labelled or refused, and told to the person who started it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.run.small import Task, config_of, course_of, pieces_of
from trainer.config.keys import TrainerOptions
from trainer.engine.zero_step import ZeroStep
from trainer.errors import NonFiniteError, RanksDifferError, UserError
from trainer.exact.step import ExactStep
from trainer.record.checkpoints import Snapshot, read
from trainer.record.window import StepNumbers
from trainer.run import course as course_module
from trainer.run.course import make_step, size_of_packs
from trainer.run.loop import train

pytestmark = pytest.mark.usefixtures("one_rank")


class Counts(Task):
    """Keeps a count of its forwards, on which its numbers depend if it is told so."""

    def __init__(self, factor: float = 0.0) -> None:
        super().__init__()
        self.calls, self.factor = 0, factor

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        outputs = model(batch["x"])
        return outputs + self.factor * self.calls if self.factor else outputs


def checkpoint_of(folder: Path, task: Any = None, **trainer: Any) -> Snapshot:
    """What a run leaves after its 10th of 12 steps."""
    course = course_of(folder, task, checkpoint={"every_steps": 10, "keep": 2}, **trainer)
    train(course)
    course.saver.wait()
    return read(folder / "checkpoints" / "step-000000010")


def test_a_run_that_is_ready_has_made_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    course = course_of(tmp_path / "run")
    assert (course.first_step, course.done) == (0, 0)
    assert math.isnan(course.time_to_first_step_s)
    assert course.rehearsal_s > 0
    before = pieces_of(config_of()).engine.model_state()
    assert all(torch.equal(tensor, before[name]) for name, tensor in course.pieces.engine.model_state().items())
    assert "exactness: bitwise" in capsys.readouterr().out
    assert (tmp_path / "run" / "manifest.json").exists()


def test_a_task_that_is_not_exact_is_labelled_with_a_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    course = course_of(tmp_path / "run", Counts(0.1), audit_every_steps=1)
    assert course.pieces.exactness == "tolerance"
    assert "calls" in course.pieces.inexact[0]
    assert course.step.audit is None, "what is known to differ is not audited"
    said = capsys.readouterr().out
    assert "exactness: tolerance, because" in said
    assert said.count("note: ") == 2  # the task's own, and what to do


def test_a_task_that_is_not_exact_is_refused_where_the_config_insists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'trainer\.exactness is "bitwise", but .*calls'):
        course_of(tmp_path / "run", Counts(0.1), exactness="bitwise")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("interval", "audited"), [(1, True), (0, False)])
def test_audits_are_made_where_they_are_asked_for(tmp_path: Path, interval: int, audited: bool) -> None:
    course = course_of(tmp_path / "run", audit_every_steps=interval)
    assert (course.step.audit is not None) == audited
    train(course)


# The best model


def test_a_misspelt_metric_is_found_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'validation has no metric "eror".*"error"'):
        course_of(tmp_path / "run", best={"metric": "eror", "mode": "min"})
    assert list((tmp_path / "run").iterdir()) == []


def test_a_metric_that_validation_cannot_give_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Knows(Task):
        def why_without(self, name: str, batch: dict[str, Tensor]) -> str:
            return f"{len(batch['y'])} samples of one class have no {name}"

    steps: list[int] = []
    with pytest.raises(UserError, match='no metric "auroc": 10 samples of one class have no auroc: loss, error'):
        course_of(
            tmp_path / "run",
            Knows(),
            trace=lambda step, *_: steps.append(step),
            best={"metric": "auroc", "mode": "max"},
        )
    assert not steps


@pytest.mark.parametrize("best", [{"metric": "loss"}, {"patience_evaluations": 3}])
def test_the_best_on_a_validation_that_is_not_there_is_refused(tmp_path: Path, best: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="has no validation split"):
        course_of(tmp_path / "run", Task(("train", "test")), best=best)


def test_the_last_model_is_kept_where_no_best_one_can_be_or_is_wanted(tmp_path: Path) -> None:
    assert course_of(tmp_path / "a", Task(("train", "test"))).best is None
    assert course_of(tmp_path / "b", best={"metric": None}).best is None
    assert course_of(tmp_path / "c", evaluate_every_epochs=0).best is None
    best = course_of(tmp_path / "d").best
    assert best is not None and best.metric == "loss"


# Going on


def test_a_run_that_goes_on_says_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = checkpoint_of(tmp_path / "first")
    capsys.readouterr()
    course = course_of(tmp_path / "second", snapshot=snapshot)
    assert (course.first_step, course.done) == (10, 10)
    said = capsys.readouterr().out
    assert "continuing after step 10 from a checkpoint of 1 rank" in said
    assert "of 1 ranks" not in said
    assert course.best is not None
    assert course.best.step == snapshot.facts["best"]["step"] > 0
    snapshot.facts["history"][-1]["world_size"] = 3
    snapshot.facts["history"] = snapshot.facts["history"][:1]
    snapshot.facts["history"][0]["world_size"] = 3
    course_of(tmp_path / "third", snapshot=snapshot)
    assert "from a checkpoint of 3 ranks" in capsys.readouterr().out


def test_a_run_at_its_end_is_not_rehearsed_again(tmp_path: Path) -> None:
    snapshot = checkpoint_of(tmp_path / "first", max_steps=11)
    assert course_of(tmp_path / "second", snapshot=snapshot, max_steps=10).rehearsal_s == 0.0


def test_state_that_no_checkpoint_holds_is_pointed_out_to_a_run_that_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task's count changes no number, so the run is bitwise; only its author knows whether it ever will."""
    snapshot = checkpoint_of(tmp_path / "first", Counts())
    note = "changes with micro-batches, and checkpoints do not hold it"
    assert note not in capsys.readouterr().out
    course = course_of(tmp_path / "second", Counts(), snapshot)
    assert course.pieces.exactness == "bitwise"
    said = capsys.readouterr().out
    assert note in said
    assert "calls" in said


# What a run looks at on its way


def test_a_bad_step_is_named_when_its_window_is_looked_at(tmp_path: Path) -> None:
    """On a GPU the host sees losses when the window ends: the message names the step, not the end of the window."""
    course = course_of(tmp_path / "run", log_every_steps=5)
    numbers = StepNumbers(2, 8.0, 8, 0.1)
    for loss in (1.0, math.nan, 2.0):
        course.window.begin_step()
        course.window.end_step(numbers, torch.tensor([1.0, loss]), torch.tensor(1.0))
    course.done = 9
    course.check_window()  # the step has looked itself
    course.step.deferred = True
    with pytest.raises(NonFiniteError, match="Step 8 is not finite: the loss of micro-batch 1 "):
        course.check_window()


def test_ranks_are_compared_only_where_they_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZeRO each rank has a part."""

    def differ(state: dict[str, Tensor], step: int) -> None:
        raise RanksDifferError(f"After step {step}: {sorted(state)[0]}")

    course = course_of(tmp_path / "run")
    monkeypatch.setattr(course_module, "compare_ranks", differ)
    with pytest.raises(RanksDifferError, match=r"After step 0: 0\.bias"):
        course.compare_ranks()
    course.pieces.engine.zero_stage = 1
    course.compare_ranks()


def test_no_checkpoint_is_written_of_a_window_with_a_bad_step(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run")
    course.step.deferred = True
    course.window.begin_step()
    course.window.end_step(StepNumbers(2, 8.0, 8, 0.1), torch.tensor([math.inf, 1.0]), torch.tensor(1.0))
    course.done = 1
    with pytest.raises(NonFiniteError, match="Step 1 is not finite"):
        course.checkpoint()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_makes_the_steps() -> None:
    pieces = pieces_of(config_of())
    assert type(make_step(pieces)) is ExactStep
    pieces.engine.zero_stage = 2
    assert type(make_step(pieces)) is ZeroStep


@pytest.mark.parametrize(
    ("task", "pack", "size"),
    [("digits", None, "auto"), ("my.py:Mine", None, 1), ("my.py:Mine", "auto", "auto"), ("digits", 4, 4)],
)
def test_tasks_of_ones_own_have_no_packs_unless_asked_for(task: str, pack: Any, size: Any) -> None:
    assert size_of_packs(TrainerOptions(task=task, pack=pack)) == size
