"""The interval over folds: against a calculation by hand, and whether it covers what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.folds.inference import corrected


def test_against_a_calculation_by_hand() -> None:
    """Five accuracies: mean 0.90, squared deviations 0.0010 in all, so s^2 = 0.00025; t(4) at 97.5 % is 2.776445."""
    found = corrected([0.88, 0.89, 0.90, 0.91, 0.92], 1 / 4, 0.05)
    assert found.mean == pytest.approx(0.90)
    assert found.deviation == pytest.approx(math.sqrt(0.00025))
    assert found.naive_error == pytest.approx(math.sqrt(0.00025 / 5))
    assert found.error == pytest.approx(math.sqrt(0.00025 * (1 / 5 + 1 / 4)))
    assert (found.low, found.high) == pytest.approx((0.90 - 2.776445 * 0.0106066, 0.90 + 2.776445 * 0.0106066))


def test_runs_that_agree_have_no_width() -> None:
    found = corrected([0.5, 0.5], 1.0, 0.05)
    assert (found.low, found.high) == (0.5, 0.5)


def test_the_corrected_interval_covers_and_the_usual_one_does_not() -> None:
    """10 cuts of 60 samples into 54 and 6 (the case of the paper): a ridge classifier, 300 data sets.

    What is to be covered is the expected accuracy of this way of training on 54 samples.
    """
    random, samples, tested, features, cuts = np.random.default_rng(1), 60, 6, 8, 10
    direction = np.full(features, 0.35)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = random.normal(size=(n, features))
        return x, np.sign(x @ direction + random.normal(size=n))

    def fit(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        weights: np.ndarray = np.linalg.solve(x.T @ x + np.eye(features), x.T @ y)
        return weights

    far_x, far_y = draw(20_000)
    true = float(np.mean([(np.sign(far_x @ fit(*draw(samples - tested))) == far_y).mean() for _ in range(60)]))
    covered, naively, datasets = 0, 0, 300
    for _ in range(datasets):
        x, y = draw(samples)
        values = []
        for _ in range(cuts):
            order = random.permutation(samples)
            test, train = order[:tested], order[tested:]
            values.append(float((np.sign(x[test] @ fit(x[train], y[train])) == y[test]).mean()))
        found = corrected(values, tested / (samples - tested), 0.05)
        reach = (found.high - found.mean) / found.error * found.naive_error if found.error else 0.0
        covered += found.low <= true <= found.high
        naively += abs(found.mean - true) <= reach
    # The standard error of 0.95 over 300 data sets is 0.013.
    assert covered / datasets > 0.91
    assert naively / datasets < covered / datasets - 0.02
