"""Does the loss of weak scaling fall with the number of training samples?

A loss that is material at 150 samples and ruled out at 1,200 does not show it, because two verdicts are no test of a
trend. So each arm, budget and W has a test of its own. It takes one number from each seed, Kendall's score: the pairs
of sizes in which the loss falls with the samples, minus the pairs in which it rises. The sign test then asks whether
this number is above 0 in more than half of the seeds.

The subsets of one seed are nested, and share their test samples. This makes the losses of a seed alike. The test
assumes nothing about that, because each seed gives one number.

Page's test and Kendall's W also rank within seeds. They assume that the losses of a seed could be exchanged if there
were no trend. They could not: with few samples runs scatter more. (If as many seeds fall as rise, this test holds its
level whatever the scatter is.)

All these tests of a study are a family with its own alpha, and Holm's correction. A run that is not finite has an
infinite loss, which is above any other. Two infinite losses are a tie. A loss that is not known neither falls nor
rises.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .arms import WEAK, Place, title_of
from .inference import holm, rate_interval, sign_test, undecidable
from .interaction import losses_of
from .judgement import Comparison, Judgement
from .results import Results, sizes_of

Verdict = Literal["falls", "not shown"]


@dataclass(frozen=True)
class Trend:
    """The losses of one arm, budget and W over the sizes of the training set.

    Attributes:
        place: of the base.
        samples: the sizes, from the smallest on.
        scores: seed -> pairs of sizes in which the loss falls, minus those in which it rises.
        verdict, adjusted: of the test, and its p after Holm's correction.
        unable: why nothing can be decided, whatever the runs say; "" if something can.
    """

    place: Place
    samples: list[int]
    scores: dict[int, int]
    verdict: Verdict
    adjusted: float
    unable: str = ""


def score(losses: Sequence[float]) -> int:
    """Kendall's score of losses in the order of their sizes: pairs in which the later is smaller, minus larger ones."""
    pairs = [(a, b) for i, a in enumerate(losses) for b in losses[i + 1 :]]
    return sum((a > b) - (a < b) for a, b in pairs)


def families_of(places: Collection[Place], sizes: Mapping[str, int]) -> dict[Place, list[Place]]:
    """Place of the base -> the weak places of all sizes that are possible, from the smallest on; of two or more."""
    families: dict[Place, list[Place]] = {}
    for place in dict.fromkeys(places):
        if place.arm in WEAK and place.variant in sizes:
            families.setdefault(replace(place, variant=""), []).append(place)
    return {base: sorted(of, key=lambda p: sizes[p.variant]) for base, of in families.items() if len(of) > 1}


def trends(judged: Judgement, sizes: Mapping[str, int], planned: Mapping[Place, int]) -> list[Trend]:
    """All trends of a study.

    Args:
        judged: its comparisons.
        sizes: variant -> training samples.
        planned: every place that is compared -> its declared seeds. Nothing is decided before all of them are there.
    """
    known = {c.place: c for c in judged.comparisons}
    families = families_of(planned, sizes)
    scores = [_scores(of, known, judged) for of in families.values()]
    adjusted = holm([sign_test(list(by_seed.values()), 0.0) for by_seed in scores])
    found = []
    for (base, of), by_seed, p in zip(families.items(), scores, adjusted):
        missing = min(planned[place] for place in of) - len(by_seed)
        failed = [known[place].search_failed for place in of if place in known and known[place].search_failed]
        unable = undecidable(
            len(by_seed), missing, judged.rules.alpha / len(families), f"one of {len(families)} trends"
        )
        if failed and not unable:
            unable = f"a search failed, so a loss says nothing of the batch: {failed[0]}"
        verdict: Verdict = "falls" if not unable and p <= judged.rules.alpha else "not shown"
        found.append(Trend(base, [sizes[place.variant] for place in of], by_seed, verdict, p, unable))
    return found


def _scores(of: Sequence[Place], known: Mapping[Place, Comparison], judged: Judgement) -> dict[int, int]:
    """Seed -> score, of the seeds that all sizes have."""
    if any(place not in known for place in of):
        return {}
    losses = [losses_of(known[place], judged) for place in of]
    return {seed: score([own[seed] for own in losses]) for seed in losses[0] if all(seed in own for own in losses)}


def trends_in(results: Results) -> list[Trend]:
    """The trends of a study of dataset sizes."""
    return trends(results.judgement, sizes_of(results), results.planned)


def trend_sentences(results: Results) -> list[str]:
    """For each arm, budget and W: whether the loss falls with the samples. A reason that many share is given once."""
    lines, reasons = [], dict[str, int]()
    level = f"{100 * (1 - results.rules.alpha):g} %"
    for t in trends_in(results):
        if t.unable:
            reasons[t.unable] = reasons.get(t.unable, 0) + 1
            continue
        falls, rises = (sum(sign * s > 0 for s in t.scores.values()) for sign in (1, -1))
        low, high = rate_interval(falls, len(t.scores), results.rules.alpha)
        what = f"{title_of(t.place.arm, t.place.budget)}, {results.budget(t.place.budget)}, W = {t.place.world_size}"
        said = "falls" if t.verdict == "falls" else "is not shown to fall"
        lines.append(
            f"{what}: the loss {said} with the number of samples ({', '.join(f'{n:,}' for n in t.samples)}). From size "
            f"to size it falls more often than it rises in {falls} of {len(t.scores)} seeds, and rises more often in "
            f"{rises} ({level} interval of the first share {low:.2f} to {high:.2f}, not corrected; adjusted p = "
            f"{t.adjusted:.2g})."
        )
    return lines + [
        f"{count} trend{'s' * (count > 1)} over the samples {'are' if count > 1 else 'is'} not shown: {reason}."
        for reason, count in reasons.items()
    ]
