"""The end of a run: which model is kept and measured, and which files say so."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.record.board import tab, value
from tests.run.small import Task, course_of, records
from trainer.errors import NonFiniteError, TrainerError
from trainer.exact.checks.hashes import state_sha256
from trainer.run.course import Course
from trainer.run.finish import finish, rescue
from trainer.run.loop import train

pytestmark = pytest.mark.usefixtures("one_rank")


def finished(course: Course) -> dict[str, Any]:
    train(course)
    return finish(course)


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_the_summary_is_what_stands_in_the_folder(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run")
    summary = finished(course)
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert (summary["status"], summary["steps"], summary["exactness"]) == ("finished", 12, "bitwise")
    assert (summary["world_size"], summary["global_batch_size"], summary["micro_batch_size"]) == (1, 8, 4)
    assert set(summary["metrics"]) == {"validation", "test"}
    assert 0 < summary["time_to_first_step_s"] < summary["wall_time_s"]
    assert (tmp_path / "run" / "model" / "README.md").exists()


def test_a_run_says_how_much_it_has_computed_and_how_well_it_scales(tmp_path: Path) -> None:
    """The baseline is the last run beside it; TensorBoard and the summary have the same numbers."""
    course = course_of(tmp_path / "run", tensorboard={"enabled": True})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "manifest.json").write_text(json.dumps(manifest))
    speed = {"world_size": 4, "samples_per_s": 100.0}
    (tmp_path / "before" / "summary.json").write_text(json.dumps(speed))
    summary = finished(course)
    assert summary["efficiency_baseline"] == {"folder": "before", "world_size": 4}
    assert summary["strong_efficiency"] == pytest.approx(summary["samples_per_s"] / 25.0)
    # A sample's forward and backward: 2 * 3 inputs and weights twice (no gradient of the input), 3 * 1 three times.
    assert summary["model_tflops_per_s"] == pytest.approx(summary["samples_per_s"] * (24 + 18) / 1e12)
    assert summary["mfu"] is None
    (row,) = tab(tmp_path / "run")[1]
    shown = {metric.name.tag: metric.value for metric in row.metric_values}
    for name in ("strong_efficiency", "model_tflops_per_s", "samples_per_s"):
        assert shown[f"result/{name}"] == pytest.approx(summary[name], rel=1e-6)
    assert shown["result/test/error"] == pytest.approx(summary["metrics"]["test"]["error"], rel=1e-6)
    assert value(row.hparams["learning_rate"]) == 0.1


def test_a_clock_that_is_set_changes_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    course = course_of(tmp_path / "run")
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 3600.0)
    summary = finished(course)
    assert 0 < summary["time_to_first_step_s"] < summary["wall_time_s"] < 600


def test_the_best_model_is_kept_and_tested_once(tmp_path: Path) -> None:
    """A validation that only gets worse: the first one's model is kept, and the hash is that of the last step."""
    states: dict[int, dict[str, Tensor]] = {}

    def keep(step: int, engine: Any, losses: Tensor) -> None:
        states[step] = {name: tensor.clone() for name, tensor in engine.model_state().items()}

    task = Task()
    course = course_of(tmp_path / "run", task, trace=keep, best={"metric": "error", "mode": "max"})
    evaluate, errors = course.record.evaluate, iter([0.9, 0.5, 0.4])

    def worse(name: str, step: int) -> dict[str, float]:
        return evaluate(name, step) | ({"error": next(errors)} if name == "validation" else {})

    course.record.evaluate = worse
    summary = finished(course)
    assert summary["best"] == {"step": 4, "metric": "error", "mode": "max", "value": 0.9}
    assert summary["metrics"]["validation"]["error"] == 0.9
    assert all(torch.equal(tensor, saved(tmp_path / "run")[name]) for name, tensor in states[4].items())
    parameters = {name: states[12][name] for name, _ in course.pieces.engine.model.named_parameters()}
    assert summary["parameters_sha256"] == state_sha256(parameters)
    assert summary["model_sha256"] == state_sha256(states[12])
    tested = [record for record in records(tmp_path / "run") if "eval/test/error" in record]
    assert [record["step"] for record in tested] == [12]
    # On the model that is kept.
    model = task.model()
    model.load_state_dict(states[4])
    split = course.pieces.host_splits["test"].arrays
    with torch.no_grad():
        error = (model.eval()(split["x"])[:, 0] - split["y"]).abs().mean().item()
    assert summary["metrics"]["test"]["error"] == pytest.approx(error, rel=1e-5)


