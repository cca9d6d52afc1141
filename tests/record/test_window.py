"""What a run measures of itself, on a clock that only moves when told to: units, pauses, exact means."""

from __future__ import annotations

import contextlib
import json
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.record.conftest import FakeClock
from trainer.exact.gradient_noise import Noise, NoiseScale, estimate
from trainer.record.pace import PHASES
from trainer.record.window import StepNumbers, Window

CPU = torch.device("cpu")

# Without a deadline: on a busy machine any example can take long.
checked = settings(deadline=None, max_examples=80)


def make_step(
    window: Window,
    clock: FakeClock,
    seconds: float,
    *,
    losses: tuple[float, ...] = (1.0, 1.0),
    norm: float = 1.0,
    count: float = 2.0,
    samples: int = 2,
    learning_rate: float = 0.1,
    flops: float = 0.0,
) -> None:
    window.begin_step()
    clock.sleep(seconds)
    numbers = StepNumbers(len(losses), count, samples, learning_rate)
    window.end_step(numbers, torch.tensor(losses), torch.tensor(norm), flops=flops)


def close(window: Window, step: int = 1, epoch: int = 1) -> dict[str, float]:
    read = window.close(step, epoch)
    assert read is not None
    return read()


# The window


def test_operations_a_second_are_of_one_window(clock: FakeClock) -> None:
    """Two steps of 3e12 operations in 4 s; the next window has none that were counted."""
    window = Window(10, 2, CPU, clock)
    for _ in range(2):
        make_step(window, clock, 2.0, flops=3e12)
    assert close(window)["throughput/model_tflops_per_s"] == 1.5
    make_step(window, clock, 2.0)
    assert "throughput/model_tflops_per_s" not in close(window)


def test_throughput_and_step_time(clock: FakeClock) -> None:
    """Four steps of 0.5 s, 32 samples each, and 2 s until the window ends: 32 samples/s, 1,000 ms a step."""
    window = Window(10, 2, CPU, clock)
    clock.sleep(100.0)  # start-up is no part of a window
    for _ in range(4):
        make_step(window, clock, 0.5, samples=32)
    clock.sleep(2.0)
    record = close(window, step=4, epoch=1)
    assert (record["step"], record["epoch"]) == (4, 1)
    assert record["throughput/samples_per_s"] == pytest.approx(128 / 4.0)
    assert record["throughput/step_time_ms"] == pytest.approx(1000.0)


def test_a_pause_is_left_out(clock: FakeClock) -> None:
    window = Window(10, 2, CPU, clock)
    make_step(window, clock, 1.0, samples=10)
    with window.pause():
        clock.sleep(50.0)
    make_step(window, clock, 1.0, samples=10)
    with contextlib.suppress(ZeroDivisionError), window.pause():
        clock.sleep(7.0)
        raise ZeroDivisionError  # as when an evaluation fails
    record = close(window)
    assert record["throughput/samples_per_s"] == pytest.approx(10.0)
    assert record["throughput/step_time_ms"] == pytest.approx(1000.0)


def test_what_lies_between_windows_belongs_to_none(clock: FakeClock) -> None:
    window = Window(10, 2, CPU, clock)
    make_step(window, clock, 1.0)
    close(window)
    clock.sleep(5.0)
    with window.pause():
        clock.sleep(30.0)
    make_step(window, clock, 2.0)
    assert close(window)["throughput/step_time_ms"] == pytest.approx(2000.0)


def test_means_over_the_steps(clock: FakeClock) -> None:
    window = Window(3, 4, CPU, clock)
    make_step(window, clock, 1.0, losses=(1.0, 2.0, 3.0, 4.0), count=8.0, norm=2.0, learning_rate=0.5)
    make_step(window, clock, 1.0, losses=(6.0, 8.0), count=2.0, norm=5.0, learning_rate=0.25)  # a smaller last batch
    record = close(window)
    # Each sample counts the same: not the mean of the steps' means, which would be (10 / 8 + 14 / 2) / 2.
    assert record["train/loss"] == 24.0 / 10.0
    assert record["train/grad_norm"] == 3.5
    assert record["train/learning_rate"] == 0.375


def test_a_smaller_batch_does_not_see_what_was_there_before(clock: FakeClock) -> None:
    window = Window(1, 4, CPU, clock)
    make_step(window, clock, 1.0, losses=(9.0, 9.0, 9.0, 9.0), count=4.0)
    assert close(window)["train/loss"] == 9.0
    make_step(window, clock, 1.0, losses=(1.0,), count=1.0)
    assert close(window)["train/loss"] == 1.0


losses = st.floats(-1e6, 1e6, width=32)


@checked
@given(rows=st.lists(st.lists(losses, min_size=1, max_size=8), min_size=1, max_size=6), shuffle=st.randoms())
def test_the_mean_loss_is_exact_and_knows_no_order(rows: list[list[float]], shuffle: random.Random) -> None:
    """The float nearest to the true sum, so ranks and world sizes cannot differ in its last bit."""

    def mean(steps: list[list[float]]) -> float:
        clock = FakeClock()
        window = Window(len(steps), 8, CPU, clock)
        for row in steps:
            make_step(window, clock, 1.0, losses=tuple(row), count=float(len(row)))
        return close(window)["train/loss"]

    total = sum((Fraction(value) for row in rows for value in row), Fraction(0))
    samples = sum(map(len, rows))
    assert mean(rows) == float(total) / samples
    other = [shuffle.sample(row, len(row)) for row in rows]
    shuffle.shuffle(other)
    assert mean(other) == mean(rows)


