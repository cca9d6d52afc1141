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


def test_batch_norm_is_named_only_where_the_model_has_running_statistics() -> None:
    without, with_some = non_finite(4, [math.nan], 1.0), non_finite(4, [math.nan], 1.0, statistics=1)
    assert "BatchNorm" not in str(without)
    assert "begins to read a BatchNorm's running statistics" in str(with_some)
