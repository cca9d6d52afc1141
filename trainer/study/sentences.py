"""What a study says, in sentences. Each lists its sizes one by one: "from 600 on" would be wrong if 900 differs."""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..wording import counted
from .arms import CONTROLS, SEQUENTIAL, WEAK, Place, title_of
from .causes import cause_headline, cause_sentences
from .interaction import interaction_sentences
from .judgement import Comparison, Reference, Verdict
from .noise import Scale, scales_by_epoch, whole_scale
from .results import Results, epochs_of, sizes_of
from .timing import check_bits
from .to_target import target_sentences
from .trend import trend_sentences
from .tuning import edges_of
from .variance import variance_sentences

CLAIMS = {
    "loses": "does the typical run lose against its sequential run",
    "below": "do runs miss the target more often than sequential runs",
    "unconverged": "do runs fail to converge more often than sequential runs",
}
_LOSSES: tuple[Verdict, ...] = ("material loss", "small loss", "ruled out", "undecided")


def verdicts(folder: Path) -> list[str]:
    """The verdicts of a study as lines of text."""
    results = Results(folder)
    lines = [*sequential_sentences(results), *results.doubts(), *strong_sentences(results)]
    lines += too_few_sentences(results)
    for claim, what, comparisons in claims(results):
        lines.append(f"{what}: {CLAIMS[claim]}?")
        lines += [f"  W = {c.place.world_size}: {c.verdicts[claim]}. {c.sentences[claim]}" for c in comparisons]
    lines += cause_sentences(results) + search_sentences(results) + size_sentences(results) + budget_sentences(results)
    lines += trend_sentences(results) + interaction_sentences(results) + variance_sentences(results)
    return lines + target_sentences(results) + noise_sentences(results)


def claims(results: Results) -> Iterable[tuple[str, str, list[Comparison]]]:
    """(claim, what it is about, its comparisons by W), for each arm, budget and variant.

    Comparisons that `too_few_sentences` has put together are left out.
    """
    together = _undecidable(results)
    for variant, budget in results.blocks():
        for arm, comparisons in results.groups(variant, budget).items():
            for claim in CLAIMS:
                what = title_of(arm, budget) + (f", {results.budget(budget)}" if arm not in CONTROLS else "")
                own = [c for c in comparisons if c.unable not in together or (claim != "loses" and not c.missing)]
                if own:
                    yield claim, results.named(variant, what), own


def _undecidable(results: Results) -> dict[str, int]:
    """Reason why nothing can be decided -> how many comparisons have it; only reasons that several share."""
    counts = collections.Counter(c.unable for c in results.judgement.comparisons if c.unable)
    return {reason: count for reason, count in counts.items() if count > 1}


def too_few_sentences(results: Results) -> list[str]:
    """One sentence for all comparisons that are undecided for the same reason."""
    return [
        f"{count} of {len(results.judgement.comparisons)} comparisons are undecided, which does not mean that nothing "
        f"is lost. The reason: {reason}."
        for reason, count in _undecidable(results).items()
    ]


def headline(results: Results) -> list[str]:
    """The answer in two sentences: what strong scaling does, and what weak scaling does; a third says why."""
    possible = [W for W, answer in results.declared["strong"] if isinstance(answer, int)]
    strong = "This study did not ask for strong scaling."
    if possible:
        strong = f"Strong scaling gives the sequential run's very model at W = {listed(possible)}, so it loses nothing."
    elif results.declared["strong"]:
        strong = "Strong scaling is not possible at the W of this study."
    comparisons = results.weak
    at: dict[Verdict, list[str]] = {}
    for c in comparisons:
        at.setdefault(c.verdicts["loses"], []).append(str(c.place))
    margin, metric = f"{results.rules.margin:g}", results.study.metric
    said = [
        f"{words} in {len(at[verdict])}{_for_example(at[verdict])}"
        for verdict, words in (
            ("material loss", f"the typical run loses more than {margin} of {metric}"),
            ("small loss", f"it loses, but less than {margin},"),
            ("ruled out", f"a loss of {margin} is ruled out"),
        )
        if verdict in at
    ]
    if sized := sum(c.size_open for c in comparisons):
        said.append(f"it loses in {sized}, and whether by more than {margin} is undecided")
    if rest := len(at.get("undecided", ())) - sized:
        said.append(f"{rest} are undecided, so a loss there is neither shown nor ruled out")
    if not comparisons:
        return [strong, "Nothing is known about weak scaling yet."]
    joined = said[0] if len(said) == 1 else f"{'; '.join(said[:-1])}; and {said[-1]}"
    number = len(comparisons)
    weak = f"Weak scaling, {number} comparison{'s' * (number > 1)} with sequential runs: {joined}."
    return [strong, weak, *cause_headline(results)]


