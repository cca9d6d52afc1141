"""Updates and epochs until runs reach a target, by global batch (Shallue et al. 2019, arXiv 1811.03600).

These are descriptions and no verdicts: medians over seeds of the first validation at which the metric is as good as
`study.target`. Runs validate only now and then, so no number is finer than the time between two validations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arms import WEAK, Place, title_of
from .inference import median_bounds, middle
from .results import Results


@dataclass(frozen=True)
class ToTarget:
    """When the runs of one place reach the target.

    Attributes:
        place: of the runs.
        batch: global batch, in samples.
        updates, epochs: of each run, up to the target; inf for a run that never reaches it.
        between: epochs between validations.
    """

    place: Place
    batch: int
    updates: list[float]
    epochs: list[float]
    between: float

    @property
    def never(self) -> int:
        """How many runs never reach the target."""
        return sum(math.isinf(n) for n in self.updates)

    def typical(self, of: str, level: float) -> tuple[float, float, float]:
        """The median of "updates" or of "epochs", and its two bounds, each wrong with probability `level` at most."""
        values = self.updates if of == "updates" else self.epochs
        return middle(values), *median_bounds(values, level)


def metric_name(results: Results) -> str:
    """The curve in which the target is looked for. It is of validation, because the test set must choose nothing."""
    return f"validation/{results.study.metric.split('/')[1]}"


def first_reached(curve: Mapping[str, Sequence[float]], target: float, higher: bool) -> tuple[float, float]:
    """(updates, epochs) at the first value of a curve that is as good as a target; inf if none is."""
    for step, epoch, value in zip(curve["step"], curve["epoch"], curve["value"]):
        if value >= target if higher else value <= target:
            return float(step), float(epoch)
    return math.inf, math.inf


def way_of(results: Results, place: Place) -> ToTarget | None:
    """When the runs of a place reach the target; None where that is not known: no target, or no such curve."""
    target, name = results.study.target, f"eval/{metric_name(results)}"
    runs = results.results_at(place)
    curves = [run["curves"][name] for run in runs if "step" in run["curves"].get(name, {})]
    if target is None or not curves:
        return None
    higher = results.rules.higher_is_better
    # A run without a curve stopped being finite before its first validation.
    nothing: dict[str, Any] = {"step": [], "epoch": [], "value": []}
    reached = [first_reached(run["curves"].get(name, nothing), target, higher) for run in runs]
    # The first validation comes after as many epochs as lie between two.
    between = min(curve["epoch"][0] for curve in curves)
    return ToTarget(place, runs[0]["global_batch_size"], [u for u, _ in reached], [e for _, e in reached], between)


def ways(results: Results, variant: str, budget: str) -> dict[str, list[ToTarget]]:
    """Weak arm -> its runs by global batch, of one variant and budget; the first are the sequential ones."""
    found: dict[str, list[ToTarget]] = {}
    for arm, comparisons in results.groups(variant, budget).items():
        if arm in WEAK:
            places = [comparisons[0].place.reference, *(c.place for c in comparisons)]
            known = [way for place in places if (way := way_of(results, place)) is not None]
            # Without the sequential runs, batches have nothing to be compared with.
            if len(known) > 1 and known[0].place == places[0]:
                found[arm] = sorted(known, key=lambda way: way.batch)
    return found


def scaling(line: Sequence[ToTarget], perfect_within: float) -> dict[str, list[int]]:
    """What a larger batch brings -> the W at which it does, of one arm's runs by global batch.

    Scaling is perfect if a batch needs no more samples than one rank's batch, up to the factor `perfect_within`. Beyond
    that, returns diminish while there are fewer updates than at every smaller W. They end where there are not.
    """
    first, *others = line
    best, epochs = middle(first.updates), middle(first.epochs)
    found: dict[str, list[int]] = {}
    for way in others:
        updates = middle(way.updates)
        if math.isinf(updates):
            kind = "target not reached by the typical run"
        elif math.isinf(epochs):
            kind = "target reached, which the typical run at W = 1 does not"
        elif middle(way.epochs) <= perfect_within * epochs:
            kind = "perfect scaling"
        else:
            kind = "diminishing returns" if updates < best else "no fewer updates than at a smaller W"
        best = min(best, updates)
        found.setdefault(kind, []).append(way.place.world_size)
    return found


def target_sentences(results: Results) -> list[str]:
    """What larger batches bring on the way to the target, by arm; a first sentence says how it was found."""
    study, lines, between = results.study, list[str](), set[float]()
    for variant, budget in results.blocks():
        for arm, line in ways(results, variant, budget).items():
            between |= {way.between for way in line}
            kinds = scaling(line, study.perfect_within)
            what = "; ".join(f"{kind} at W = {', '.join(map(str, sizes))}" for kind, sizes in kinds.items())
            of = results.named(variant, f"{title_of(arm, budget)}, {results.budget(budget)}")
            lines.append(f"{of}: {what}. {'; '.join(map(_numbers, line))}.")
    if not lines:
        known = study.target is not None and results.judgement.comparisons
        return [f"Updates to the target are not known: too few runs have {metric_name(results)}."] if known else []
    every = " to ".join(f"{n:.3g}" for n in sorted({min(between), max(between)}))
    every = "every epoch" if every == "1" else f"every {every} epochs"
    return [
        f"Updates until {metric_name(results)} is {study.target:g} (a description, and no verdict): medians over seeds "
        f"of the first validation that shows it; runs validate {every}, and no number is finer. A run "
        f"that never gets there counts as infinite. Perfect scaling: at most {study.perfect_within:g} times the "
        "samples of one rank's batch. Diminishing returns: fewer updates than at every smaller W, for more samples.",
        *lines,
    ]


def _numbers(way: ToTarget) -> str:
    updates, epochs = middle(way.updates), middle(way.epochs)
    shown = "never" if math.isinf(updates) else f"{updates:,.0f} updates, {epochs:.3g} epochs"
    never = f" ({way.never} of {len(way.updates)} runs never)" if way.never else ""
    return f"W = {way.place.world_size}: {shown}{never}"
