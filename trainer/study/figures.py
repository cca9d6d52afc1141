"""The figures of a study, for its page and for print: plain numbers in, a matplotlib figure out.

The same numbers give the same bytes, on any machine with the same matplotlib: the font comes with matplotlib, there are
no dates and no random ids, and the user's matplotlibrc is not read.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import whole_file
from .drawing import (
    BLACK,
    BLUE,
    GREY,
    Group,
    Level,
    Point,
    Series,
    across_seeds,
    curve_view,
    draw_cross,
    draw_legend,
    draw_level,
    draw_marks,
    drawn,
    empty_figure,
    log_view,
    look_of,
    name_levels,
    plain_numbers,
    sparse,
    styles_of,
    view_of,
    world_size_axis,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@drawn
def over_world_sizes(
    title: str,
    label: str,
    series: Sequence[Series],
    reference: Level | None = None,
    target: Level | None = None,
    limits: tuple[float, float] | None = None,
    strong: int = 0,
) -> Figure:
    """A quantity over W by arm, with intervals.

    Args:
        title: above the drawing.
        label: the quantity and its unit.
        series: x is W, at least 1.
        reference: the sequential runs: a line, and a band of their interval.
        target: a dashed line.
        limits: the range of the quantity, for one that has ends; points beyond are marked at the edge.
        strong: the largest W of strong scaling, which has the sequential runs' models; 0 for none.
    """
    figure, (axes,) = empty_figure(title, label)
    levels = [level for level in (reference, target) if level is not None]
    low, high = limits or view_of([p for s in series for p in s.points], levels)
    # Room at the ends, so that marks there are not cut.
    room = 0.04 * (high - low) if limits else 0.0
    axes.set_ylim(low - room, high + room)
    if reference is not None:
        draw_level(axes, reference, BLACK, "solid")
        if strong and math.isfinite(reference.value):
            same = f"strong, the same models, up to W = {strong}"
            axes.plot(
                [1, strong], [reference.value] * 2, color=BLACK, lw=2.6, solid_capstyle="butt", label=same, zorder=2
            )
    if target is not None:
        draw_level(axes, target, GREY, (0, (4, 3)))
    world_size_axis(axes, {p.x for s in series for p in s.points})
    draw_marks(axes, series, apart=True)
    draw_legend(figure, [axes])
    return figure


@drawn
def loss_curves(title: str, label: str, groups: Sequence[Group], x_label: str = "epochs") -> Figure:
    """The median over seeds of a quantity along the runs, in a band from the smallest to the largest.

    A run that stopped being finite counts as infinite from there on. Otherwise the median would look too good, because
    only the better runs are left. A cross shows where it stopped.

    Args:
        title: above the drawing.
        label: the quantity and its unit.
        groups: arms, each with one curve a seed; lengths and samplings may differ.
        x_label: what the curves' x counts.
    """
    figure, (axes,) = empty_figure(title, label, x_label)
    styles = styles_of([(g.name, g.arm) for g in groups])
    lines = [across_seeds(group.curves) for group in groups]
    low, high, log = curve_view(lines)
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(low, high)
    if log:
        plain_numbers(axes.yaxis)
    top = 10 * abs(high)  # far enough; what is infinite cannot be drawn
    for place, (line, style) in enumerate(zip(lines, styles)):
        axes.fill_between(line.x, line.low, np.minimum(line.high, top), color=style.colour, alpha=0.15, linewidth=0)
        middle = np.where(np.isfinite(line.middle), np.minimum(line.middle, top), np.nan)
        every = max(1, len(line.x) // 6)
        marked = (place * every // len(groups), every)
        axes.plot(line.x, middle, label=style.label, markevery=marked, zorder=3 + place / 100, **look_of(style))
        draw_cross(axes, [x for x, _ in line.ends], [min(y, high) for _, y in line.ends], style.colour)
    if any(line.ends for line in lines):
        draw_cross(axes, [], [], GREY, label="not finite from here")
    draw_legend(figure, [axes])
    return figure


@drawn
def speed_up(title: str, measured: Sequence[Point], predicted: Sequence[Point] = ()) -> Figure:
    """Speed-up over W, T1 / TW, and strong efficiency, T1 / (W TW), side by side.

    Args:
        title: above the drawing.
        measured: x is W, y the speed-up, low and high its spread over runs.
        predicted: the same, of a model of the machine; dashed.
    """
    figure, axes = empty_figure(title, "", panels=2)
    sizes = {p.x for p in (*measured, *predicted)} | {1.0}
    both = (("measured", measured, False), ("predicted", predicted, True))
    kinds = [(name, points, dashed) for name, points, dashed in both if points]
    for panel, label in zip(axes, ("speed-up, T1 / TW", "efficiency, T1 / (W TW)")):
        share = panel is axes[1]
        panel.set_ylabel(label)
        ideal = [1.0 if share else x for x in sorted(sizes)]
        panel.plot(sorted(sizes), ideal, color=BLACK, lw=0.9, ls=(0, (1, 2)), label="ideal")
        series = [
            Series(
                name,
                [Point(p.x, *((v / p.x if share else v) for v in (p.y, p.low, p.high))) for p in points],
                dashed=dashed,
            )
            for name, points, dashed in kinds
        ]
        seen = [v for s in series for p in s.points for v in (p.y, p.low, p.high) if math.isfinite(v)]
        if share:
            panel.set_ylim(0, max(1.0, min(2.0, max(seen, default=1.0))) * 1.06)
        else:
            seen = [v for v in seen if v > 0] + [1.0]
            panel.set_yscale("log", base=2)
            panel.set_ylim(max(2.0**-6, min(seen)) / 1.15, max(max(sizes), min(max(seen), 2 * max(sizes))) * 1.15)
            plain_numbers(panel.yaxis, [2.0**k for k in range(-6, 20)])
        world_size_axis(panel, sizes)
        draw_marks(panel, series)
    draw_legend(figure, axes, below=True)
    return figure


@drawn
def noise_scale(title: str, points: Sequence[Point], marks: Sequence[Level] = ()) -> Figure:
    """The gradient noise scale by epoch, in samples, in a band from the lower to the upper ends of its intervals.

    Args:
        title: above the drawing.
        points: x is the epoch. The line has a gap where y is not finite or not above 0.
        marks: batches worth a line, in samples.
    """
    figure, (axes,) = empty_figure(title, "gradient noise scale (samples)", "epochs")
    axes.set_yscale("log")
    points = sorted(points, key=lambda p: p.x)
    x, y = np.array([p.x for p in points]), np.array([p.y for p in points])
    ends = [np.array([p.low for p in points]), np.array([p.high for p in points])]
    marks = [mark for mark in marks if math.isfinite(mark.value) and mark.value > 0]
    low, high = log_view([*y, *ends[0], *ends[1], *(mark.value for mark in marks)])
    axes.set_ylim(low, high)
    axes.fill_between(
        x, *(np.clip(end, low / 2, high * 2) for end in ends), color=BLUE, alpha=0.2, lw=0, label="interval"
    )
    middle = np.where(np.isfinite(y) & (y > 0), np.clip(y, low / 2, high * 2), np.nan)
    axes.plot(x, middle, color=BLUE, label="mean over seeds", marker="o" if len(x) == 1 else "")
    for mark in marks:
        axes.axhline(mark.value, color=GREY, lw=0.9, ls=(0, (4, 3)))
    name_levels(axes, [(mark.value, mark.name) for mark in marks])
    plain_numbers(axes.yaxis)
    if len(x):
        axes.legend(loc="best")
    else:
        axes.set_xticks([])
    return figure


@drawn
def over_sizes(title: str, label: str, series: Sequence[Series], margin: float | None = None) -> Figure:
    """The difference to sequential over the number of training samples, a panel for each W.

    Args:
        title: above the drawing.
        label: the difference and its unit.
        series: x in training samples; `world_size` is the panel.
        margin: with its sign, the difference from which on a loss matters: -0.01 of an accuracy, +0.01 of a loss.
    """
    sizes = sorted({s.world_size for s in series})
    figure, panels = empty_figure(title, label, "training samples", panels=max(1, len(sizes)))
    levels = [Level(0.0, "")] + ([Level(margin, "")] if margin is not None else [])
    low, high = view_of([p for s in series for p in s.points], levels)
    ticks = sorted({p.x for s in series for p in s.points if p.x > 0})
    for panel, size in zip(panels, sizes or [0]):
        panel.set_xscale("log")
        panel.set_ylim(low, high)
        panel.axhline(0, color=BLACK, lw=0.9)
        if margin is not None:
            panel.axhline(margin, color=GREY, lw=0.9, ls=(0, (4, 3)), label="margin")
        if size:
            panel.set_title(f"W = {size}", fontsize=8.5, loc="center")
        plain_numbers(panel.xaxis, sparse(ticks, 3 if len(panels) > 1 else 6))
        if ticks:
            panel.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
        draw_marks(panel, [s for s in series if s.world_size == size], apart=True)
    draw_legend(figure, panels, below=True)
    return figure


@drawn
def over_budgets(title: str, label: str, panels: Mapping[str, Sequence[Series]]) -> Figure:
    """A quantity over the budget, a panel for each arm, with intervals.

    Args:
        title: above the drawing.
        label: the quantity and its unit.
        panels: arm -> its series; x in epochs.
    """
    figure, axes = empty_figure(title, label, "epochs of the budget", panels=max(1, len(panels)))
    points = [p for series in panels.values() for s in series for p in s.points]
    ticks = sorted({p.x for p in points if p.x > 0})
    for panel, series, style in zip(axes, panels.values(), styles_of([(arm, "") for arm in panels])):
        panel.set_xscale("log")
        panel.set_ylim(*view_of(points, []))
        panel.set_title(style.label, fontsize=8.5, loc="center")
        plain_numbers(panel.xaxis, sparse(ticks, 5))
        if ticks:
            panel.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
        draw_marks(panel, series, apart=True)
    draw_legend(figure, axes, below=True)
    return figure


@drawn
def to_target(
    title: str,
    panels: Mapping[str, Sequence[Series]],
    perfect: Mapping[str, Sequence[Point]],
    noise: Level | None = None,
) -> Figure:
    """What runs take to a target over the global batch, a panel for each quantity, all axes logarithmic.

    Args:
        title: above the drawing.
        panels: label of a quantity -> its series; x in samples. What is infinite is a cross at the upper edge.
        perfect: the same label -> points of the line of perfect scaling.
        noise: the gradient noise scale in samples, with its interval: a mark on the axis of the batch.
    """
    figure, axes = empty_figure(title, "", "global batch (samples)", panels=len(panels))
    for panel, (label, series) in zip(axes, panels.items()):
        points = [p for s in series for p in s.points]
        sizes = sorted({p.x for p in points} | ({noise.value} if noise and math.isfinite(noise.value) else set()))
        panel.set_ylabel(label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlim(sizes[0] / 2**0.5, sizes[-1] * 2**0.5)
        line = perfect[label]
        low, high = log_view(v for p in (*points, *line) for v in (p.y, p.low, p.high))
        # Room for the crosses, between the view and the edge.
        panel.set_ylim(low, high * (high / low) ** 0.1)
        plain_numbers(panel.xaxis, sorted({p.x for p in points}))
        plain_numbers(panel.yaxis)
        panel.plot(
            [p.x for p in line], [p.y for p in line], color=BLACK, lw=0.9, ls=(0, (1, 2)), label="perfect scaling"
        )
        if noise is not None and math.isfinite(noise.value):
            panel.axvline(noise.value, color=BLUE, lw=0.9, ls=(0, (4, 3)), label=noise.name, zorder=1)
            if math.isfinite(noise.low) and math.isfinite(noise.high):
                panel.axvspan(noise.low, noise.high, color=BLUE, alpha=0.12, lw=0, zorder=1)
        draw_marks(panel, series, apart=True, infinite=(0.97, "not reached by half of the runs"))
    draw_legend(figure, axes, below=True)
    return figure


@drawn
def trials(title: str, label: str, series: Sequence[Series]) -> Figure:
    """The time to the best configuration over the number of trials, by how devices are shared out.

    Args:
        title: above the drawing.
        label: the time and its unit.
        series: x is the number of trials, y the time, both above 0; dashed where predicted.
    """
    figure, (axes,) = empty_figure(title, label, "trials")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({p.x for s in series for p in s.points if p.x > 0})
    axes.set_ylim(*log_view(v for s in series for p in s.points for v in (p.y, p.low, p.high)))
    if ticks:
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    plain_numbers(axes.xaxis, sparse(ticks, 10))
    plain_numbers(axes.yaxis)
    # The best mix is often one of the others.
    draw_marks(axes, series, nested=True)
    draw_legend(figure, [axes])
    return figure


# ---- files ---------------------------------------------------------------------------------------------------------


@drawn
def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes <folder>/<name>.svg and .pdf, each at once, and returns the text of the SVG."""
    # Laid out once. A second layout would move things by a rounding error, and the ids in the file with them.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    title = figure.get_suptitle()
    svg = _rendered(figure, "svg", {"Title": title, "Date": None, "Creator": None, "Format": None, "Type": None})
    # By default matplotlib writes its own address there. The files of a study name none.
    pdf = _rendered(figure, "pdf", {"Title": title, "CreationDate": None, "Creator": None, "Producer": None})
    folder.mkdir(parents=True, exist_ok=True)
    for data, ending in ((svg, "svg"), (pdf, "pdf")):
        with whole_file(folder / f"{name}.{ending}", synced=True) as temporary:
            temporary.write_bytes(data)
    return svg.decode()


def _rendered(figure: Figure, kind: str, metadata: Mapping[str, str | None]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata=dict(metadata))
    return stream.getvalue()


def data_uri(svg: str) -> str:
    """An SVG as the address of an <img>: there, the ids of several figures in one page never meet."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
