"""The processes that make the runs of a study, one after the other. They are real processes here, too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import USER_TASKS, small_config
from trainer.config.keys import Config
from trainer.ranks.workers import WorkerError
from trainer.study.slots import Slots, _curves


@pytest.fixture(scope="module")
def slots() -> Iterator[Slots]:
    made = Slots(cuda=False)
    made.grow(2)
    yield made
    made.close()


def answer(slots: Slots, slot: int, *job: Any) -> tuple[str, Any]:
    slots.send(slot, *job)
    ((answered, kind, value),) = slots.wait([slot])
    assert answered == slot
    return kind, value


def config_of(folder: Path, **trainer: Any) -> Config:
    return small_config(folder / "ignored", **({"max_steps": 6, "log_every_steps": 2} | trainer))


def task_that(folder: Path, does: str) -> str:
    """The user's task in a file of its own, with a statement before it makes its splits."""
    source = (USER_TASKS / "my_task.py").read_text()
    (folder / "task.py").write_text(source.replace("def splits(self):\n", f"def splits(self):\n        {does}\n"))
    return f"{folder}/task.py:MyTask"


def test_a_probe_says_what_the_data_are(tmp_path: Path, slots: Slots) -> None:
    """The samples that the config asks for are counted, and hashed, not those of the file."""
    kind, whole = answer(slots, 0, "probe", config_of(tmp_path))
    assert (kind, whole["samples"]) == ("done", {"train": 500, "test": 200})
    assert whole["facts"]["device_type"] == "cpu"
    _, part = answer(slots, 0, "probe", config_of(tmp_path, train_samples=300))
    assert part["samples"] == {"train": 300, "test": 200}
    assert part["data_sha256"]["test"] == whole["data_sha256"]["test"]
    assert part["data_sha256"]["train"] != whole["data_sha256"]["train"]


def test_a_run_comes_back_with_its_curves_and_leaves_no_files(tmp_path: Path, slots: Slots) -> None:
    kind, run = answer(slots, 0, "run", config_of(tmp_path), str(tmp_path / "run"))
    assert (kind, run["status"], run["steps"]) == ("done", "finished", 6)
    assert run["curves"]["train/loss"]["step"] == [2, 4, 6]
    assert len(run["curves"]["train/learning_rate"]["value"]) == 3
    assert not any(name.startswith("throughput/") for name in run["curves"])
    assert list(tmp_path.iterdir()) == []
    # The next one in the same process has the same bits, as has one in another process.
    again = [answer(slots, slot, "run", config_of(tmp_path), str(tmp_path / "run"))[1] for slot in (0, 1)]
    assert {r["parameters_sha256"] for r in again} == {run["parameters_sha256"]}


def test_a_run_that_stops_being_finite_is_a_result(tmp_path: Path, slots: Slots) -> None:
    task = f"{USER_TASKS}/bad_tasks.py:InfiniteLater"
    kind, run = answer(slots, 0, "run", config_of(tmp_path, task=task), str(tmp_path / "run"))
    assert (kind, run["status"], run["steps"], run["metrics"]) == ("done", "not finite", 2, {})
    assert "Step 3 is not finite" in run["reason"]
    assert run["wall_time_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_slot_goes_on_after_a_run_that_could_not_be_made(tmp_path: Path, slots: Slots) -> None:
    """What is for the user comes as a message, what is a slip in the code as a traceback."""
    kind, message = answer(slots, 1, "run", config_of(tmp_path, train_samples=501), str(tmp_path / "run"))
    assert kind == "error"
    assert message.startswith("trainer.train_samples is 501, but the training split has only 500 samples.")
    kind, message = answer(slots, 1, "probe", config_of(tmp_path, task=task_that(tmp_path, "1 / 0")))
    assert kind == "traceback"
    assert "ZeroDivisionError" in message
    assert answer(slots, 1, "probe", config_of(tmp_path))[0] == "done"


def test_a_slot_that_dies_is_told_with_its_exit_code(tmp_path: Path) -> None:
    task = task_that(tmp_path, "__import__('os')._exit(3)")
    slots = Slots(cuda=False)
    slots.grow(1)
    try:
        slots.send(0, "probe", config_of(tmp_path, task=task))
        with pytest.raises(WorkerError, match=r"a process that makes runs died \(exit code 3\)"):
            list(slots.wait([0]))
        with pytest.raises(WorkerError, match="exit code 3"):
            slots.send(0, "probe", config_of(tmp_path))
    finally:
        slots.close()


def test_closing_ends_runs_that_are_under_way(tmp_path: Path) -> None:
    slots = Slots(cuda=False)
    slots.grow(1)
    slots.grow(1)  # there is one already
    processes = list(slots._processes)
    assert len(processes) == 1
    slots.send(0, "probe", config_of(tmp_path, task=task_that(tmp_path, "__import__('time').sleep(600)")))
    slots.close()
    assert not any(process.is_alive() for process in processes)


def test_curves_are_read_as_far_as_the_log_came(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert _curves(file) == {}
    records = [
        {"step": 2, "train/loss": 1.5, "train/grad_norm": 3.0, "throughput/step_time_ms": 1.0},
        {"step": 4, "train/loss": None, "noise/trace": 40.0, "noise/scale_samples": 4.0},  # null is what was not finite
        {"step": 4, "eval/validation/accuracy": 0.5, "eval/test/accuracy": 0.4},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert _curves(file) == {
        "train/loss": {"step": [2], "value": [1.5]},
        "noise/trace": {"step": [4], "value": [40.0]},
        "eval/validation/accuracy": {"step": [4], "value": [0.5]},
    }
