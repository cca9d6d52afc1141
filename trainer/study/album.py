"""Which figures a study has, and the numbers in each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from . import figures
from .arms import SEQUENTIAL, SEQUENTIALS, Place
from .drawing import Curve, Group, Level, Point, Series
from .judgement import FAILINGS
from .noise import scales_by_epoch
from .prediction import search_times
from .results import Results, epochs_of, sizes_of, speed_ups
from .sentences import material_losses, noise_scale
from .to_target import metric_name, ways


class Album:
    """Figures of one page: each is saved, and gives the HTML that shows it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.parts: list[str] = []

    def add(self, name: str, figure: Any, caption: str) -> None:
        """Saves a figure as SVG and PDF, and shows it with its caption."""
        svg = figures.save(figure, self._folder, name)
        self.parts.append(
            f'<figure><img alt="{escape(caption)}" src="{figures.data_uri(svg)}">'
            f"<figcaption>{escape(caption)} (figures/{escape(name)}.svg, .pdf)</figcaption></figure>"
        )


def figures_of(results: Results, folder: Path) -> list[str]:
    """All figures of a study, saved in a folder: their part of the page, in HTML."""
    album = Album(folder)
    for i, (variant, budget) in enumerate(results.blocks()):
        _draw_block(results, album, variant, budget, f"{i}-{budget}" if variant else budget)
    for figure in [*size_figures(results), *budget_figures(results), *target_figures(results)]:
        album.add(*figure)
    _draw_noise(results, album)
    _draw_times(results, album)
    return ["<h2>Figures</h2>", *album.parts] if album.parts else []


def metric_figure(results: Results, variant: str, budget: str) -> tuple[Any, str]:
    """The metric over W of one variant and budget, by arm: a figure and its caption."""
    metric, what = results.study.metric, _what(results, variant, budget)
    reference = results.judgement.references[Place(variant, SEQUENTIAL, "epochs", 1)]
    series = [
        Series(arm, [Point(c.place.world_size, c.centre, *c.interval) for c in comparisons], arm)
        for arm, comparisons in results.groups(variant, budget).items()
    ]
    for arm in [arm for arm in SEQUENTIALS if arm != SEQUENTIAL]:
        own = results.judgement.references.get(Place(variant, arm, "epochs", 1))
        if own is not None and own.outcomes:
            series.append(Series(arm, [Point(1, own.centre, *own.interval)], arm))
    most = max((W for W, answer in results.declared["strong"] if isinstance(answer, int)), default=0)
    figure = figures.over_world_sizes(
        f"{metric} over W, {what}",
        metric,
        series,
        Level(reference.centre, "sequential", *reference.interval),
        Level(reference.target, "target"),
        strong=most,
    )
    return (
        figure,
        f"{metric} by arm, {what}: medians over seeds with {_level(results)} intervals of the median, not corrected.",
    )


def _level(results: Results) -> str:
    return f"{100 * (1 - results.rules.alpha):g} %"


def _what(results: Results, variant: str, budget: str) -> str:
    return results.named(variant, results.budget(budget), ", ")


def _draw_block(results: Results, album: Album, variant: str, budget: str, name: str) -> None:
    """Draws the metric and the failures over W, and the losses over epochs, of one variant and budget."""
    groups, level, what = results.groups(variant, budget), _level(results), _what(results, variant, budget)
    album.add(f"metric-{name}", *metric_figure(results, variant, budget))
    for failing, said in zip(FAILINGS, ("miss the target", "do not converge")):
        rates = [
            Series(
                arm,
                [
                    Point(c.place.world_size, count.failed / count.runs, *count.interval)
                    for c in comparisons
                    if (count := c.counts[failing]).runs
                ],
                arm,
            )
            for arm, comparisons in groups.items()
        ]
        title = f"share of runs that {said}, {what}"
        figure = figures.over_world_sizes(title, "share of runs", rates, limits=(0.0, 1.0))
        caption = f"Share of runs that {said}, {what}, with {level} Clopper-Pearson intervals."
        album.add(f"{failing}-{name}", figure, caption)
    sizes = sorted({c.place.world_size for comparisons in groups.values() for c in comparisons})
    for W in dict.fromkeys((sizes[0], sizes[-1])):  # the smallest and the largest, once if they are the same
        places = [Place(variant, SEQUENTIAL, "epochs", 1)]
        places += [c.place for comparisons in groups.values() for c in comparisons if c.place.world_size == W]
        curves = [
            Group(place.arm, [_curve(run, "train/loss") for run in runs], place.arm)
            for place in places
            if (runs := [run for run in results.results_at(place) if "train/loss" in run["curves"]])
        ]
        if curves:
            figure = figures.loss_curves(f"training loss at W = {W}, {what}", "training loss", curves)
            caption = f"Training loss at W = {W}, {what}: medians, and bands of all seeds."
            album.add(f"loss-W{W}-{name}", figure, caption)


