"""What a study's results say, and how sure that is. Pure statistics: numbers in, verdicts out.

Every weak arm, budget and W is one comparison with sequential runs of the same variant, paired by seed. Each of the two
claims made of it has a test that can support it and a test that can contradict it. Each of these four families of tests
is corrected by Holm (1979) over all comparisons of the study. What neither test decides is undecided, and too few seeds
to decide anything are said to be that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .arms import Place

# Up to this many seeds every assignment of signs is counted. With more seeds, this many random ones are drawn.
EXACT_UP_TO = 16
DRAWS = 100_000

Verdict = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True)
class Rules:
    """What is declared before the runs.

    Attributes:
        higher_is_better: of the metric.
        alpha: the family-wise error rate of each family of tests; intervals have level 1 - alpha.
        margin: the smallest loss of the metric that matters.
        target: what a run must reach to count as converged; None for one made of the sequential runs.
        target_deviations: that one lies so many standard deviations from the sequential mean,
        deviation_floor: none of them taken as smaller than this.
    """

    higher_is_better: bool = True
    alpha: float = 0.05
    margin: float = 0.01
    target: float | None = None
    target_deviations: float = 3.0
    deviation_floor: float = 0.005


def mean_interval(values: Sequence[float], alpha: float) -> tuple[float, float]:
    """Student's interval of the mean of (n,) values, at level 1 - alpha; (nan, nan) for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf(1 - alpha / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def rate_interval(failures: int, runs: int, alpha: float) -> tuple[float, float]:
    """The exact interval of a probability at level 1 - alpha (Clopper and Pearson 1934)."""
    from scipy import stats

    found = stats.binomtest(failures, runs).proportion_ci(confidence_level=1 - alpha, method="exact")
    return float(found.low), float(found.high)


