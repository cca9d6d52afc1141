"""The verdicts of a study: what its runs say, and how sure that is. Numbers in, verdicts and sentences out.

Every weak arm, budget and W is one comparison with sequential runs of the same variant and optimizer, paired by seed.
Three questions are asked of it: does the typical run lose, do runs miss the target more often than sequential
runs do, and do they fail to converge more often. A run that stopped being finite has the worst possible value
everywhere, on both sides.

**Does the typical run lose?** Its loss is the median over seeds, with one bound on each side. A verdict is read from
the two: a material loss (above the margin), a small loss (above 0 and below the margin), ruled out (below the margin),
or undecided. With m comparisons in the study each bound is wrong with probability alpha / m at most. The true loss of a
comparison is either at most 0, or up to the margin, or above it. In each of the three cases only one of the two bounds
can make its verdict wrong. So all these verdicts of a study are right together with probability 1 - alpha (Finner and
Strassburger 2002 call this partitioning). Holm's step-down would add nothing, because one of the three cases always
stays true; it would only correct each kind of verdict by itself.

**More often than the sequential runs?** Each of these two questions has one test, McNemar's, and Holm's correction over
all comparisons of the study. So alpha holds for each of the three questions, and 3 alpha for a study.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .arms import Place, rivals_of
from .inference import (
    holm,
    median_bounds,
    middle,
    more_often_p,
    prediction_bound,
    rate_at_most,
    rate_interval,
    sign_test,
    undecidable,
)

Verdict = Literal["material loss", "small loss", "ruled out", "undecided", "more often", "not shown"]
Failing = Literal["below", "unconverged"]
FAILINGS: tuple[Failing, ...] = ("below", "unconverged")
# Decimals of a difference. As floats, 0.95 - 0.94 is a little above 0.01, which is a usual margin. A loss of exactly
# 0.01 is frequent: three of 300 test samples.
DIGITS = 10


@dataclass(frozen=True)
class Rules:
    """What is declared before the runs.

    Attributes:
        higher_is_better: of the metric.
        alpha: the largest probability of any wrong verdict on one of the three questions.
        margin: the smallest loss of the metric that matters.
        collapse: a run that loses this much against the sequential run of its seed has collapsed.
        target: what a run should reach; None for a bound from the sequential runs of the other seeds.
        target_level: the probability that one more sequential run falls below such a bound.
        deviation_floor: the smallest standard deviation that such a bound is made with.
        converged_share: a run has converged if its training loss came down by this share of how far it does in
            sequential runs.
    """

    higher_is_better: bool = True
    alpha: float = 0.05
    margin: float = 0.01
    collapse: float = 0.1
    target: float | None = None
    target_level: float = 0.01
    deviation_floor: float = 0.005
    converged_share: float = 0.9

    @property
    def sign(self) -> float:
        """The factor that turns a metric into one of which more is better: 1, or -1 for a loss."""
        return 1.0 if self.higher_is_better else -1.0


@dataclass(frozen=True)
class Outcome:
    """How one run ended.

    Attributes:
        metric: None if it stopped being finite.
        first_loss, last_loss: its training loss, before the first update and at the end; None if that is not known.
    """

    metric: float | None
    first_loss: float | None = None
    last_loss: float | None = None


@dataclass
class Count:
    """How many runs failed in one way, and the test of it.

    Attributes:
        failed, of_reference: numbers of runs of this arm, and of the sequential runs of the same seeds.
        runs: of each.
        interval: of the probability, at level 1 - alpha, not corrected.
        p, adjusted: of failing more often than the sequential runs; before and after Holm's correction.
    """

    failed: int
    of_reference: int
    runs: int
    interval: tuple[float, float]
    p: float
    adjusted: float = 1.0


@dataclass
class Comparison:
    """One weak arm, budget and W against the sequential runs of the same seeds.

    Attributes:
        place: what is compared, with `place.reference`.
        values: seed -> metric; None for a run that stopped being finite.
        centre: the median of the metric, and its interval at level 1 - alpha, not corrected.
        losses: by how much each run is worse than the sequential run of its seed; inf if it alone is not finite, nan
            if neither is.
        difference: of the metric from the sequential run's of the same seed; the median.
        difference_interval: its two bounds, from which the verdict is read.
        not_finite, collapsed: numbers of runs.
        collapse_at_most: what is not ruled out as the probability of a collapse, at level 1 - alpha.
        counts: by what runs fail in.
        missing: declared seeds that are not there yet.
        unable: why nothing can be decided, whatever its runs say; "" if something can.
        search_failed: which untuned rule beats this tuned arm, or its tuned sequential runs; "" if none does.
        size_open: whether it is undecided, but shown that the typical run loses, so that only the size is open.
        verdicts, sentences: by claim: "loses", "below", "unconverged".
    """

    place: Place
    values: dict[int, float | None]
    centre: float
    interval: tuple[float, float]
    losses: list[float]
    difference: float
    difference_interval: tuple[float, float]
    not_finite: int
    collapsed: int
    collapse_at_most: float
    counts: dict[Failing, Count]
    missing: int = 0
    unable: str = ""
    search_failed: str = ""
    size_open: bool = False
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)


@dataclass
class Reference:
    """Sequential runs of one kind.

    Attributes:
        outcomes: by seed.
        centre: the median of the metric, and its interval at level 1 - alpha, not corrected.
        deviation: the standard deviation of the finite ones.
        target: what one more run should reach; nan where fewer than two runs are finite and none was declared.
        targets: by seed: what a run of it should reach, by the runs of the other seeds.
        loss_bound: the highest training loss that counts as converged; inf if it is not known.
        failed: how many runs failed, by what they failed in.
        not_finite: how many runs were not finite.
    """

    outcomes: dict[int, Outcome]
    centre: float
    interval: tuple[float, float]
    deviation: float
    target: float
    targets: dict[int, float]
    loss_bound: float
    failed: dict[Failing, int] = field(default_factory=dict)
    not_finite: int = 0

    @property
    def values(self) -> dict[int, float | None]:
        """Seed -> metric."""
        return {seed: outcome.metric for seed, outcome in self.outcomes.items()}


@dataclass
class Judgement:
    """The outcome of a study: its sequential runs by place, and the comparisons with them, of `tests` declared ones."""

    rules: Rules
    tests: int
    references: dict[Place, Reference]
    comparisons: list[Comparison]


def judge(
    sequential: Mapping[Place, Mapping[int, Outcome]],
    weak: Mapping[Place, Mapping[int, Outcome]],
    rules: Rules,
    planned: Mapping[Place, int] | None = None,
    more: int = 0,
) -> Judgement:
    """All verdicts of a study.

    Args:
        sequential: place -> seed -> how the run ended.
        weak: the same; of each place, `sequential` has the reference.
        rules: as declared.
        planned: every place that the study compares -> its declared seeds. The correction is for all places. Nothing is
            decided about a place before all of its seeds are there, because whoever looks again and again, and stops
            at a verdict, finds one in the end whatever the truth is. None: what is given is all there is.
        more: comparisons of the study that are judged elsewhere, at the same level (see `causes`).
    """
    references = {place: reference_of(outcomes, rules) for place, outcomes in sequential.items()}
    places = max(len(planned or {}), len(weak))
    tests = places + more
    comparisons = [compare(place, weak[place], references[place.reference], rules, tests) for place in weak]
    for failing in FAILINGS:
        # A place without runs still counts: left out, it would make the correction of the others weaker.
        missing = [1.0] * (places - len(comparisons))
        adjusted = holm([c.counts[failing].p for c in comparisons] + missing)
        for c, value in zip(comparisons, adjusted):
            c.counts[failing].adjusted = value
    values = {place: {seed: o.metric for seed, o in of.items()} for place, of in {**sequential, **weak}.items()}
    for c in comparisons:
        missing_seeds = (planned or {}).get(c.place, 0) - len(c.losses)
        own, others = beaten(c.place, values, rules), beaten(c.place.reference, values, rules)
        c.search_failed = "; ".join(text for text in (own, others) if text)
        conclude(c, rules, tests, missing_seeds, own, others)
    return Judgement(rules, tests, references, comparisons)


def reference_of(outcomes: Mapping[int, Outcome], rules: Rules) -> Reference:
    """The numbers of one set of sequential runs."""
    centre, interval = _described([o.metric for o in outcomes.values()], rules)
    finite = {seed: o.metric for seed, o in outcomes.items() if o.metric is not None}
    reference = Reference(
        outcomes=dict(outcomes),
        centre=centre,
        interval=interval,
        deviation=_deviation(list(finite.values())),
        target=_target(list(finite.values()), rules),
        targets={s: _target([v for other, v in finite.items() if other != s], rules) for s in outcomes},
        loss_bound=_loss_bound(list(outcomes.values()), rules.converged_share),
        not_finite=len(outcomes) - len(finite),
    )
    for failing in FAILINGS:
        reference.failed[failing] = sum(_fails(o, seed, reference, failing, rules) for seed, o in outcomes.items())
    return reference


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values) if values else math.nan
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else math.nan


def _target(values: Sequence[float], rules: Rules) -> float:
    """The target: as declared, or as it follows from finite values of sequential runs."""
    if rules.target is not None:
        return rules.target
    sign = rules.sign
    return sign * prediction_bound([sign * v for v in values], rules.target_level, rules.deviation_floor)


def _loss_bound(outcomes: Sequence[Outcome], share: float) -> float:
    first = middle([o.first_loss for o in outcomes if o.first_loss is not None])
    last = middle([o.last_loss for o in outcomes if o.last_loss is not None and o.metric is not None])
    return first - share * (first - last) if math.isfinite(first - last) else math.inf


def _fails(outcome: Outcome, seed: int, reference: Reference, failing: Failing, rules: Rules) -> bool:
    """Whether a run of this seed fails. A sequential run is judged like any other, by the runs of the other seeds."""
    if outcome.metric is None:
        return True
    if failing == "unconverged":
        return outcome.last_loss is not None and outcome.last_loss > reference.loss_bound
    return rules.sign * (outcome.metric - reference.targets[seed]) < 0


def _worst(metric: float | None, rules: Rules) -> float:
    """A metric of which more is better; -inf, the worst there is, for a run that stopped being finite."""
    return -math.inf if metric is None else rules.sign * metric


def _described(metrics: Sequence[float | None], rules: Rules) -> tuple[float, tuple[float, float]]:
    """The median of a metric and its interval, both as the metric itself is given."""
    values = [_worst(m, rules) for m in metrics]
    low, high = (rules.sign * end for end in median_bounds(values, rules.alpha / 2))
    return rules.sign * middle(values), (min(low, high), max(low, high))


def compare(
    place: Place, outcomes: Mapping[int, Outcome], reference: Reference, rules: Rules, tests: int
) -> Comparison:
    """The numbers of one of `tests` comparisons, with no verdict yet."""
    seeds = [seed for seed in outcomes if seed in reference.outcomes]
    pairs = [(_worst(reference.outcomes[s].metric, rules), _worst(outcomes[s].metric, rules)) for s in seeds]
    losses = [round(other - own, DIGITS) for other, own in pairs]  # -inf - -inf is nan: a pair that tells nothing
    low, high = (0.0 - rules.sign * end for end in median_bounds(losses, rules.alpha / tests))
    collapsed = sum(own == -math.inf or loss >= rules.collapse for (_, own), loss in zip(pairs, losses))
    counts: dict[Failing, Count] = {}
    for failing in FAILINGS:
        these = [_fails(outcomes[s], s, reference, failing, rules) for s in seeds]
        others = [_fails(reference.outcomes[s], s, reference, failing, rules) for s in seeds]
        interval = rate_interval(sum(these), len(seeds), rules.alpha) if seeds else (0.0, 1.0)
        counts[failing] = Count(sum(these), sum(others), len(seeds), interval, more_often_p(these, others))
    centre, interval = _described([o.metric for o in outcomes.values()], rules)
    return Comparison(
        place=place,
        values={seed: outcome.metric for seed, outcome in outcomes.items()},
        centre=centre,
        interval=interval,
        losses=losses,
        difference=0.0 - rules.sign * middle(losses),  # a loss of 0 is no -0
        difference_interval=(min(low, high), max(low, high)),
        not_finite=sum(o.metric is None for o in outcomes.values()),
        collapsed=collapsed,
        collapse_at_most=rate_at_most(collapsed, len(losses), rules.alpha),
        counts=counts,
    )


def beaten(place: Place, values: Mapping[Place, Mapping[int, float | None]], rules: Rules) -> str:
    """Which untuned rule does better than a tuned arm, in words; "" for none. It shows that the arm's search failed.

    One test at level alpha for each rule, not corrected: a doubtful search is reason enough to give no verdict.
    """
    for rival in rivals_of(place):
        if rival in values and place in values:
            seeds = [seed for seed in values[place] if seed in values[rival]]
            gains = [_worst(values[rival][s], rules) - _worst(values[place][s], rules) for s in seeds]
            if sign_test(gains, 0.0) <= rules.alpha:
                better = sum(gain > 0 for gain in gains)
                return f"{place.arm} is beaten by {rival.arm}, which is not tuned, in {better} of {len(gains)} seeds"
    return ""


def conclude(c: Comparison, rules: Rules, tests: int, missing: int, failed: str, reference_failed: str) -> None:
    """Fills in verdicts and sentences. The last two say which rule beats the arm's search, and its reference's."""
    unable = undecidable(len(c.losses), missing, rules.alpha / tests, f"one of {tests} comparisons")
    if unable:
        unable = f"not enough evidence: {unable}"
    c.missing, c.unable = missing, unable
    verdict: Verdict = "undecided"
    verdict, why = (verdict, unable) if unable else _verdict(c, rules)
    # A failed search makes its own side worse: it can feign a loss of this arm, or hide one.
    if failed and verdict in ("material loss", "small loss"):
        verdict, why = "undecided", f"the search failed, so a loss says nothing of the batch: {failed}"
    elif reference_failed and verdict in ("small loss", "ruled out"):
        verdict, why = "undecided", f"the sequential search failed, so its runs tell nothing: {reference_failed}"
    c.verdicts["loses"] = verdict
    c.size_open = verdict == "undecided" and not (unable or failed or reference_failed) and _least_loss(c, rules) > 0
    c.sentences["loses"] = f"{_numbers(c)}: {why}. {_collapses(c, rules)}"
    for failing in FAILINGS:
        count = c.counts[failing]
        low, high = count.interval
        shown = count.adjusted <= rules.alpha and missing <= 0
        c.verdicts[failing] = "more often" if shown else "not shown"
        c.sentences[failing] = (
            f"{count.failed} of {count.runs} runs ({100 * (1 - rules.alpha):g} % interval {low:.2f} to {high:.2f}), "
            f"{count.of_reference} of {count.runs} sequential runs: "
            + (unable if missing > 0 else f"adjusted p = {count.adjusted:.2g}")
        )


def _least_loss(c: Comparison, rules: Rules) -> float:
    return min(-rules.sign * end for end in c.difference_interval)


def _verdict(c: Comparison, rules: Rules) -> tuple[Verdict, str]:
    """The verdict on a loss, read from the two bounds, and what it is in words."""
    low, high = sorted(-rules.sign * end for end in c.difference_interval)
    if low > rules.margin:
        return "material loss", f"the typical run loses more than {rules.margin:g}"
    if high < rules.margin:
        if low > 0:
            return "small loss", f"the typical run loses, and less than {rules.margin:g}"
        return "ruled out", f"a loss of {rules.margin:g} is ruled out for the typical run"
    if low > 0:
        return "undecided", f"the typical run loses; whether it loses {rules.margin:g} is not shown"
    return "undecided", f"a loss of {rules.margin:g} is neither shown nor ruled out for the typical run"


def _numbers(c: Comparison) -> str:
    low, high = c.difference_interval
    if math.isnan(c.difference):
        return "no pair of runs is finite"
    seeds = f"{len(c.losses)} seeds" + (f", {c.not_finite} of them not finite" if c.not_finite else "")
    if math.isinf(c.difference):
        which = "run" if middle(c.losses) > 0 else "sequential run"
        return f"the typical {which} is not finite ({seeds})"
    amount = f"{abs(c.difference):.4f} {'lower' if c.difference < 0 else 'higher'}" if c.difference else "no difference"
    interval = f"interval {low:+.4f} to {high:+.4f}" if math.isfinite(low) or math.isfinite(high) else "no interval"
    return f"{amount} in the typical run ({interval}, {seeds})"


def _collapses(c: Comparison, rules: Rules) -> str:
    return (
        f"{c.collapsed} of {len(c.losses)} collapsed (not finite, or a loss of {rules.collapse:g} or more): up to "
        f"{100 * c.collapse_at_most:.0f} % is not ruled out"
    )
