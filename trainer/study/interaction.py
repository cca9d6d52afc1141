"""Does the loss of weak scaling differ between a variant, such as one without BatchNorm, and the base?

A loss may be material with one and ruled out with the other. This does not answer the question, because two verdicts
are no test of their difference. So each arm, budget and W of a variant has a test of its own. It tests the difference
of the two losses, paired by seed: (loss with the variant) - (loss with the base). The test is the sign test of the
median, in both directions, so it is exact whatever the distribution is.

All these tests of a study are a family, with its own alpha. Both directions count: Holm's correction is over two
one-sided hypotheses for each place. So alpha also bounds the probability that the direction of a verdict is wrong.

A run that is not finite has an infinite loss. Where both losses of a seed are infinite, their difference tells nothing.
Such a seed stays in the count, and counts against both directions. Leaving it out would choose the seeds by their
outcome.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from .arms import WEAK, Place, title_of
from .inference import holm, median_bounds, middle, sign_test, undecidable
from .judgement import DIGITS, Comparison, Judgement, Rules
from .results import Results

Verdict = Literal["larger", "smaller", "not shown"]


@dataclass(frozen=True)
class Interaction:
    """One arm, budget and W of a variant against the same of the base.

    Attributes:
        place: the variant's.
        differences: of the two losses, by seed; nan where both are infinite.
        verdict: whether the loss is larger or smaller with the variant.
        adjusted: p of the direction that is nearer to a verdict, after Holm's correction.
        unable: why nothing can be decided, whatever the runs say; "" if something can.
    """

    place: Place
    differences: dict[int, float]
    verdict: Verdict
    adjusted: float
    unable: str = ""

    @property
    def untold(self) -> int:
        """Seeds that tell nothing."""
        return sum(math.isnan(d) for d in self.differences.values())


def pairs_of(places: Collection[Place], variants: Collection[str]) -> list[Place]:
    """The weak places of variants that the base has as well."""
    return [
        place
        for place in dict.fromkeys(places)
        if place.arm in WEAK and place.variant in variants and replace(place, variant="") in places
    ]


def losses_of(c: Comparison, judged: Judgement) -> dict[int, float]:
    """Seed -> loss of a comparison."""
    reference = judged.references[c.place.reference].outcomes
    return dict(zip([seed for seed in c.values if seed in reference], c.losses, strict=True))


def interactions(judged: Judgement, variants: Collection[str], planned: Mapping[Place, int]) -> list[Interaction]:
    """All interactions of a study.

    Args:
        judged: its comparisons.
        variants: names of those that are asked about.
        planned: every place that is compared -> its declared seeds. Nothing is decided before all of them are there.
    """
    known = {c.place: c for c in judged.comparisons}
    pairs = pairs_of(planned, variants)
    found: list[tuple[Place, dict[int, float]]] = []
    p_values: list[float] = []
    for place in pairs:
        differences: dict[int, float] = {}
        base = replace(place, variant="")
        if place in known and base in known:
            own, others = losses_of(known[place], judged), losses_of(known[base], judged)
            differences = {seed: round(own[seed] - others[seed], DIGITS) for seed in own if seed in others}
        found.append((place, differences))
        values = list(differences.values())
        # Both directions are hypotheses of their own: Holm's correction is over twice as many tests as places.
        p_values += [sign_test(values, 0.0), sign_test([-d for d in values], 0.0)]
    adjusted = holm(p_values)
    return [
        _concluded(place, differences, adjusted[2 * i], adjusted[2 * i + 1], judged.rules, len(pairs), planned, known)
        for i, (place, differences) in enumerate(found)
    ]


def _concluded(
    place: Place,
    differences: dict[int, float],
    larger: float,
    smaller: float,
    rules: Rules,
    tests: int,
    planned: Mapping[Place, int],
    known: Mapping[Place, Comparison],
) -> Interaction:
    base = replace(place, variant="")
    missing = min(planned[place], planned[base]) - len(differences)
    failed = [known[p].search_failed for p in (place, base) if p in known and known[p].search_failed]
    unable = undecidable(len(differences), missing, rules.alpha / (2 * tests), f"one of {tests} interactions")
    if failed and not unable:
        unable = f"a search failed, so a loss says nothing of the batch: {failed[0]}"
    verdict: Verdict = "not shown"
    if not unable and min(larger, smaller) <= rules.alpha:
        verdict = "larger" if larger < smaller else "smaller"
    return Interaction(place, differences, verdict, min(larger, smaller), unable)


def interactions_in(results: Results) -> list[Interaction]:
    """The interactions of a study's variants with the base."""
    return interactions(results.judgement, list(results.study.variants), results.planned)


def interaction_sentences(results: Results) -> list[str]:
    """For each variant, arm, budget and W: whether the loss differs with it. A reason that many share is given once."""
    lines, reasons = [], dict[str, int]()
    for i in interactions_in(results):
        if i.unable:
            reasons[i.unable] = reasons.get(i.unable, 0) + 1
            continue
        what = f"{title_of(i.place.arm, i.place.budget)}, {results.budget(i.place.budget)}, W = {i.place.world_size}"
        said = "is not shown to differ" if i.verdict == "not shown" else f"is {i.verdict}"
        lines.append(f"{what}: the loss {said} with {i.place.variant}. {_numbers(i, results.rules)}.")
    return lines + [
        f"{count} interaction{'s' * (count > 1)} with a variant {'are' if count > 1 else 'is'} not shown: {reason}."
        for reason, count in reasons.items()
    ]


def _numbers(i: Interaction, rules: Rules) -> str:
    values = list(i.differences.values())
    low, high = median_bounds(values, rules.alpha / 2)
    typical = middle(values)
    amount = f"by {typical:+.4f} in the typical seed" if math.isfinite(typical) else "with no finite typical difference"
    untold = (
        f", of which {i.untold} tell{'s' * (i.untold == 1)} nothing, as both losses are infinite" if i.untold else ""
    )
    return (
        f"It differs {amount} ({100 * (1 - rules.alpha):g} % interval {low:+.4f} to {high:+.4f}, not corrected; "
        f"{len(values)} seeds{untold}; adjusted p = {i.adjusted:.2g})"
    )