def _curve(run: Mapping[str, Any], name: str) -> Curve:
    curve = run["curves"][name]
    return Curve(curve["epoch"], curve["value"], run["status"] == "not finite")


def size_figures(results: Results) -> list[tuple[str, Any, str]]:
    """The difference to sequential over training samples: name, figure and caption of each; none without sizes."""
    sizes = sizes_of(results)
    if len(sizes) < 2:
        return []
    drawn = []
    lines: dict[tuple[str, str, int], list[Point]] = {}
    for c in results.judgement.comparisons:
        if c.place.variant in sizes:
            point = Point(sizes[c.place.variant], c.difference, *c.difference_interval)
            lines.setdefault((c.place.arm, c.place.budget, c.place.world_size), []).append(point)
    for budget in dict.fromkeys(budget for _, budget, _ in lines):
        series = [
            Series(arm, sorted(points, key=lambda p: p.x), arm, world_size=W)
            for (arm, of, W), points in lines.items()
            if of == budget
        ]
        margin = -results.study.margin if results.study.direction == "max" else results.study.margin
        metric, what = results.study.metric, results.budget(budget)
        figure = figures.over_sizes(f"{metric} against sequential, {what}", "difference", series, margin)
        drawn.append((f"sizes-{budget}", figure, f"Difference of {metric} to sequential by training samples, {what}."))
    return drawn


# The arms whose budgets are drawn, at most three: so many panels fit into a row. These come first, as they say most.
_PANELS = ("weak", "weak_linear_warmup", "weak_tuned")


def budget_figures(results: Results) -> list[tuple[str, Any, str]]:
    """The metric over the budget: name, figure and caption; none without budgets."""
    epochs = epochs_of(results)
    centres = {c.place: (c.centre, c.interval) for c in results.judgement.comparisons}
    centres |= {place: (r.centre, r.interval) for place, r in results.judgement.references.items() if r.outcomes}
    lines: dict[str, dict[tuple[str, str, bool], list[Point]]] = {}
    for place in [c.place for c in results.weak if c.place.budget == "epochs"]:
        name, sequential = f"W = {place.world_size}", place.reference
        drawn = {(sequential.arm, sequential.arm, False): sequential, (name, "", False): place}
        if place.control is not None:
            drawn[f"{name}, as few updates", name, True] = place.control
        for style, at in drawn.items():
            points = lines.setdefault(place.arm, {}).setdefault(style, [])
            if place.variant in epochs and at in centres:
                point = Point(epochs[place.variant], centres[at][0], *centres[at][1])
                points += [point] if point not in points else []
    lines = {arm: of for arm, of in lines.items() if any(len(points) > 1 for points in of.values())}
    chosen = sorted(lines, key=lambda arm: _PANELS.index(arm) if arm in _PANELS else len(_PANELS))[: len(_PANELS)]
    if not chosen:
        return []
    panels = {
        arm: [
            Series(name, points, style, dashed, hollow=dashed)
            for (name, style, dashed), points in lines[arm].items()
            if points
        ]
        for arm in chosen
    }
    metric, level = results.study.metric, _level(results)
    others = f" Not drawn: {', '.join(arm for arm in lines if arm not in chosen)}." if len(lines) > len(chosen) else ""
    controls = any(dashed for arm in chosen for _, _, dashed in lines[arm])
    figure = figures.over_budgets(f"{metric} over the budget, equal epochs", metric, panels)
    caption = (
        f"{metric} by epochs of the budget: medians over seeds with {level} intervals, not corrected."
        + (" Dashed: the batch of one rank, with as few updates as at this W." if controls else "")
        + others
    )
    return [("budgets", figure, caption)]


