"""The gradient noise scale against a problem whose gradients have a known mean and covariance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.exact.gradient_noise import Noise, NoiseScale, estimate

# A linear loss z . w has the gradient z whatever w: drawn here with mean MEAN and independent entries of spread SPREAD.
MEAN = np.linspace(-0.2, 0.3, 30)
SPREAD = np.linspace(0.1, 1.5, 30)
TRACE, SQUARED = float((SPREAD**2).sum()), float((MEAN**2).sum())
STEPS = 4000


def measured(sizes: list[int], weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Traces and squared gradients, (STEPS,) each, of steps of micro-batches of these sizes; weights of the samples."""
    random = np.random.default_rng(1)
    weights = np.ones(sum(sizes)) if weights is None else weights
    gradients = MEAN + SPREAD * random.standard_normal((STEPS, sum(sizes), 30))
    starts = np.cumsum([0, *sizes[:-1]])
    # As autograd gives them: of the summed loss, divided by the global count.
    parts = np.add.reduceat(gradients * (weights / weights.sum())[:, None], starts, axis=1)
    norms, whole = np.linalg.norm(parts, axis=2), np.linalg.norm(parts.sum(axis=1), axis=1)
    counts = np.add.reduceat(weights, starts).tolist()
    found = [estimate(row, counts, norm, sum(sizes)) for row, norm in zip(norms.tolist(), whole.tolist())]
    assert all(found)
    return np.array([f.trace for f in found if f]), np.array([f.gradient_squared for f in found if f])


def check_unbiased(values: np.ndarray, wanted: float, sharpness: float) -> None:
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert error < sharpness * wanted, "the test wants to see a bias"
    assert abs(values.mean() - wanted) < 4 * error, (values.mean(), wanted, error)


@pytest.mark.parametrize("sizes", [[8] * 4, [1] * 9, [8, 8, 3, 1, 8, 5], [40, 2]], ids=str)
def test_unbiased_also_with_unequal_micro_batches(sizes: list[int]) -> None:
    trace, squared = measured(sizes)
    check_unbiased(trace, TRACE, 0.01)
    check_unbiased(squared, SQUARED, 0.05)


def test_equal_sizes_are_assumed_nowhere() -> None:
    """What the formula for equal sizes would give: far off, so the test above can tell."""
    trace, _ = measured([40, 2])
    random = np.random.default_rng(1)
    gradients = MEAN + SPREAD * random.standard_normal((STEPS, 42, 30))
    means = np.stack([gradients[:, :40].mean(1), gradients[:, 40:].mean(1)], axis=1)
    naive = 21 * ((means**2).sum(2).mean(1) - (gradients.mean(1) ** 2).sum(1)) * 2
    assert abs(naive.mean() - TRACE) > 10 * naive.std(ddof=1) / math.sqrt(STEPS)
    assert abs(trace.mean() - TRACE) < 0.1 * abs(naive.mean() - TRACE)


def test_tokens_are_converted_to_samples() -> None:
    """Samples of 1 to 7 tokens whose tokens all have the sample's gradient, so a token's variance is the sample's."""
    tokens = np.array([1, 7, 2, 5, 3, 3, 6, 1, 2, 4, 7, 7, 1, 3, 2, 2], dtype=float)
    # Four tokens a sample: the noise of a sample's worth of tokens is that of 4 counts on 4.
    trace, squared = measured([4] * 4, np.full(16, 4.0))
    check_unbiased(trace, TRACE, 0.01)
    check_unbiased(squared, SQUARED, 0.05)
    alike = estimate([0.3, 0.4], [8.0, 8.0], 0.6, 4)
    assert alike == estimate([0.3, 0.4], [2.0, 2.0], 0.6, 4)  # in samples, the unit of the counts is gone
    assert tokens.sum() == 56
    norms, counts = [0.3, 0.4, 0.2, 0.1], np.add.reduceat(tokens, [0, 4, 8, 12]).tolist()
    noise = estimate(norms, counts, 0.8, 16)
    assert noise is not None
    mean_squares = [(u * 56 / c) ** 2 for u, c in zip(norms, counts)]
    per_token = (sum(c * h for c, h in zip(counts, mean_squares)) - 56 * 0.64) / 3
    assert noise.trace == pytest.approx(per_token * 16 / 56)
    assert noise.gradient_squared == pytest.approx(0.64 - per_token / 56)


def test_without_an_estimate() -> None:
    assert estimate([1.0], [4.0], 1.0, 4) is None
    assert estimate([1.0, math.inf], [4.0, 4.0], 1.0, 8) is None
    assert estimate([1.0, 1.0], [4.0, 4.0], math.nan, 8) is None
    # A micro-batch without a valid token is as if it were not there.
    assert estimate([1.0, 0.0], [4.0, 0.0], 1.0, 8) is None
    assert estimate([0.6, 0.0, 0.7], [4.0, 0.0, 4.0], 1.0, 8) == estimate([0.6, 0.7], [4.0, 4.0], 1.0, 8)


def test_the_ratio_of_means() -> None:
    scale = NoiseScale()
    assert scale.summary() == {"trace": None, "gradient_squared": None, "scale_samples": None, "steps": 0}
    for noise in (Noise(6.0, 0.5), None, Noise(10.0, -0.25)):
        scale.add(noise)
    assert scale.summary() == {"trace": 8.0, "gradient_squared": 0.125, "scale_samples": 64.0, "steps": 2}
    scale.add(Noise(2.0, -0.25))
    assert scale.summary() == {"trace": 6.0, "gradient_squared": 0.0, "scale_samples": None, "steps": 3}
    scale.add(Noise(2.0, -4.0))  # mostly noise: no scale, rather than a negative one
    assert scale.summary() == {"trace": 5.0, "gradient_squared": -1.0, "scale_samples": None, "steps": 4}
    again = NoiseScale()
    again.load_state_dict(scale.state_dict())
    assert again.summary() == scale.summary() == scale.copy().summary()


def test_a_count_for_each_norm_is_needed() -> None:
    with pytest.raises(ValueError, match="longer"):
        estimate([0.3, 0.4], [8.0, 8.0, 8.0], 0.6, 24)
