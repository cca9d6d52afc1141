"""Where the time of a run goes: its phases and its pace, without warm-up and pauses; and its peak memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.record.conftest import FakeClock
from trainer.record.pace import Pace, PhaseTimer, memory_gib

CPU = torch.device("cpu")
GPU = torch.device("cuda")

# Phases


def test_phases_add_up(clock: FakeClock) -> None:
    timer = PhaseTimer(CPU, clock)
    for _ in range(3):
        timer.begin()
        for seconds, phase in ((1.0, "data"), (2.0, "compute"), (4.0, "data"), (8.0, "compute"), (16.0, "reduce")):
            clock.sleep(seconds)
            timer.mark(phase)
        clock.sleep(100.0)  # between a step's last mark and the next begin: nobody's
    assert timer.take()() == {"data": 15.0, "compute": 30.0, "reduce": 48.0, "optimizer": 0.0}


def test_phases_start_anew(clock: FakeClock) -> None:
    timer = PhaseTimer(CPU, clock)
    timer.begin()
    clock.sleep(1.0)
    timer.mark("data")
    first = timer.take()
    clock.sleep(2.0)
    timer.mark("optimizer")
    assert first() == {"data": 1.0, "compute": 0.0, "reduce": 0.0, "optimizer": 0.0}
    assert timer.take()() == {"data": 0.0, "compute": 0.0, "reduce": 0.0, "optimizer": 2.0}


class Event:
    """A CUDA event, which notes when the device, `behind_s` behind the host, comes to it."""

    made = 0
    behind_s = 0.0
    waited = 0

    def __init__(self, clock: FakeClock) -> None:
        Event.made += 1
        self._clock, self._at_s, self._asked_at_s = clock, 0.0, 0.0

    def record(self) -> None:
        self._at_s = self._clock.now_s + Event.behind_s

    def synchronize(self) -> None:
        Event.waited += 1
        self._clock.now_s = max(self._clock.now_s, self._at_s)

    def elapsed_time(self, later: Event) -> float:
        assert self._clock.now_s >= later._at_s, "the device has not come to the event yet"
        return 1e3 * (later._at_s - self._at_s)


def test_on_a_gpu_nobody_waits_before_the_phases_are_read(monkeypatch: pytest.MonkeyPatch, clock: FakeClock) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(clock))
    monkeypatch.setattr(Event, "made", 0)
    monkeypatch.setattr(Event, "waited", 0)
    monkeypatch.setattr(Event, "behind_s", 5.0)
    timer = PhaseTimer(GPU, clock)
    for window in range(3):
        for _ in range(4):
            timer.begin()
            for seconds, phase in ((1.0, "data"), (2.0, "compute"), (4.0, "data")):
                clock.sleep(seconds)
                timer.mark(phase)
            clock.sleep(100.0)  # between steps: nobody's
        clock.now_s -= 100.0
        read = timer.take()
        assert Event.waited == window
        assert read() == pytest.approx({"data": 20.0, "compute": 8.0, "reduce": 0.0, "optimizer": 0.0})
    assert Event.made == 16  # the events of a window serve again in the next


def test_a_window_without_steps_has_no_phases_on_a_gpu(clock: FakeClock) -> None:
    assert set(PhaseTimer(GPU, clock).take()().values()) == {0.0}


# The whole run


def test_pace_leaves_warm_up_and_evaluation_out(clock: FakeClock) -> None:
    """Of 30 steps 3 are warm-up. The others take 2 s for 64 samples; two evaluations take 10 s each."""
    pace = Pace(30, clock)
    clock.sleep(60.0)
    for done in range(1, 31):
        clock.sleep(9.0 if done <= 3 else 2.0)
        pace.step(done, 64)
        if done in (2, 10):
            clock.sleep(10.0)
            pace.pause(10.0)
    pace.stop()
    clock.sleep(500.0)
    assert pace.step_time_s == pytest.approx(2.0)
    assert pace.samples_per_s == pytest.approx(32.0)


@pytest.mark.parametrize(("total", "warm_up"), [(1, 1), (2, 1), (19, 1), (20, 2), (100, 10), (5000, 10)])
def test_length_of_the_warm_up(clock: FakeClock, total: int, warm_up: int) -> None:
    pace = Pace(total, clock)
    for done in range(1, total + 1):
        clock.sleep(1000.0 if done <= warm_up else 1.0)
        pace.step(done, 1)
    pace.stop()
    if total == warm_up:
        assert math.isnan(pace.step_time_s)
        assert math.isnan(pace.samples_per_s)
    else:
        assert pace.step_time_s == pytest.approx(1.0)


def test_pace_counts_samples_of_unequal_steps(clock: FakeClock) -> None:
    pace = Pace(4, clock)
    for done, samples in enumerate((64, 64, 64, 22), start=1):
        clock.sleep(1.0)
        pace.step(done, samples)
    pace.stop()
    assert pace.samples_per_s == pytest.approx((64 + 64 + 22) / 3)


def test_tokens_are_counted_where_there_are_any(clock: FakeClock) -> None:
    """Those of the warm-up are not."""
    without, pace = Pace(4, clock), Pace(4, clock)
    for done, tokens in enumerate((1000, 10, 20, 30), start=1):
        clock.sleep(2.0)
        pace.step(done, 8, tokens)
        without.step(done, 8)
    pace.stop()
    without.stop()
    assert pace.tokens_per_s == pytest.approx(60 / 6.0)
    assert without.tokens_per_s is None


# Memory


def test_memory_is_in_gib() -> None:
    """This process holds torch. Linux gives the peak a second time, but one that forgets the parent's."""
    status = Path("/proc/self/status").read_text()
    peak_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert 0.95 * peak_kib * 1024 / 2**30 <= memory_gib(CPU)["memory/host_peak_gib"] < 50


def test_memory_of_a_gpu_is_its_own_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(memory_gib(CPU)) == {"memory/host_peak_gib"}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert memory_gib(GPU)["memory/device_peak_gib"] == 1.5


def test_operations_a_second_of_a_run(clock: FakeClock) -> None:
    """Of 4 steps 1 is warm-up; the others take 2 s for 3e12 operations."""
    pace, unknown = Pace(4, clock), Pace(4, clock)
    for done in range(1, 5):
        clock.sleep(2.0)
        pace.step(done, 64, flops=3e12)
        unknown.step(done, 64)
    pace.stop()
    unknown.stop()
    assert pace.model_tflops_per_s == 1.5
    assert unknown.model_tflops_per_s is None