def target_figures(results: Results) -> list[tuple[str, Any, str]]:
    """Updates and epochs to the target: name, figure and caption for each variant and budget; none without a target."""
    drawn = []
    # Each of an interval's two bounds may be wrong with half of alpha.
    level, scale = results.rules.alpha / 2, noise_scale(results)
    for i, (variant, budget) in enumerate(results.blocks()):
        found = ways(results, variant, budget)
        if not found:
            continue
        panels, perfect = dict[str, list[Series]](), dict[str, list[Point]]()
        for of, power in (("updates", -1.0), ("epochs", 0.0)):
            label = f"{of} to the target"
            panels[label] = [
                Series(arm, [Point(way.batch, *way.typical(of, level)) for way in line], arm)
                for arm, line in found.items()
            ]
            starts = {line[0].place: line[0] for line in found.values()}
            first = next(iter(starts.values()))
            batches = [first.batch, max(way.batch for line in found.values() for way in line)]
            y = first.typical(of, level)[0]
            perfect[label] = [Point(b, y * (b / first.batch) ** power) for b in batches if math.isfinite(y)]
        mark = None if scale is None else Level(scale.value, "gradient noise scale", scale.low, scale.high)
        what = _what(results, variant, budget)
        title = f"to {metric_name(results)} {results.study.target:g}, {what}"
        noise = ", and the gradient noise scale of the sequential runs" if scale is not None else ""
        name = f"to-target-{i}-{budget}" if variant else f"to-target-{budget}"
        caption = (
            f"Updates and epochs {title}: medians over seeds with {100 * (1 - 2 * level):g} % intervals where they "
            f"are finite; the line of perfect scaling through W = 1{noise}. A description, and no verdict."
        )
        drawn.append((name, figures.to_target(title, panels, perfect, mark), caption))
    return drawn


def _draw_noise(results: Results, album: Album) -> None:
    runs = results.results_at(Place("", SEQUENTIAL, "epochs", 1))
    scales = scales_by_epoch(runs, results.rules.alpha)
    if not scales:
        return
    B = runs[0]["global_batch_size"]
    marks, lost = [Level(B, f"one rank's batch, {B:,}")], material_losses(results)
    for W in sorted({W for sizes in lost.values() for W in sizes}):
        marks.append(Level(W * B, f"{' and '.join(a for a in lost if W in lost[a])} lose at {W * B:,}"))
    points = [Point(epoch, scale.value, scale.low, scale.high) for epoch, scale in scales.items()]
    figure = figures.noise_scale("gradient noise scale of the sequential runs by epoch", points, marks)
    level = f"{100 * (1 - results.rules.alpha):g} %"
    album.add("noise", figure, f"Gradient noise scale (McCandlish et al. 2018) by epoch, with {level} intervals.")


def _draw_times(results: Results, album: Album) -> None:
    measured, predicted = speed_ups(results)
    if results.timings is None or len(measured) < 2:
        return
    points = [
        Point(W, measured[W], min(ratios), max(ratios)) for W, ratios in sorted(results.timings.speed_ups().items())
    ]
    figure = figures.speed_up("strong scaling", points, [Point(W, s) for W, s in sorted(predicted.items())])
    given = "given" if results.timings.given else "measured"
    m = results.timings.measured
    network = (
        f" Predicted from one rank's step, a latency of {m.latency_s * 1e6:,.0f} us and {m.bytes_per_s / 1e9:.3g} "
        f"GB/s, both {given}, for ranks with devices of their own."
        if m is not None
        else ""
    )
    album.add("speed-up", figure, f"Speed-up and efficiency of strong scaling.{network}")
    known = predicted | measured
    W = max(known)
    trial_s = sorted(results.timings.walls_s[1])[len(results.timings.walls_s[1]) // 2]
    counts = sorted({2**i for i in range(9)} | {W})
    times = [search_times(trial_s, known, W, n) for n in counts]
    dashed = W not in measured
    series = [
        Series(f"one run on {W} ranks at a time", [Point(t.trials, t.strong) for t in times], "strong", dashed),
        Series(f"{W} runs at once", [Point(t.trials, t.at_once) for t in times], "sequential", dashed),
        Series("best mix", [Point(t.trials, t.mixed) for t in times], "weak", dashed),
    ]
    figure = figures.trials(f"a search for the best configuration on {W} devices", "seconds", series)
    album.add("trials", figure, f"Time until the best of this many trials is known on {W} devices.")