def _for_example(places: Sequence[str]) -> str:
    return f" ({'; '.join(places)})" if len(places) <= 3 else f" (such as {places[-1]})"


def sequential_sentences(results: Results) -> list[str]:
    """The results of the sequential runs of each variant."""
    return [
        reference_sentence(results, place, reference)
        for place, reference in results.judgement.references.items()
        if reference.outcomes
    ]


def reference_sentence(results: Results, place: Place, reference: Reference) -> str:
    """The numbers of one set of sequential runs, with how many of them failed."""
    runs = len(reference.outcomes)
    target = "unknown" if math.isnan(reference.target) else f"{reference.target:.4f}"
    low, high = reference.interval
    interval = "too few for an interval"
    if math.isfinite(low) or math.isfinite(high):
        interval = f"{100 * (1 - results.rules.alpha):g} % interval {low:.4f} to {high:.4f}"
    deviation = "unknown" if math.isnan(reference.deviation) else f"{reference.deviation:.4f}"
    return (
        f"{place}: {results.study.metric} {reference.centre:.4f} in the typical run ({interval}), standard deviation "
        f"{deviation}, {runs} seeds; {reference.not_finite} of {runs} not finite, "
        f"{reference.failed['unconverged']} not converged, {reference.failed['below']} missed the target ({target})"
    )


