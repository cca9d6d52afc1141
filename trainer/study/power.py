"""What a study can decide, calculated before its runs: how often enough seeds agree if nothing is lost."""

from __future__ import annotations

import math

from .inference import least_agreeing, seeds_needed


def power(n: int, level: float, margin: float, deviation: float) -> float:
    """The probability that a comparison rules out a loss of the margin if nothing is lost. Runs are taken as normal.

    As the test is symmetric, it is also how likely a loss of twice the margin is called material.

    Args:
        n: seeds.
        level: of one comparison: alpha over the number of comparisons.
        margin: the loss.
        deviation: the standard deviation of the differences paired by seed.
    """
    from scipy import stats

    agreeing = least_agreeing(n, level)
    if agreeing is None:
        return 0.0
    return float(stats.binom.sf(agreeing - 1, n, stats.norm.cdf(margin / deviation)))


def seeds_for(wanted: float, level: float, margin: float, deviation: float, most: int = 500) -> int | None:
    """The fewest seeds with which `power` is as wanted; None if it is not up to `most`."""
    numbers = range(seeds_needed(level), most + 1)
    return next((n for n in numbers if power(n, level, margin, deviation) >= wanted), None)


def paired(deviation: float) -> float:
    """The standard deviation of the difference of two runs: sqrt(2) times one's, if a seed in common has no effect."""
    return math.sqrt(2) * deviation