def test_the_last_model_is_kept_where_that_is_wanted(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run", best={"metric": None})
    summary = finished(course)
    assert "best" not in summary
    assert summary["model_sha256"] == state_sha256(saved(tmp_path / "run"))
    assert set(summary["metrics"]) == {"validation", "test"}


def test_a_run_that_stops_early_is_not_validated_once_more(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run", epochs=20, best={"metric": "error", "mode": "max", "patience_evaluations": 1})
    evaluate, errors = course.record.evaluate, iter([0.9, 0.5])

    def worse(name: str, step: int) -> dict[str, float]:
        return evaluate(name, step) | ({"error": next(errors)} if name == "validation" else {})

    course.record.evaluate = worse
    summary = finished(course)
    assert (summary["status"], summary["steps"]) == ("stopped early", 8)
    assert summary["metrics"]["validation"]["error"] == 0.9


def test_validation_and_test_may_be_missing(tmp_path: Path) -> None:
    for number, splits in enumerate([("train",), ("train", "test"), ("train", "validation")]):
        summary = finished(course_of(tmp_path / str(number), Task(splits), max_steps=2))
        assert set(summary["metrics"]) == set(splits[1:])


def test_a_slip_in_the_last_metrics_does_not_cost_the_model(tmp_path: Path) -> None:
    class Slips(Task):
        def metrics(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
            return {"error": 1 / 0}

    course = course_of(tmp_path / "run", Slips(), max_steps=3)
    train(course)
    with pytest.raises(ZeroDivisionError):
        finish(course)
    state = course.pieces.engine.model_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved(tmp_path / "run").items())
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_whose_last_file_cannot_be_written_has_not_finished(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run", max_steps=2)
    train(course)
    (tmp_path / "run" / f".summary.json.{os.getpid()}").mkdir()
    with pytest.raises(TrainerError, match=r"run cannot be written: Is a directory") as caught:
        finish(course)
    assert caught.value.agreed
    assert not (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_what_was_measured_of_the_gradients_is_in_the_summary(tmp_path: Path) -> None:
    rate = {"scaling_rule": "adascale", "base_global_batch_size": 4}
    summary = finished(course_of(tmp_path / "run", gradient_noise=True, learning_rate=rate))
    assert "scale_samples" in summary["gradient_noise"]
    assert summary["adascale"]["position"] >= 12  # a gain of at least 1 a step
    plain = finished(course_of(tmp_path / "plain"))
    assert not {"gradient_noise", "adascale"} & set(plain)


def test_the_last_good_model_of_a_run_that_is_not_finite_is_rescued(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run", max_steps=3, log_every_steps=5)
    train(course)
    failure = NonFiniteError("Step 4 is not finite.")
    failure.good_steps = 3
    rescue(course, failure)
    state = course.pieces.engine.model_state()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved(tmp_path / "run").items())
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {
        "status": "Step 4 is not finite.", "steps": 3,
    }  # fmt: skip
    assert [record["step"] for record in records(tmp_path / "run") if "train/loss" in record] == [3]


def test_the_end_of_a_run_is_told_on_the_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(course_of(tmp_path / "run"))
    said = capsys.readouterr().out
    table = said[said.index("test error") :]
    assert str(tmp_path / "run") in table
    assert "(bitwise)" in table
