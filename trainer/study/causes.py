"""Why a weak run loses: because it makes fewer updates, or because of its batch.

At equal epochs a weak run on W ranks differs from the sequential run in two things. It makes about W times fewer
updates, and each of them has a W times larger batch. The control has the batch of one rank and makes as few updates.
What the control loses against sequential runs is called lost by fewer updates. What the weak run loses against the
control is called lost by its batch.

The control also sees W times fewer samples. So no study here can tell whether the updates or the samples are missing.

Each of the two losses is a comparison of its own, paired by seed and judged at the level of all others of the study. A
cause is read from the three verdicts and from nothing else, so all causes of a study are right together with
probability 1 - alpha.

The control processes W times fewer samples than the weak run. So a batch that loses against it makes less of an update
although more samples went into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .arms import Place, title_of
from .judgement import Comparison, Outcome, Verdict, beaten, compare, conclude, reference_of
from .results import Results

Cause = Literal[
    "fewer updates",
    "the batch itself",
    "both, fewer updates and the batch itself",
    "fewer updates (whether the batch adds to it is undecided)",
    "the batch itself (whether fewer updates add to it is undecided)",
    "both together, as neither alone loses the margin",
    "undecided",
    "no material loss",
    "undecided whether it loses",
]
_BELOW = ("small loss", "ruled out")
_NOT_LOST: tuple[Cause, ...] = ("no material loss", "undecided whether it loses")


def contrasts(results: Results) -> dict[Place, Comparison]:
    """Weak place -> its comparison with the sequential runs that make as few updates, where there are such runs.

    Of the three claims only "loses" is judged.
    """
    judged, rules = results.judgement, results.rules
    known = {c.place: c for c in judged.comparisons}
    values: dict[Place, Mapping[int, float | None]] = {place: r.values for place, r in judged.references.items()}
    values |= {place: c.values for place, c in known.items()}
    found = {}
    for place, c in known.items():
        control = place.control
        if control is None or control not in known:
            continue
        reference = reference_of(_outcomes(values[control]), rules)
        # The control stands where the sequential runs stand in the other comparisons.
        contrast = compare(place, _outcomes(values[place]), reference, rules, judged.tests)
        missing = c.missing + len(c.losses) - len(contrast.losses)
        conclude(contrast, rules, judged.tests, missing, *(beaten(p, values, rules) for p in (place, control)))
        found[place] = contrast
    return found


def _outcomes(values: Mapping[int, float | None]) -> dict[int, Outcome]:
    return {seed: Outcome(value) for seed, value in values.items()}


def cause_of(total: Verdict, updates: Verdict, batch: Verdict) -> Cause:
    """Why a weak run loses.

    Args:
        total: of the weak run against the sequential run.
        updates: of the control against the sequential run.
        batch: of the weak run against the control.
    """
    if total in _BELOW:
        return "no material loss"
    if total != "material loss":
        return "undecided whether it loses"
    if updates == "material loss":
        if batch == "material loss":
            return "both, fewer updates and the batch itself"
        return "fewer updates" if batch in _BELOW else "fewer updates (whether the batch adds to it is undecided)"
    if batch == "material loss":
        return (
            "the batch itself"
            if updates in _BELOW
            else "the batch itself (whether fewer updates add to it is undecided)"
        )
    if updates in _BELOW and batch in _BELOW:
        return "both together, as neither alone loses the margin"
    return "undecided"


def causes(results: Results) -> dict[Place, Cause]:
    """Weak place -> why it loses, of all that have a control."""
    verdicts = {c.place: c.verdicts["loses"] for c in results.judgement.comparisons}
    return {
        place: cause_of(verdicts[place], verdicts[place.control], contrast.verdicts["loses"])
        for place, contrast in contrasts(results).items()
        if place.control is not None
    }


def cause_sentences(results: Results) -> list[str]:
    """Why weak runs lose, at each W: one sentence for each variant and arm."""
    by_arm: dict[tuple[str, str], dict[str, list[int]]] = {}
    for place, cause in causes(results).items():
        by_arm.setdefault((place.variant, place.arm), {}).setdefault(cause, []).append(place.world_size)
    lines = []
    for (variant, arm), found in by_arm.items():
        why = "; ".join(f"{cause} at W = {', '.join(map(str, sorted(sizes)))}" for cause, sizes in found.items())
        what = results.named(variant, f"{title_of(arm, 'epochs')}, {results.budget('epochs')}")
        lines.append(f"{what}, why it loses: {why}.")
    return lines


def cause_rows(results: Results) -> list[list[Any]]:
    """The three comparisons behind each cause, a row each: variant, arm, W and cause; then differences and verdicts.

    The differences are that of the whole, that by fewer updates, and that by the batch itself with its interval.
    """
    known, found, rows = {c.place: c for c in results.judgement.comparisons}, causes(results), list[list[Any]]()
    for place, batch in contrasts(results).items():
        assert place.control is not None
        row: list[Any] = [place.variant or "-", place.arm, place.world_size, found[place]]
        for c in (known[place], known[place.control]):
            row += [c.difference, c.verdicts["loses"]]
        rows.append([*row, batch.difference, *batch.difference_interval, batch.verdicts["loses"]])
    return rows


def cause_headline(results: Results) -> list[str]:
    """How many material losses have which cause, in one sentence; nothing where no run has a control."""
    found = [cause for cause in causes(results).values() if cause not in _NOT_LOST]
    if not found:
        return []
    counts = "; ".join(f"{cause} in {found.count(cause)}" for cause in dict.fromkeys(found))
    losses = f"{len(found)} material loss{'es' * (len(found) > 1)}"
    return [f"What causes the {losses} that can be compared with as few updates: {counts}."]
