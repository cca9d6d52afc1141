"""Event files that TensorBoard reads in the order of the steps, whatever the clock does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.record.writer import Writer


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def set_clock(monkeypatch: pytest.MonkeyPatch, ahead_s: float) -> None:
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + ahead_s)


@pytest.mark.parametrize("set_s", [-3600.0, -0.01, 0.0, 3600.0])
def test_a_clock_that_is_set_between_a_stop_and_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_s: float
) -> None:
    """TensorBoard reads files by name, and a name holds the time."""
    for first_step in (0, 20, 30):
        writer = Writer(tmp_path, tensorboard=True, after_step=first_step)
        for step in (first_step + 10, first_step + 20):
            writer.write({"step": step, "epoch": 1, "train/loss": float(first_step)})
        writer.close()
        set_clock(monkeypatch, set_s)
    events = events_of(tmp_path).Scalars("train/loss")
    assert [(e.step, e.value) for e in events] == [(10, 0), (20, 0), (30, 20), (40, 30), (50, 30)]
    times_s = [e.wall_time for e in events]
    assert times_s == sorted(times_s)


def test_a_clock_that_is_set_during_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path, tensorboard=True)
    for step in (10, 20, 30):
        writer.write({"step": step, "epoch": 1, "train/loss": 1.0})
        set_clock(monkeypatch, -3600.0 if step == 10 else 7200.0)
    writer.close()
    times_s = [e.wall_time for e in events_of(tmp_path).Scalars("train/loss")]
    assert times_s == sorted(times_s)
    assert times_s[-1] - times_s[0] < 600


@pytest.mark.parametrize("left", [b"", b"\0" * 100, "half"], ids=["empty", "zeros", "cut off"])
def test_an_event_file_that_is_damaged_stops_no_run(tmp_path: Path, left: bytes | str) -> None:
    before = Writer(tmp_path, tensorboard=True)
    for step in (10, 20):
        before.write({"step": step, "epoch": 1, "train/loss": 1.0})
    before.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-30] if isinstance(left, str) else left)
    writer = Writer(tmp_path, tensorboard=True, after_step=20)
    writer.write({"step": 30, "epoch": 1, "train/loss": 0.5})
    writer.close()
    last = events_of(tmp_path).Scalars("train/loss")[-1]
    assert (last.step, last.value) == (30, 0.5)
