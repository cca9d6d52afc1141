"""Scaling rules and schedules against values computed by hand from the papers."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.engine.learning_rate import factor, scaling_factor

# Without a deadline: on a busy machine any example can take long.
checked = settings(deadline=None)


def rates(total_steps: int, warmup_steps: int = 0, scale: float = 1.0, schedule: str = "constant", final: float = 0.0):
    """The factor of every step, and of the one after the last."""
    return [
        factor(
            step,
            scale=scale,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            schedule=schedule,
            final_fraction=final,
        )
        for step in range(total_steps + 1)
    ]


# Scaling rules


def test_linear_rule() -> None:
    """Goyal et al. 2017: the rate is 0.1 k n / 256; ImageNet in an hour has 8,192 samples, so k = 32."""
    assert scaling_factor("linear", 8192, 256) == 32.0
    assert 0.1 * scaling_factor("linear", 8192, 256) == pytest.approx(3.2)  # the paper's rate
    assert scaling_factor("linear", 256, 256) == 1.0
    assert scaling_factor("linear", 64, 256) == 0.25


def test_square_root_rule() -> None:
    """Krizhevsky 2014: k times the batch, sqrt(k) times the rate, which keeps the variance of the update."""
    assert scaling_factor("sqrt", 8192, 2048) == 2.0
    assert scaling_factor("sqrt", 96, 32) == pytest.approx(1.7320508075688772)
    assert scaling_factor("sqrt", 16, 64) == 0.5


def test_no_rule() -> None:
    assert scaling_factor("none", 8192, 256) == 1.0


def test_unknown_rule() -> None:
    with pytest.raises(KeyError):
        scaling_factor("cubic", 2, 1)


# Warm-up


def test_gradual_warmup() -> None:
    """Goyal et al. 2017, section 2.2: from eta, by a constant amount a step, to k eta after the warm-up."""
    assert rates(8, warmup_steps=4, scale=8.0) == [1.0, 2.75, 4.5, 6.25, 8.0, 8.0, 8.0, 8.0, 8.0]


def test_goyals_own_numbers() -> None:
    """Eta = 0.1 and k = 32 over five epochs of 1,281,167 // 8,192 = 156 steps."""
    steps = 5 * 156
    k = rates(2 * steps, warmup_steps=steps, scale=32.0)
    assert 0.1 * k[0] == pytest.approx(0.1)
    assert 0.1 * k[steps // 2] == pytest.approx(0.1 + (3.2 - 0.1) / 2)
    assert 0.1 * k[steps] == pytest.approx(3.2)
    assert k[1] - k[0] == pytest.approx(31.0 / 780)


def test_ramp_from_zero_where_there_is_nothing_to_climb() -> None:
    """The rate of step 0 is not 0, so no step is wasted; the last step of the ramp is at full rate."""
    assert rates(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(3, warmup_steps=2, scale=0.5) == [0.25, 0.5, 0.5, 0.5]


def test_between_two_steps_of_the_ramp() -> None:
    """AdaScale's position is no whole number; the ramp never rises above the full rate."""
    options = {"scale": 1.0, "warmup_steps": 4, "total_steps": 8, "schedule": "linear", "final_fraction": 0.0}
    assert [factor(p, **options) for p in (0.0, 1.5, 3.0, 3.5, 4.0, 5.0)] == [0.25, 0.625, 1.0, 1.0, 1.0, 0.75]


@checked
@given(
    scale=st.floats(0.01, 100.0),
    warmup=st.integers(1, 50),
    more=st.integers(1, 50),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    final=st.floats(0.0, 0.99),
)
def test_ramp_rises_to_the_scaled_rate_without_a_jump(
    scale: float, warmup: int, more: int, schedule: str, final: float
) -> None:
    values = rates(warmup + more, warmup, scale, schedule, final)
    ramp = values[: warmup + 1]
    assert all(a <= b * (1 + 1e-12) for a, b in itertools.pairwise(ramp))
    assert ramp[-1] == pytest.approx(scale, rel=1e-12)
    # The last increment is one of the ramp's own: it doesn't jump where the schedule takes over.
    assert ramp[-1] - ramp[-2] <= max(abs(scale - 1.0), scale) / warmup + 1e-9
    rest = values[warmup:]
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(rest))
    assert max(values) <= max(scale, 1.0) * (1 + 1e-12) and min(values) >= 0.0


# Schedules


def test_constant() -> None:
    assert rates(4, scale=3.0) == [3.0] * 5


def test_linear_schedule() -> None:
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(4, schedule="linear", scale=2.0, final=0.5) == [2.0, 1.75, 1.5, 1.25, 1.0]


def test_cosine_schedule() -> None:
    """Loshchilov and Hutter 2017, equation 5: eta_min + (eta_max - eta_min) (1 + cos(pi t / T)) / 2."""
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine") == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0.0])
    # From 4 down to a tenth of it: 0.4 + 3.6 (1 + cos) / 2; cos(pi / 3) = 1/2.
    assert rates(3, schedule="cosine", scale=4.0, final=0.1) == pytest.approx([4.0, 3.1, 1.3, 0.4])


def test_schedules_run_over_what_the_warmup_leaves() -> None:
    assert rates(6, warmup_steps=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(6, 2, 3.0, "linear") == pytest.approx([1.0, 2.0, 3.0, 2.25, 1.5, 0.75, 0.0])
    assert rates(6, 2, 1.0, "cosine")[4] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_after_the_end_the_rate_stays(schedule: str) -> None:
    late = factor(99, scale=2.0, warmup_steps=1, total_steps=10, schedule=schedule, final_fraction=0.25)
    assert late == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warmup_longer_than_the_run(schedule: str) -> None:
    assert rates(2, warmup_steps=4, schedule=schedule) == [0.25, 0.5, 0.75]
