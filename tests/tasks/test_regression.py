"""Metrics of predicted numbers."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.tasks import regression


def test_metrics_are_scikit_learns() -> None:
    from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

    random = np.random.default_rng(0)
    truth = random.normal(1e6, 3, 50)
    predicted = truth + random.normal(0, 1, 50)
    assert regression.metrics(predicted, truth) == pytest.approx(
        {
            "r2": r2_score(truth, predicted),
            "mae": mean_absolute_error(truth, predicted),
            "rmse": root_mean_squared_error(truth, predicted),
        }
    )


def test_equal_true_values_have_no_r2() -> None:
    assert regression.metrics(np.array([1.0, 2.0]), np.array([1.0, 1.0])) == pytest.approx(
        {"mae": 0.5, "rmse": 0.5**0.5}
    )
    assert "two different ones" in regression.why_no_r2("r2")
    assert regression.why_no_r2("accuracy") == ""
