"""The error for a step that is not finite."""

from __future__ import annotations

import math

import pytest

from trainer.exact.checks.non_finite import non_finite


@pytest.mark.parametrize(
    ("losses", "norm", "words"),
    [
        ([1.0, math.nan, math.inf], 2.0, "the loss of micro-batch 1 is nan"),
        ([1.0, 2.0], math.inf, "the losses are finite, but the gradient's norm is inf"),
    ],
)
def test_what_is_not_finite_is_named(losses: list[float], norm: float, words: str) -> None:
    kept, other = non_finite(4, losses, norm), non_finite(4, losses, norm, kept=False)
    assert f"Step 5 is not finite: {words}. The parameters are kept as they were before it." in str(kept)
    assert f"Step 5 is not finite: {words}. The parameters may have been updated with it." in str(other)
    assert kept.good_steps == other.good_steps == 4
    assert kept.agreed and other.agreed


def test_running_statistics_are_a_cause_where_a_model_keeps_some() -> None:
    with_statistics, without = non_finite(0, [math.nan], 1.0, statistics=1), non_finite(0, [math.nan], 1.0)
    assert "begins to read a BatchNorm's running statistics" in str(with_statistics)
    assert "BatchNorm" not in str(without)
    assert "BatchNorm" not in str(non_finite(0, [1.0], math.nan, statistics=1)), "the losses are finite"