def sign_flip_p(differences: Sequence[float]) -> float:
    """One-sided p of the mean being above 0, from flipping the signs of (n,) paired differences (Fisher 1935).

    Exact where, under the hypothesis, each difference is as likely as its negative, whatever its distribution. Up to
    EXACT_UP_TO differences all 2^n assignments are counted, so p is at least 2^-n; beyond, DRAWS random ones with a
    fixed seed, the observed one among them (Phipson and Smyth 2010).
    """
    d = np.asarray(differences, dtype=np.float64)
    if len(d) == 0:
        return 1.0
    # Sums that are equal on paper must count as equal, whatever their order of addition rounded to.
    least = d.sum() - 1e-12 * np.abs(d).sum()
    if len(d) <= EXACT_UP_TO:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(sums >= least))
    random = np.random.default_rng(0)
    above = sum(int((random.choice([-1.0, 1.0], size=(1000, len(d))) @ d >= least).sum()) for _ in range(DRAWS // 1000))
    return (above + 1) / (DRAWS + 1)


def smallest_p(n: int) -> float:
    """The smallest value `sign_flip_p` can have with n pairs."""
    return 2.0**-n if n <= EXACT_UP_TO else 1 / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values (Holm 1979): those at most alpha may be rejected together with family-wise error alpha."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, (len(p_values) - place) * p_values[i])
        adjusted[i] = min(1.0, highest)
    return adjusted


@dataclass
class Comparison:
    """One weak arm, budget and W against the sequential runs of the same seeds.

    Attributes:
        place: what is compared, with `place.reference`.
        values: seed -> metric; None for a run that stopped being finite.
        differences: metric minus the sequential run's of the same seed, where both have one.
        interval: of the mean; `difference_interval` of the mean difference.
        failures: runs that did not converge.
        verdicts, sentences: by claim, "loses" and "fails".
    """

    place: Place
    values: dict[int, float | None]
    differences: list[float]
    mean: float
    deviation: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    failures: int
    failure_interval: tuple[float, float]
    p: dict[str, float] = field(default_factory=dict)
    adjusted: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)


@dataclass
class Reference:
    """Sequential runs: seed -> metric, their mean and its interval, and the target that follows from them."""

    values: dict[int, float | None]
    mean: float
    deviation: float
    interval: tuple[float, float]
    target: float


@dataclass
class Judgement:
    """What a study comes to: the sequential runs by place, and every comparison with them."""

    rules: Rules
    references: dict[Place, Reference]
    comparisons: list[Comparison]


def _finite(values: Mapping[int, float | None]) -> list[float]:
    return [v for v in values.values() if v is not None]


def _describe(values: Sequence[float], alpha: float) -> tuple[float, float, tuple[float, float]]:
    mean = float(np.mean(values)) if values else math.nan
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return mean, deviation, mean_interval(values, alpha)


def judge(
    sequential: Mapping[Place, Mapping[int, float | None]],
    weak: Mapping[Place, Mapping[int, float | None]],
    rules: Rules,
    planned: int | None = None,
    seeds: int = 0,
) -> Judgement:
    """All verdicts of a study.

    Args:
        sequential: place -> seed -> metric of the kept model; None where the run stopped being finite.
        weak: the same; of each place, `sequential` has the reference.
        rules: as declared.
        planned: comparisons the study declares, if more than there are results for: the correction is for all.
        seeds: how many are declared. Before they are all there, nothing is decided: who looks again and again, and
            stops at a verdict, finds one in the end whatever the truth.
    """
    sign = 1.0 if rules.higher_is_better else -1.0
    result = Judgement(rules, {place: _reference(values, rules) for place, values in sequential.items()}, [])
    for place, values in weak.items():
        reference = result.references[place.reference]
        target = reference.target
        losses = [
            sign * (other - v)
            for seed, v in values.items()
            if v is not None and (other := reference.values.get(seed)) is not None
        ]
        failures = sum(v is None or sign * (v - target) < 0 for v in values.values())
        differences = [-sign * loss for loss in losses]
        own_mean, own_deviation, own_interval = _describe(_finite(values), rules.alpha)
        difference, _, difference_interval = _describe(differences, rules.alpha)
        comparison = Comparison(
            place, dict(values), differences, own_mean, own_deviation, own_interval, difference,
            difference_interval, failures, rate_interval(failures, len(values), rules.alpha),
        )  # fmt: skip
        comparison.p = {
            "loses, supported": sign_flip_p(losses),
            "loses, contradicted": sign_flip_p([rules.margin - loss for loss in losses]),
            "fails, supported": _binomial_p(failures, len(values)),
            "fails, contradicted": _binomial_p(len(values) - failures, len(values)),
        }
        result.comparisons.append(comparison)
    missing = [1.0] * max(0, (planned or 0) - len(result.comparisons))
    for family in result.comparisons[0].p if result.comparisons else ():
        adjusted = holm([c.p[family] for c in result.comparisons] + missing)
        for comparison, value in zip(result.comparisons, adjusted):
            comparison.adjusted[family] = value
    tests = len(result.comparisons) + len(missing)
    for comparison in result.comparisons:
        _conclude(
            comparison,
            rules,
            tests,
            seeds - min(len(result.references[comparison.place.reference].values), len(comparison.values)),
        )
    return result


def _reference(values: Mapping[int, float | None], rules: Rules) -> Reference:
    sign = 1.0 if rules.higher_is_better else -1.0
    mean, deviation, interval = _describe(_finite(values), rules.alpha)
    target = rules.target
    if target is None:
        spread = max(rules.deviation_floor, deviation if math.isfinite(deviation) else 0.0)
        target = mean - sign * rules.target_deviations * spread
    return Reference(dict(values), mean, deviation, interval, target)


def _binomial_p(hits: int, runs: int) -> float:
    """One-sided exact p of a probability above 1/2."""
    from scipy import stats

    return float(stats.binomtest(hits, runs, 0.5, alternative="greater").pvalue)


def seeds_needed(tests: int, alpha: float) -> int:
    """The fewest seeds with which one comparison of `tests` can be decided, if all its seeds agree."""
    return next(n for n in range(1, EXACT_UP_TO + 1) if smallest_p(n) * tests <= alpha or n == EXACT_UP_TO)


def _too_few(seeds: int, least_p: float, tests: int, alpha: float, missing: int) -> str:
    """Why so many seeds can decide nothing, whatever they say; empty if they can."""
    if missing > 0:
        return f"not enough evidence: {missing} of the declared seeds {'is' if missing == 1 else 'are'} missing"
    if least_p * tests <= alpha:
        return ""
    return (
        f"not enough evidence: {seeds} seeds cannot decide one of {tests} comparisons; at least "
        f"{seeds_needed(tests, alpha)} are needed"
    )


def _conclude(c: Comparison, rules: Rules, tests: int, missing: int) -> None:
    n, alpha = len(c.values), rules.alpha
    c.verdicts = {"loses": "undecided", "fails": "undecided"}
    percent = f"{100 * (1 - alpha):g} %"
    unfinished = sum(v is None for v in c.values.values())
    better = "lower" if c.difference < 0 else "higher"
    numbers = (
        "no run of it has a metric"
        if not c.differences
        else (
            f"{abs(c.difference):.4f} {better} on average ({percent} interval {c.difference_interval[0]:+.4f} to "
            f"{c.difference_interval[1]:+.4f}, {len(c.differences)} seeds"
            + (f", {unfinished} more not finite" if unfinished else "")
            + ")"
        )
    )
    supports, contradicts = c.adjusted["loses, supported"], c.adjusted["loses, contradicted"]
    too_few = _too_few(len(c.differences), smallest_p(len(c.differences)), tests, alpha, missing)
    if too_few:
        why = too_few
    elif supports <= alpha:
        c.verdicts["loses"], why = "supported", f"adjusted p = {supports:.2g}"
        if contradicts <= alpha:
            why += f", though the loss is below the margin of {rules.margin:g}"
    elif contradicts <= alpha and not unfinished:
        # Runs that are not finite have no metric; without them the others would look too good.
        c.verdicts["loses"], why = "contradicted", f"a loss of {rules.margin:g} is ruled out, p = {contradicts:.2g}"
    else:
        why = f"adjusted p = {supports:.2g} for a loss, {contradicts:.2g} against one of {rules.margin:g}"
    c.sentences["loses"] = f"{numbers}: {why}"

    low, high = c.failure_interval
    rate = f"{c.failures} of {n} runs ({percent} interval {low:.2f} to {high:.2f})"
    supports, contradicts = c.adjusted["fails, supported"], c.adjusted["fails, contradicted"]
    too_few = _too_few(n, 2.0**-n, tests, alpha, missing)
    if too_few:
        why = too_few
    elif supports <= alpha and low > 0.5:
        c.verdicts["fails"], why = "supported", f"adjusted p = {supports:.2g}"
    elif contradicts <= alpha and high < 0.5:
        c.verdicts["fails"], why = "contradicted", f"adjusted p = {contradicts:.2g}"
    else:
        why = f"adjusted p = {min(supports, contradicts):.2g}"
    c.sentences["fails"] = f"{rate}: {why}"
