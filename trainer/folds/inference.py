"""The mean of a metric over folds, and how far off it may be. Pure functions of numbers.

The runs of a cross-validation are not independent: any two of them train on mostly the same samples. So the usual
standard error, s / sqrt(J), is too small, and an interval made from it is too narrow. Nadeau and Bengio
(Inference for the Generalization Error, Machine Learning 52, 2003) correct it for test sets that are drawn at random;
Bouckaert and Frank (2004) use the same correction for repeated folds. An unbiased estimate does not exist (Bengio and
Grandvalet 2004), so this one is approximate, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A metric over the runs of a cross-validation.

    Attributes:
        mean: over runs.
        deviation: the standard deviation of one run (divided by J - 1).
        naive_error: deviation / sqrt(J), as if the runs were independent. Too small.
        error: the corrected standard error of the mean, deviation * sqrt(1 / J + n_test / n_train).
        low, high: the corrected interval, mean -+ t * error.
        runs: J.
        ratio: n_test / n_train.
    """

    mean: float
    deviation: float
    naive_error: float
    error: float
    low: float
    high: float
    runs: int
    ratio: float


def corrected(values: Sequence[float], ratio: float, alpha: float) -> Estimate:
    """The corrected resampled t interval of Nadeau and Bengio, with J - 1 degrees of freedom.

    Args:
        values: (J,) of the metric, one a run, J at least 2.
        ratio: samples tested by a run over samples that it learns from. For k folds it is 1 / (k - 1).
        alpha: the interval is of level 1 - alpha.
    """
    from scipy import stats

    J = len(values)
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    error = deviation * math.sqrt(1 / J + ratio)
    reach = float(stats.t.ppf(1 - alpha / 2, J - 1)) * error
    return Estimate(mean, deviation, deviation / math.sqrt(J), error, mean - reach, mean + reach, J, ratio)