def listed(numbers: Sequence[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(f"{n:,}" for n in numbers)


def strong_sentences(results: Results) -> list[str]:
    """What is known of strong scaling: by equal plans, and by runs on real ranks."""
    strong, timings = results.declared["strong"], results.timings
    lines = []
    possible = [W for W, answer in strong if isinstance(answer, int)]
    sequential = results.results_at(Place("", SEQUENTIAL, "epochs", 1))
    if possible:
        micro_batches = next(answer for _, answer in strong if isinstance(answer, int))
        hashes = [r["parameters_sha256"] for r in sequential if r["parameters_sha256"]]
        lines.append(
            f"strong scaling has the accuracy of the sequential runs: supported at W = {listed(possible)}, by "
            f"construction and not by a test. At each of these W the plan is the sequential run's: the same "
            f"{micro_batches} micro-batches a step, each dealt to one rank, added along the same tree. Its parameters "
            f"are those of the {len(hashes)} sequential runs (sha256 {', '.join(h[:8] for h in hashes[:3])}"
            f"{', ...' if len(hashes) > 3 else ''})."
        )
    if timings is not None and len(timings.hashes) > 1:
        first = next((r["parameters_sha256"] for r in sequential if r["seed"] == results.study.seeds[0]), None)
        same, others = check_bits(timings, first)
        what = "whole runs" if timings.max_steps is None else f"runs of {timings.max_steps:,} steps"
        if same:
            lines.append(
                f"strong scaling on real ranks: {what} of seed {results.study.seeds[0]} at W = {listed(same)} ended "
                f"with the same bits (sha256 {timings.hashes[same[0]][0][:8]})."
            )
        if others:
            lines.append(f"strong scaling on real ranks: NOT the same bits at W = {listed(others)}.")
        for W, ratios in timings.speed_ups().items():
            if W > 1:
                middle = statistics.median(ratios)
                lines.append(
                    f"strong scaling at W = {W} is {middle:.2f} times as fast as one rank (efficiency "
                    f"{middle / W:.2f}; {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} runs)."
                )
    elif possible:
        lines.append("These are equal plans, not runs on W ranks; `python -m trainer verify` makes those.")
    lines += [
        f"strong scaling at W = {W}: impossible here. {answer}" for W, answer in strong if isinstance(answer, str)
    ]
    return lines


def search_sentences(results: Results) -> list[str]:
    """Searches that failed, and how many ended at the edge of what they tried: something better may lie beyond it."""
    lines = [
        f"{c.place}: a failed search. {c.search_failed}." for c in results.judgement.comparisons if c.search_failed
    ]
    ends: dict[str, dict[str, int]] = {}
    counts: dict[str, int] = {}
    for search in results.searches.values():
        if search["best"] is not None:
            place = str(Place(**search["place"]))
            counts[place] = counts.get(place, 0) + 1
            own = ends.setdefault(place, {})
            for edge in edges_of(search["trials"], search["best"]):
                own[edge] = own.get(edge, 0) + 1
    return lines + [
        f"searches of {place}: "
        + ", ".join(f"{n} of {counts[place]} found the {edge}" for edge, n in sorted(own.items()))
        + " that they tried, so something better may lie beyond."
        for place, own in ends.items()
        if own
    ]


def size_sentences(results: Results) -> list[str]:
    """The verdict at each number of training samples, for studies of dataset sizes."""
    return _by_number(results, sizes_of(results), "training samples")


def budget_sentences(results: Results) -> list[str]:
    """The verdict at each number of epochs, for studies of budgets."""
    return _by_number(results, epochs_of(results), "epochs of the budget")


def _by_number(results: Results, numbers: Mapping[str, int], of: str) -> list[str]:
    """The verdicts of each arm and W at each of several numbers, which variants stand for."""
    if len(numbers) < 2:
        return []
    lines = []
    pairs = dict.fromkeys((c.place.arm, c.place.budget, c.place.world_size) for c in results.judgement.comparisons)
    for arm, budget, W in pairs:
        by_number = {
            numbers[c.place.variant]: c
            for c in results.judgement.comparisons
            if (c.place.arm, c.place.budget, c.place.world_size) == (arm, budget, W) and c.place.variant in numbers
        }
        if len(by_number) < 2:
            continue
        shown = ", ".join(f"{n:,}: {by_number[n].difference:+.4f}" for n in sorted(by_number))
        at = {v: [n for n in sorted(by_number) if by_number[n].verdicts["loses"] == v] for v in _LOSSES}
        found = "; ".join(f"{verdict} at {listed(these)}" for verdict, these in at.items() if these)
        shared = f", {results.budget(budget)}" if arm not in CONTROLS else ""
        what = f"{title_of(arm, budget)}{shared}, W = {W}"
        lines.append(f"{what}, by {of}: {found} ({shown}).")
    return lines


def noise_scale(results: Results) -> Scale | None:
    """The gradient noise scale over the sequential runs; None if it was not measured."""
    return whole_scale(results.results_at(Place("", SEQUENTIAL, "epochs", 1)), results.rules.alpha)


def material_losses(results: Results) -> dict[str, list[int]]:
    """Arm -> the W at which a material loss was shown, of the base at equal epochs."""
    groups = results.groups("", "epochs").items()
    found = {
        arm: [c.place.world_size for c in comparisons if c.verdicts["loses"] == "material loss"]
        for arm, comparisons in groups
        if arm in WEAK
    }
    return {arm: sizes for arm, sizes in found.items() if sizes}


def noise_sentences(results: Results) -> list[str]:
    """The batch up to which gradient noise predicts no harm, and where weak scaling was seen to lose."""
    runs = results.results_at(Place("", SEQUENTIAL, "epochs", 1))
    scale = noise_scale(results)
    if scale is None:
        return []
    B, percent = runs[0]["global_batch_size"], f"{100 * (1 - results.rules.alpha):g} %"
    line = (
        f"gradient noise scale of the sequential runs (McCandlish et al. 2018): {scale.value:,.0f} samples over whole "
        f"runs ({percent} interval {max(0.0, scale.low):,.0f} to {scale.high:,.0f})"
    )
    by_epoch = scales_by_epoch(runs, results.rules.alpha)
    if len(by_epoch) > 1:
        chosen = sorted(by_epoch)
        chosen = [chosen[0], chosen[len(chosen) // 2], chosen[-1]] if len(chosen) > 3 else chosen
        line += "; " + ", ".join(
            f"{by_epoch[e].value:,.0f} in epoch {e} ({max(0.0, by_epoch[e].low):,.0f} to {by_epoch[e].high:,.0f})"
            for e in chosen
        )
    line += f". Batches well below it should need few more samples, and {scale.value:,.0f} about twice as many: "
    line += (
        f"W = {scale.value / B:.3g} times the batch of {B}. " if scale.value >= B else f"less than the batch of {B}. "
    )
    groups = results.groups("", "epochs")
    if not groups:
        return [line + "This study compares nothing at equal epochs."]
    # Only the base's comparisons, because the noise scale is the base's: a variant, a size or a budget has another one.
    own = results.named("", "", "")
    alone = f" of {own}" if own else " of the base" if len(results.variants) > 1 else ""
    lost = [f"{title_of(arm, 'epochs')} at W = {listed(sizes)}" for arm, sizes in material_losses(results).items()]
    weak = [c for arm, comparisons in groups.items() if arm in WEAK for c in comparisons]
    open_ones = sum(c.verdicts["loses"] == "undecided" for c in weak)
    line += f"Among {counted(len(weak), 'weak comparison')}{alone}, "
    line += f"a material loss is shown of: {'; '.join(lost)}." if lost else "no material loss is shown"
    undecided = f", but {open_ones} of them {'is' if open_ones == 1 else 'are'} undecided." if open_ones else "."
    line += "" if lost else undecided
    return [line]
