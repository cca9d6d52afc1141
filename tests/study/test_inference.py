"""Tests and intervals against scipy, and values known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trainer.study.inference import (
    holm,
    least_agreeing,
    median_bounds,
    middle,
    more_often_p,
    prediction_bound,
    rate_at_most,
    rate_interval,
    ratio_interval,
    seeds_needed,
    sign_test,
    smallest_p,
)

INF, NAN = math.inf, math.nan


def test_the_sign_test_is_scipys() -> None:
    random = np.random.default_rng(0)
    for n in (1, 5, 12, 40):
        values = random.normal(0.3, 1, n)
        wanted = stats.binomtest(int((values > 0.1).sum()), n, 0.5, alternative="greater").pvalue
        assert sign_test(values.tolist(), 0.1) == pytest.approx(wanted)
    assert sign_test([1.0] * 12, 0.0) == smallest_p(12) == 2.0**-12


def test_ties_and_pairs_that_tell_nothing_are_no_evidence() -> None:
    """Accuracies of few samples are often equal; a value on the bound is as good as one below it."""
    assert sign_test([0.0, 1.0, 1.0], 0.0) == sign_test([-5.0, 1.0, 1.0], 0.0) == 0.5
    assert sign_test([NAN, 1.0, 1.0], 0.0) == sign_test([NAN, -1.0, -1.0][::-1], -2.0) == 0.5
    assert sign_test([INF, INF, INF], 1e9) == 1 / 8
    assert sign_test([], 0.0) == 1.0


@pytest.mark.parametrize("level", [0.05, 0.05 / 43])
def test_bounds_and_test_are_one(level: float) -> None:
    """A number lies below the lower bound exactly if the test says so; and the same from above."""
    random = np.random.default_rng(1)
    for n in (3, 5, 11, 12, 30):
        values = [*np.round(random.normal(0, 1, n - 1), 1).tolist(), INF]
        low, high = median_bounds(values, level)
        for number in np.linspace(-3, 3, 61).round(1).tolist():
            assert (low > number) == (sign_test(values, number) <= level)
            assert (high < number) == (sign_test([-v for v in values], -number) <= level)


def test_bounds_by_hand() -> None:
    values = [float(k) for k in range(12)]
    assert median_bounds(values, 2.0**-12) == (0.0, 11.0)  # all twelve have to agree
    assert median_bounds(values, 13 / 2**12) == (1.0, 10.0)  # one may not
    assert median_bounds(values[:4], 0.05) == (-INF, INF)
    assert median_bounds([NAN, *values[1:]], 2.0**-12) == (-INF, INF)
    assert least_agreeing(12, 13 / 2**12) == 11
    assert least_agreeing(4, 0.05) is None


def test_the_middle_of_runs_that_are_not_finite() -> None:
    assert middle([3.0, 1.0, 2.0, INF]) == 2.5
    assert middle([INF, INF, 1.0]) == middle([INF, INF]) == INF
    assert middle([NAN, 1.0]) == 1.0
    assert math.isnan(middle([NAN])) and math.isnan(middle([]))


def test_rates() -> None:
    """None of ten: at most 1 - 0.05^(1/10) (Clopper and Pearson 1934); none of twelve: 22 %."""
    assert rate_interval(10, 10, 0.05) == pytest.approx((0.025**0.1, 1.0))
    low, high = rate_interval(3, 10, 0.05)
    assert stats.binom.sf(2, 10, low) == pytest.approx(0.025)
    assert stats.binom.cdf(3, 10, high) == pytest.approx(0.025)
    assert rate_at_most(0, 12, 0.05) == pytest.approx(1 - 0.05 ** (1 / 12)) == pytest.approx(0.221, abs=1e-3)
    assert stats.binom.cdf(2, 12, rate_at_most(2, 12, 0.05)) == pytest.approx(0.05)
    assert rate_at_most(12, 12, 0.05) == rate_at_most(0, 0, 0.05) == 1.0


def test_more_often_counts_the_pairs_that_differ() -> None:
    """McNemar: of five seeds at which one alone fails, it is always the first."""
    these, others = [True] * 5 + [True] * 3 + [False] * 4, [False] * 5 + [True] * 3 + [False] * 4
    assert more_often_p(these, others) == 1 / 32
    assert more_often_p(others, these) == 1.0
    assert more_often_p([True] * 12, [True] * 12) == 1.0, "as often as all the sequential runs is not more often"
    assert more_often_p([], []) == 1.0


def test_holm() -> None:
    """Holm 1979: 0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.04 x 1 -> 0.06 (never below the one before)."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_needed() -> None:
    assert seeds_needed(0.05) == 5  # 1/32 = 0.031
    assert seeds_needed(0.05 / 25) == 9  # 25/512 = 0.049
    assert seeds_needed(0.05 / 26) == 10


def test_one_more_run_falls_below_its_bound_as_often_as_said() -> None:
    """Ten runs, and one more: 5 % of 4,000, with a standard error of 0.35 %."""
    random = np.random.default_rng(2)
    runs = random.normal(0.95, 0.01, (4000, 11))
    below = sum(last < prediction_bound(rest, 0.05, 1e-6) for *rest, last in runs.tolist())
    assert below / 4000 == pytest.approx(0.05, abs=0.011)
    assert prediction_bound([0.9] * 6, 0.05, 0.01) < 0.9 - 2 * 0.01  # not at 0.9, where all of them lie
    assert math.isnan(prediction_bound([0.9], 0.05, 0.01))


def test_the_ratio_of_two_means() -> None:
    """Its interval holds the true ratio in 95 %, also where the two go together; 1,000 have an error of 0.7 %."""
    random = np.random.default_rng(3)
    held = 0
    for _ in range(1000):
        common = random.normal(0, 0.2, 12)
        tops, bottoms = 6 + random.normal(0, 1, 12) + common, 2 + random.normal(0, 0.5, 12) + common
        low, high = ratio_interval(tops.tolist(), bottoms.tolist(), 0.05)
        held += low <= 3 <= high
    assert held / 1000 == pytest.approx(0.95, abs=0.022)
    low, high = ratio_interval([5.0, 6.0, 7.0], [1.0, -1.2, 0.3], 0.05)
    assert low >= 0 and high == INF, "what may be divided by 0 has no end"
    assert all(map(math.isnan, ratio_interval([1.0], [1.0], 0.05)))
