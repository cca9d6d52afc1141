"""The order of things in a run: when it validates, logs, writes checkpoints, stops and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.small import course_of, records
from trainer.errors import NonFiniteError, Stopped, TrainerError
from trainer.record.checkpoints import list_checkpoints, read
from trainer.run.loop import train

pytestmark = pytest.mark.usefixtures("one_rank")


def steps_of(folder: Path, name: str) -> list[float]:
    return [record["step"] for record in records(folder) if name in record]


def test_a_run_makes_every_step_once_and_logs_the_rest_at_its_end(tmp_path: Path) -> None:
    seen: list[int] = []
    course = course_of(tmp_path / "run", trace=lambda step, engine, losses: seen.append(step), log_every_steps=5)
    train(course)
    assert seen == list(range(1, 13))
    assert course.done == 12
    assert steps_of(tmp_path / "run", "train/loss") == [5, 10, 12]
    assert course.time_to_first_step_s > 0


def test_validation_comes_after_epochs_and_the_last_one_is_left_to_the_end(tmp_path: Path) -> None:
    """`finish` validates the last model: the loop does not do it twice."""
    train(course_of(tmp_path / "run"))
    assert steps_of(tmp_path / "run", "eval/validation/loss") == [4, 8]
    train(course_of(tmp_path / "two", evaluate_every_epochs=2))
    assert steps_of(tmp_path / "two", "eval/validation/loss") == [8]
    train(course_of(tmp_path / "never", evaluate_every_epochs=0))
    assert steps_of(tmp_path / "never", "eval/validation/loss") == []


def test_checkpoints_come_at_their_interval_and_after_the_last_step(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run", checkpoint={"every_steps": 4, "keep": 9})
    train(course)
    course.saver.wait()
    found = [checkpoint.name for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert found == ["step-000000012", "step-000000008", "step-000000004"]


def test_a_run_that_is_asked_to_stop_leaves_after_that_step_with_a_checkpoint(tmp_path: Path) -> None:
    def ask(step: int, engine: Any, losses: Any) -> None:
        if step == 6:
            course.watch.stop_reason = "a signal"

    course = course_of(tmp_path / "run", trace=ask)
    with pytest.raises(Stopped) as stopped:
        train(course)
    said = str(stopped.value)
    assert said.startswith("stopped after step 7 of 12: a signal. Nothing is lost")
    assert said.endswith(f"--resume auto --output_dir {tmp_path / 'run'}")
    assert stopped.value.agreed
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == "step-000000007"


def test_a_run_that_is_asked_to_stop_in_its_last_step_has_finished(tmp_path: Path) -> None:
    def ask(step: int, engine: Any, losses: Any) -> None:
        if step == 11:
            course.watch.stop_reason = "a signal"

    course = course_of(tmp_path / "run", trace=ask)
    train(course)
    assert course.done == 12
    course.saver.wait()
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoint.name == "step-000000012"  # from which a longer run goes on


def test_a_run_whose_last_checkpoint_cannot_be_written_does_not_say_that_nothing_is_lost(tmp_path: Path) -> None:
    def fail() -> None:
        raise TrainerError("the disk is full")

    course = course_of(tmp_path / "run")
    course.watch.stop_reason = "a signal"
    course.saver.wait = fail
    with pytest.raises(TrainerError, match="the disk is full") as caught:
        train(course)
    assert not isinstance(caught.value, Stopped)


def test_a_run_without_progress_on_validation_ends_early(tmp_path: Path) -> None:
    """With a rate of 1e-9 nothing gets better: one good validation, and then as many as its patience."""
    slow = {"type": "SGD", "params": {"lr": 1e-9}}
    best = {"metric": "error", "mode": "max", "patience_evaluations": 2}
    course = course_of(tmp_path / "run", epochs=20, best=best, optimizer=slow)
    assert course.best is not None
    values = iter([3.0, 2.0, 1.0])
    course.record.evaluate = lambda name, step: {"loss": 1.0, "error": next(values)}
    train(course)
    assert course.best.enough
    assert course.done == 12
    assert steps_of(tmp_path / "run", "train/loss")[-1] == 12


def test_a_step_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    def break_it(step: int, engine: Any, losses: Any) -> None:
        if step == 5:
            engine.model[0].weight.data.fill_(torch.inf)

    course = course_of(tmp_path / "run", trace=break_it)
    with pytest.raises(NonFiniteError, match="Step 6 is not finite") as caught:
        train(course)
    assert caught.value.good_steps == 5
    assert course.done == 5


def test_a_run_that_goes_on_from_a_checkpoint_comes_to_the_same_end(tmp_path: Path) -> None:
    whole = course_of(tmp_path / "whole", checkpoint={"every_steps": 5, "keep": 2})
    train(whole)
    whole.saver.wait()
    snapshot = read(tmp_path / "whole" / "checkpoints" / "step-000000010")
    parts = course_of(tmp_path / "parts", snapshot=snapshot)
    assert (parts.first_step, parts.done) == (10, 10)
    engine = parts.pieces.engine
    engine.load_state(snapshot.tensors["model"], snapshot.tensors["optimizer"], {})
    train(parts)
    assert parts.done == 12
    ended = whole.pieces.engine.state()
    assert all(torch.equal(tensor, ended[name]) for name, tensor in engine.state().items())