def test_the_record_is_of_the_window_that_ended(clock: FakeClock) -> None:
    """On a GPU it is read a window later, when the buffers hold other numbers."""
    window = Window(2, 2, CPU, clock)
    make_step(window, clock, 1.0, losses=(1.0, 2.0), norm=3.0)
    read = window.close(1, 1)
    assert read is not None
    make_step(window, clock, 4.0, losses=(70.0, 80.0), norm=90.0)
    record = read()
    assert (record["train/loss"], record["train/grad_norm"]) == (1.5, 3.0)
    assert record["throughput/step_time_ms"] == pytest.approx(1000.0)


def test_filling_and_emptying(clock: FakeClock) -> None:
    window = Window(2, 2, CPU, clock)
    assert window.close(0, 0) is None
    assert (window.filled, window.full) == (0, False)
    make_step(window, clock, 1.0)
    assert (window.filled, window.full) == (1, False)
    make_step(window, clock, 1.0)
    assert (window.filled, window.full) == (2, True)
    close(window)
    assert (window.filled, window.full) == (0, False)
    assert window.close(2, 1) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_that_is_not_finite(clock: FakeClock, bad: float) -> None:
    window = Window(4, 3, CPU, clock)
    make_step(window, clock, 1.0, losses=(1.0, bad, 3.0))
    close(window)  # an earlier window's rows are still in memory, but not in this window
    make_step(window, clock, 1.0, losses=(1.0,))
    assert window.first_non_finite() is None
    make_step(window, clock, 1.0, losses=(2.0, 4.0), norm=bad)
    make_step(window, clock, 1.0, losses=(bad, 4.0))
    found = window.first_non_finite()
    assert found is not None
    place, row, norm = found
    assert (place, row) == (1, [2.0, 4.0])
    assert not math.isfinite(norm)


def test_phases_in_a_window_are_milliseconds_of_a_step(clock: FakeClock) -> None:
    window = Window(10, 1, CPU, clock)
    for seconds in (0.25, 0.75):
        window.begin_step()
        for phase in PHASES:
            clock.sleep(seconds)
            window.timer.mark(phase)
        window.end_step(StepNumbers(1, 1.0, 1, 0.1), torch.ones(1), torch.ones(()))
    record = close(window)
    assert [record[f"throughput/{phase}_ms"] for phase in PHASES] == pytest.approx([500.0] * 4)
    assert record["throughput/step_time_ms"] == pytest.approx(2000.0)


# The gradient's noise


def noisy_step(window: Window, i: int) -> None:
    M = 3 - i % 2  # as in an epoch's last, smaller batch
    window.begin_step()
    norm, norms = torch.tensor(1.0 + 0.1 * i), torch.tensor([0.5 + i, 1.0, 0.25][:M])
    window.end_step(StepNumbers(M, 5.0, 5, 0.1), torch.ones(M), norm, norms, [2.0, 2.0, 1.0][:M])


def test_noise_of_a_window_and_of_the_run() -> None:
    total = NoiseScale()
    window = Window(2, 3, CPU, noise=total)
    made: list[Noise | None] = []
    for i in range(4):
        noisy_step(window, i)
        norm = float(torch.tensor(1.0 + 0.1 * i))
        made.append(estimate([0.5 + i, 1.0, 0.25][: 3 - i % 2], [2.0, 2.0, 1.0][: 3 - i % 2], norm, 5))
        if window.full:
            own = NoiseScale()
            for noise in made[-2:]:
                own.add(noise)
            record = close(window, i + 1)
            shown = {f"noise/{n}": v for n, v in own.means().items() if v is not None}
            assert {n: v for n, v in record.items() if n.startswith("noise/")} == shown
    run = NoiseScale()
    for noise in made:
        run.add(noise)
    assert total.summary() == run.summary()
    assert total.steps == 4


@pytest.mark.parametrize("capacity", [10, 2], ids=["the same window", "a window into which it does not fit"])
def test_noise_of_a_run_that_was_interrupted(capacity: int) -> None:
    """Wherever it was, and whatever the length of the windows is afterwards."""
    whole = NoiseScale()
    window = Window(10, 3, CPU, noise=whole)
    for i in range(17):
        noisy_step(window, i)
        if window.full:
            close(window)
    close(window)
    parts = NoiseScale()
    window = Window(10, 3, CPU, noise=parts)
    for i in range(17):
        noisy_step(window, i)
        if window.full:
            close(window)
        if i in (4, 6, 13):
            saved = json.loads(json.dumps(window.state_dict()))
            parts = NoiseScale()
            window = Window(capacity, 3, CPU, noise=parts)
            window.load_state_dict(saved)
    if window.filled:
        close(window)
    assert parts.state_dict() == whole.state_dict()
