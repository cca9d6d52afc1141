"""Where a run's numbers go: its log, TensorBoard and its manifest."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.run.small import Task, course_of, records
from trainer.record.window import StepNumbers
from trainer.run import recorder as recorder_module
from trainer.run.course import Course
from trainer.run.recorder import Recorder

pytestmark = pytest.mark.usefixtures("one_rank")


def make_steps(course: Course, count: int) -> None:
    for _ in range(count):
        course.window.begin_step()
        course.window.end_step(StepNumbers(2, 8.0, 8, 0.1), torch.tensor([8.0, 16.0]), torch.tensor(2.0))
        course.done += 1


def test_a_window_is_one_record(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run")
    make_steps(course, 2)
    course.record.window(2)
    make_steps(course, 1)
    course.record.window(5)
    course.record.window(5)  # an empty one is none
    found = records(tmp_path / "run")
    assert [(record["step"], record["epoch"]) for record in found] == [(2, 1), (5, 2)]
    assert found[0]["train/loss"] == 3.0
    assert {"throughput/eval_ms", "throughput/checkpoint_ms", "memory/host_peak_gib"} <= set(found[0])


def test_on_a_gpu_a_record_is_read_when_the_next_window_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the device. Before a checkpoint, and at the end, everything is written."""
    monkeypatch.setattr(recorder_module, "memory_gib", lambda device: {})
    course = course_of(tmp_path / "run")
    course.pieces.device = torch.device("cuda")

    def steps() -> list[float]:
        return [record["step"] for record in records(tmp_path / "run")]

    make_steps(course, 1)
    course.record.window(1)
    assert steps() == []
    make_steps(course, 1)
    course.record.window(2)
    assert steps() == [1]
    course.record.flush()
    course.record.flush()
    assert steps() == [1, 2]
    make_steps(course, 1)
    course.record.window(3)
    make_steps(course, 1)
    course.record.window(4, last=True)
    assert steps() == [1, 2, 3, 4]


def test_the_time_of_training_goes_on_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process needs before its first step, and a clock that is set, do not count."""
    clock, now_s = time.monotonic, time.time
    course = course_of(tmp_path / "run")
    record = Recorder(course.pieces, course.window, 4, [], time_s=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000.0)  # the rehearsal
    monkeypatch.setattr(time, "time", lambda: now_s() - 3600.0)
    record.begin()
    monkeypatch.setattr(time, "monotonic", lambda: clock() + 1007.0)
    assert 107.0 <= record.time_s < 110.0


def test_on_a_gpu_a_record_has_the_time_at_which_its_window_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "memory_gib", lambda device: {})
    course = course_of(tmp_path / "run")
    course.pieces.device = torch.device("cuda")
    make_steps(course, 1)
    course.record.window(1)
    ended_s = course.record.time_s
    time.sleep(0.2)
    course.record.flush()
    (found,) = records(tmp_path / "run")
    assert found["time_s"] <= ended_s


def test_utilisation_is_a_share_of_the_peak_of_all_devices(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run")
    pieces = course.pieces
    assert recorder_module.peak_of(pieces) is None, "of a processor"
    pieces.device, pieces.facts = torch.device("cuda"), {"device_model": "Tesla T4"}
    pieces.plan = dataclasses.replace(pieces.plan, world_size=4)
    assert recorder_module.peak_of(pieces) == 4 * 8.1
    pieces.alike = False
    assert recorder_module.peak_of(pieces) is None, "unlike devices have no common peak"

    pieces.device, course.record.peak_tflops_per_s = torch.device("cpu"), 10.0
    course.window.begin_step()
    course.window.end_step(StepNumbers(1, 4.0, 4, 0.1), torch.tensor([8.0]), torch.tensor(2.0), flops=1e12)
    course.record.window(1)
    (found,) = records(tmp_path / "run")
    assert found["throughput/mfu"] == pytest.approx(found["throughput/model_tflops_per_s"] / 10.0)


class Slow(Task):
    """Takes 0.2 s for its metrics."""

    def metrics(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
        time.sleep(0.2)
        return super().metrics(outputs, batch)


def test_an_evaluation_is_a_record_and_is_left_out_of_the_speed(tmp_path: Path) -> None:
    course = course_of(tmp_path / "run", Slow())
    make_steps(course, 1)
    metrics = course.record.evaluate("validation", 6)
    make_steps(course, 1)
    course.record.window(2)
    evaluated, window = records(tmp_path / "run")
    assert evaluated.pop("time_s") > 0.2
    assert evaluated == {"step": 6, "epoch": 2} | {f"eval/validation/{name}": value for name, value in metrics.items()}
    assert window["throughput/eval_ms"] >= 200
    assert window["throughput/step_time_ms"] < 100  # two steps in which nothing is computed


def test_a_quiet_evaluation_is_written_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    course = course_of(tmp_path / "run")
    capsys.readouterr()
    assert "error" in course.record.evaluate("validation", 0, quiet=True)
    assert records(tmp_path / "run") == []
    assert capsys.readouterr().out == ""


def test_other_ranks_measure_and_write_nothing(tmp_path: Path) -> None:
    """They have no files: `open` is rank 0's."""
    course = course_of(tmp_path / "run")
    other = Recorder(course.pieces, course.window, 0, [])
    assert other.evaluate("test", 4) == course.record.evaluate("test", 4)
    make_steps(course, 1)
    other.window(4, last=True)
    other.close()
    assert len(records(tmp_path / "run")) == 1


def test_pictures_of_a_task_come_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Draws(Task):
        def pictures(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            assert len(outputs) == len(batch["x"]) == 10
            return {"worst": torch.zeros(3, 4, 5, dtype=torch.uint8)}

    course = course_of(tmp_path / "run", Draws(), tensorboard={"enabled": True})
    course.record.evaluate("validation", 4)
    course.record.close()
    course.record.close()  # once more does no harm
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    (picture,) = events.Images("validation/worst")
    assert (picture.step, picture.width, picture.height) == (4, 5, 4)
    assert "eval/validation/loss" in events.Tags()["scalars"]
    assert {"config/text_summary", "exactness/text_summary"} <= set(events.Tags()["tensors"])


def test_the_manifest_says_which_command_made_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py", "--task", "my task.py"])
    course_of(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["command"] == "main.py --task 'my task.py'"
    (process,) = manifest["history"]
    assert (process["from_step"], process["world_size"]) == (0, 1)
    assert manifest["exactness"] == "bitwise"


def test_what_deepspeed_says_is_in_a_file_of_its_own(tmp_path: Path) -> None:
    course_of(tmp_path / "run")
    assert (tmp_path / "run" / "logs" / "deepspeed.log").exists()
