"""Tests and intervals of a study: pure functions of numbers. `judgement` uses them.

Every test here is exact, whatever the distribution of the runs. Some tests need symmetry, such as flipping the signs of
differences about a margin. Where a few runs collapse, such a test calls a loss "ruled out" far too often, and collapse
is what a study of weak scaling looks for. So a claim is about the median: about the typical run. The median cannot see
the few runs that collapse. They are counted beside it, with an exact bound of their rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np


def sign_test(values: Sequence[float], bound: float) -> float:
    """The one-sided p value of the claim that the median of (n,) values is above a bound (the sign test).

    Exact for independent values of any distribution: under the hypothesis each value is above the bound with
    probability 1/2 at most. A value equal to the bound counts as not above it, and so does nan: both are conservative.
    """
    above = sum(value > bound for value in values)
    return _at_least(above, len(values))


def smallest_p(n: int) -> float:
    """The smallest p that n values can have in a `sign_test`: all of them are above the bound."""
    return 2.0**-n


def seeds_needed(level: float) -> int:
    """The fewest values with which a `sign_test` can reach this level."""
    return next(n for n in range(1, 1100) if smallest_p(n) <= level)


@functools.lru_cache(maxsize=4096)
def least_agreeing(n: int, level: float) -> int | None:
    """How many of n values must be above the bound for a `sign_test` to reach a level; None if all are not enough."""
    # In whole numbers, as in `_at_least`: a p that equals the level must count as reaching it.
    tail = 0
    for k in range(n, -1, -1):
        tail += math.comb(n, k)
        if tail > level * 2**n:
            return k + 1 if k < n else None
    return 0


def median_bounds(values: Sequence[float], level: float) -> tuple[float, float]:
    """A lower and an upper bound of the median of (n,) values, each of which is wrong with probability `level` at most.

    They are order statistics. The lower bound is above a number exactly if `sign_test` of that number has p <= level,
    so verdicts can be read from them. With too few values they are -inf and inf. A nan could be anything.
    """
    agreeing = least_agreeing(len(values), level)
    if agreeing is None:
        return -math.inf, math.inf
    # So it counts as the lowest value in the lower bound, and as the highest in the upper one.
    low = sorted(-math.inf if math.isnan(v) else v for v in values)
    high = sorted(math.inf if math.isnan(v) else v for v in values)
    return low[len(values) - agreeing], high[agreeing - 1]


def middle(values: Sequence[float]) -> float:
    """The median, also where some values are infinite; nan is left out, and the median of nothing is nan."""
    known = sorted(v for v in values if not math.isnan(v))
    if not known:
        return math.nan
    low, high = known[(len(known) - 1) // 2], known[len(known) // 2]
    return low if low == high else (low + high) / 2


@functools.lru_cache(maxsize=4096)
def rate_interval(hits: int, runs: int, alpha: float) -> tuple[float, float]:
    """The exact two-sided interval of a probability at level 1 - alpha (Clopper and Pearson 1934)."""
    from scipy import stats

    found = stats.binomtest(hits, runs).proportion_ci(confidence_level=1 - alpha, method="exact")
    return float(found.low), float(found.high)


def rate_at_most(hits: int, runs: int, alpha: float) -> float:
    """The exact upper bound of a probability, wrong with probability alpha at most (Clopper and Pearson 1934)."""
    return rate_interval(hits, runs, 2 * alpha)[1] if runs and hits < runs else 1.0


def more_often_p(these: Sequence[bool], others: Sequence[bool]) -> float:
    """The one-sided p value of the claim that something happens more often in the first of each pair (McNemar, exact).

    Only pairs that differ count. Under the hypothesis each of these is as likely to differ one way as the other,
    whatever the two have in common. A test of two independent groups (Fisher, Barnard, Boschloo) would assume that
    runs of one seed have nothing in common; they share their order of samples and their first weights.
    """
    more = sum(a and not b for a, b in zip(these, others, strict=True))
    less = sum(b and not a for a, b in zip(these, others, strict=True))
    return _at_least(more, more + less)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): those at most alpha may be rejected together with family-wise error alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, (len(p_values) - place) * p_values[i])
        adjusted[i] = min(1.0, highest)
    return adjusted


def prediction_bound(values: Sequence[float], level: float, floor: float) -> float:
    """The value below which one more run of the same kind falls with probability `level`, if (n,) runs are normal.

    Student's bound for a new value: the mean minus t sd sqrt(1 + 1 / n). nan for fewer than two values.

    Args:
        values: of the other runs.
        level: below 1/2.
        floor: the smallest standard deviation to use. Accuracies of few test samples are often all alike.
    """
    n = len(values)
    if n < 2:
        return math.nan
    spread = max(floor, float(np.std(values, ddof=1)))
    return float(np.mean(values)) + _student(level, n - 1) * spread * math.sqrt(1 + 1 / n)


def ratio_interval(tops: Sequence[float], bottoms: Sequence[float], alpha: float) -> tuple[float, float]:
    """The interval of the ratio of two means, from (n,) pairs, at level 1 - alpha (Fieller 1954).

    It is not bounded above (inf) where the lower mean cannot be told from 0; (nan, nan) for fewer than two pairs.
    """
    n = len(tops)
    if n < 2:
        return math.nan, math.nan
    top, bottom, t2 = float(np.mean(tops)), float(np.mean(bottoms)), _student(alpha / 2, n - 1) ** 2 / n
    (top2, both), (_, bottom2) = np.cov(tops, bottoms).tolist()
    a, b, c = bottom * bottom - t2 * bottom2, top * bottom - t2 * both, top * top - t2 * top2
    root = math.sqrt(max(0.0, b * b - a * c))
    # The lower mean cannot be told from 0: the ratio can be as large as one likes.
    if a <= 0 or bottom <= 0:
        return (max(0.0, (b - root) / a) if a < 0 < c else 0.0), math.inf
    return (b - root) / a, (b + root) / a


@functools.lru_cache(maxsize=4096)
def _at_least(hits: int, n: int) -> float:
    """P(Bin(n, 1/2) >= hits).

    In whole numbers up to the last division: by a rounding error, a p that equals a level could exceed it.
    """
    return sum(math.comb(n, k) for k in range(hits, n + 1)) / 2**n


@functools.lru_cache(maxsize=256)
def _student(level: float, freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(level, freedom))


def undecidable(seeds: int, missing: int, level: float, what: str) -> str:
    """Why sign tests of so many seeds can decide nothing, whatever the runs are; "" if they can decide something.

    Args:
        seeds: those that are there.
        missing: declared seeds that are not there.
        level: of one test.
        what: is to be decided, such as "one of 12 trends".
    """
    if missing > 0:
        return f"{missing} of the declared seeds {'is' if missing == 1 else 'are'} missing"
    if smallest_p(seeds) > level:
        return f"{seeds} seeds cannot decide {what}; at least {seeds_needed(level)} are needed"
    return ""
