"""The noise scale by epoch, and against a training set whose gradients are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.exact.gradient_noise import NoiseScale, estimate
from trainer.study.noise import scales_by_epoch, whole_scale

N, SIZE, MICRO = 1200, 32, 8


def epochs_of(gradients: np.ndarray, random: np.random.Generator, count: int, scale: NoiseScale) -> None:
    """Epochs of a linear loss, whose gradients are those of its samples: drawn without replacement."""
    for _ in range(count):
        order = random.permutation(N)
        for start in range(0, N - SIZE + 1, SIZE):
            h = gradients[order[start : start + SIZE]].reshape(-1, MICRO, gradients.shape[1]).sum(1) / SIZE
            norms, whole = np.linalg.norm(h, axis=1), float(np.linalg.norm(h.sum(0)))
            scale.add(estimate(norms.tolist(), [MICRO] * len(h), whole, SIZE))


def test_the_scale_is_that_of_the_training_set() -> None:
    """146 at N = 1,200; without the correction 166, as |G|^2 comes out too small by tr / N."""
    random = np.random.default_rng(0)
    gradients = random.normal(0, 1, (N, 10))
    gradients -= gradients.mean(0)
    trace = float(gradients.var(axis=0, ddof=1).sum())
    gradients[:, 0] += math.sqrt(trace / 146)
    corrected, plain = NoiseScale(N), NoiseScale()
    for scale in (corrected, plain):
        epochs_of(gradients, np.random.default_rng(1), 60, scale)
    assert corrected.means()["scale_samples"] == pytest.approx(146, rel=0.05)
    assert plain.means()["scale_samples"] == pytest.approx(146 / (1 - 146 / N), rel=0.05)
    assert corrected.copy().means() == corrected.means()
    assert corrected.state_dict() == plain.state_dict(), "a checkpoint holds what was measured"


def test_every_epoch_has_its_scale_and_its_interval() -> None:
    """A window counts for the epoch in which it ends; over seeds, it is the ratio of the means."""
    runs = [
        {
            "gradient_noise": {"trace": 10.0, "gradient_squared": squared},
            "curves": {
                "noise/trace": {"epoch": [0.5, 1.0, 1.5, 2.0], "value": [4.0, 8.0, 10.0, 10.0]},
                "noise/gradient_squared": {"epoch": [0.5, 1.0, 1.5, 2.0], "value": [squared] * 2 + [-squared] * 2},
            },
        }
        for squared in (0.5, 1.0, 1.5)
    ]
    whole = whole_scale(runs, 0.05)
    assert whole is not None
    assert whole.value == pytest.approx(10.0)
    assert whole.low < 10 < whole.high == math.inf, "three seeds cannot tell so scattered a norm from 0"
    scales = scales_by_epoch(runs, 0.05)
    assert list(scales) == [1, 2]
    assert scales[1].value == pytest.approx(6.0)
    assert scales[2].value == math.inf, "no gradient is left to compare the noise with"
    assert whole_scale([{"curves": {}}], 0.05) is None
    assert scales_by_epoch([{"curves": {}}], 0.05) == {}
