"""The figures of a study, for its page and for print: plain numbers in, a matplotlib figure out.

An arm looks the same in every figure. Colour stands for a family of arms, and the mark and the line for the member, so
that figures can be read without colour too. The same numbers give the same bytes, on any machine with the same
matplotlib: its own font, no dates, no random ids, and nobody's matplotlibrc.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np

from .errors import UserError
from .output import write_synced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Inches: the width of a page's text. A figure of one column is read at half of that, hence no text below 8 points.
_WIDTH, _HEIGHT = 6.5, 3.6

_BLACK, _GREY = "#000000", "#6e6e6e"
# Okabe and Ito's palette without its yellow, which white paper swallows.
_ORANGE, _SKY, _GREEN, _BLUE, _VERMILLION, _PURPLE = "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#dedede",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 5,
    "text.parse_math": False,  # a "$" in a name is a "$"
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "study",  # ids that follow from the drawing
    "pdf.fonttype": 42,  # journals refuse Type 3
}


class _Style(NamedTuple):
    label: str
    colour: str
    mark: str
    filled: bool = True
    dashes: tuple[float, ...] = ()  # of the line, in line widths; none is solid


# In the order in which legends list them.
_ARMS = {
    "sequential": _Style("sequential", _BLACK, "o"),
    "strong": _Style("strong", _GREY, "P"),
    "weak": _Style("weak", _VERMILLION, "s"),
    "weak_linear": _Style("weak, linear", _ORANGE, "^"),
    "weak_linear_warmup": _Style("weak, linear, warm-up", _ORANGE, "v", False, (5, 1.5)),
    "weak_sqrt": _Style("weak, square root", _SKY, "D"),
    "weak_sqrt_adam": _Style("weak, square root, Adam", _SKY, "d", False, (5, 1.5)),
    "weak_lars": _Style("weak, LARS", _GREEN, ">"),
    "weak_lamb": _Style("weak, LAMB", _GREEN, "<", False, (5, 1.5)),
    "weak_adascale": _Style("weak, AdaScale", _PURPLE, "X"),
    "weak_tuned": _Style("weak, tuned", _BLUE, "*"),
    "sequential_tuned": _Style("sequential, tuned", _BLACK, "o", False, (5, 1.5)),
}
ARMS = tuple(_ARMS)
_OTHERS = [("s", _BLUE), ("o", _VERMILLION), ("D", _GREEN), ("^", _PURPLE), ("v", _ORANGE), ("P", _SKY), ("X", _GREY)]
_PREDICTED = (2.5, 1.5)

# Points of a curve, at most.
_GRID = 300


@dataclass(frozen=True)
class Point:
    """One mark, and its bar.

    Attributes:
        x, y: where it is. A y that is not finite is shown as such, not left out.
        low, high: ends of its interval; not finite for none.
    """

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Series:
    """Marks that belong together.

    Attributes:
        name: the legend's. An arm's name is put into words.
        points: in any order.
        arm: whose colour, mark and line it has; "" for that of `name`, or of nobody if that is no arm.
        dashed: predicted, not measured.
        world_size: the panel of `over_sizes` it is drawn in; 0 in the other figures.
    """

    name: str
    points: Sequence[Point]
    arm: str = ""
    dashed: bool = False
    world_size: int = 0


@dataclass(frozen=True)
class Level:
    """A line across the drawing, with a band if it has finite ends."""

    value: float
    name: str
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Curve:
    """What one run measured along its way.

    Attributes:
        x, y: (n,) each, x rising. The curve ends before its first y that is not finite.
        broken: the run stopped being finite where the curve ends.
    """

    x: Sequence[float]
    y: Sequence[float]
    broken: bool = False


@dataclass(frozen=True)
class Group:
    """The curves of one arm, one a seed. `name` and `arm` as in `Series`."""

    name: str
    curves: Sequence[Curve]
    arm: str = ""


_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def _drawn(make: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Runs a function with our settings in matplotlib's place, for as long as it takes."""

    @functools.wraps(make)
    def within(*arguments: _Given.args, **named: _Given.kwargs) -> _Made:
        with _settings():
            return make(*arguments, **named)

    return within


@contextmanager
def _settings() -> Iterator[None]:
    try:
        import matplotlib.style
    except ImportError as error:
        raise UserError(f"The figures of a study need matplotlib ({error}): pip install -e .[study]") from None
    with matplotlib.style.context(["default", _RC]):
        yield


# ---- the figures ---------------------------------------------------------------------------------------------------


@_drawn
def over_world_sizes(
    title: str,
    label: str,
    series: Sequence[Series],
    reference: Level | None = None,
    target: Level | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A quantity over W by arm, with intervals.

    Args:
        title: above the drawing.
        label: the quantity and its unit.
        series: x is W, at least 1.
        reference: the sequential runs: a line, and a band of their interval.
        target: a dashed line.
        limits: the range of the quantity, for one that has ends; points beyond are marked at the edge.
    """
    figure, (axes,) = _figure(title, label)
    levels = [level for level in (reference, target) if level is not None]
    low, high = limits or _view([p for s in series for p in s.points], levels)
    # Marks at the ends stay whole.
    room = 0.04 * (high - low) if limits else 0.0
    axes.set_ylim(low - room, high + room)
    if reference is not None:
        _level(axes, reference, _BLACK, "solid")
    if target is not None:
        _level(axes, target, _GREY, (0, (4, 3)))
    _world_size_axis(axes, {p.x for s in series for p in s.points})
    _marks(axes, series, apart=True)
    _legend(figure, [axes])
    return figure


@_drawn
def loss_curves(title: str, label: str, groups: Sequence[Group], x_label: str = "epochs") -> Figure:
    """The median over seeds of a quantity along the runs, in a band from the smallest to the largest.

    A run that stopped being finite counts as infinite from there on, so that those that are left do not look too good;
    a cross shows where it stopped.

    Args:
        title: above the drawing.
        label: the quantity and its unit.
        groups: arms, each with one curve a seed; lengths and samplings may differ.
        x_label: what the curves' x counts.
    """
    figure, (axes,) = _figure(title, label, x_label)
    styles = _styles([(g.name, g.arm) for g in groups])
    lines = [_across_seeds(group.curves) for group in groups]
    low, high, log = _curve_view(lines)
    axes.set_yscale("log" if log else "linear")
    axes.set_ylim(low, high)
    if log:
        _plain(axes.yaxis)
    top = 10 * abs(high)  # far enough; what is infinite cannot be drawn
    for place, (line, style) in enumerate(zip(lines, styles)):
        axes.fill_between(line.x, line.low, np.minimum(line.high, top), color=style.colour, alpha=0.15, linewidth=0)
        middle = np.where(np.isfinite(line.middle), np.minimum(line.middle, top), np.nan)
        every = max(1, len(line.x) // 6)
        marked = (place * every // len(groups), every)
        axes.plot(line.x, middle, label=style.label, markevery=marked, zorder=3 + place / 100, **_look(style))
        _cross(axes, [x for x, _ in line.ends], [min(y, high) for _, y in line.ends], style.colour)
    if any(line.ends for line in lines):
        _cross(axes, [], [], _GREY, label="not finite from here")
    _legend(figure, [axes])
    return figure


@_drawn
def speed_up(title: str, measured: Sequence[Point], predicted: Sequence[Point] = ()) -> Figure:
    """Speed-up over W, T1 / TW, and strong efficiency, T1 / (W TW), side by side.

    Args:
        title: above the drawing.
        measured: x is W, y the speed-up, low and high its spread over runs.
        predicted: the same, of a model of the machine; dashed.
    """
    figure, axes = _figure(title, "", panels=2)
    sizes = {p.x for p in (*measured, *predicted)} | {1.0}
    both = (("measured", measured, False), ("predicted", predicted, True))
    kinds = [(name, points, dashed) for name, points, dashed in both if points]
    for panel, label in zip(axes, ("speed-up, T1 / TW", "efficiency, T1 / (W TW)")):
        share = panel is axes[1]
        panel.set_ylabel(label)
        ideal = [1.0 if share else x for x in sorted(sizes)]
        panel.plot(sorted(sizes), ideal, color=_BLACK, lw=0.9, ls=(0, (1, 2)), label="ideal")
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
            _plain(panel.yaxis, [2.0**k for k in range(-6, 20)])
        _world_size_axis(panel, sizes)
        _marks(panel, series)
    _legend(figure, axes, below=True)
    return figure


@_drawn
def noise_scale(title: str, curves: Sequence[Curve], marks: Sequence[Level] = ()) -> Figure:
    """The gradient noise scale along the sequential runs, in samples: the median over seeds, in a band of all.

    Args:
        title: above the drawing.
        curves: one a seed: x in epochs, y in samples. An unbiased estimate may be negative: it counts in the median,
            and the line has a gap where that is negative.
        marks: batches worth a line, in samples.
    """
    figure, (axes,) = _figure(title, "gradient noise scale (samples)", "epochs")
    axes.set_yscale("log")
    kept = [[(x, y) for x, y in zip(c.x, c.y) if math.isfinite(y)] for c in curves]
    line = _across_seeds([Curve([x for x, _ in pairs], [y for _, y in pairs]) for pairs in kept])
    marks = [mark for mark in marks if math.isfinite(mark.value) and mark.value > 0]
    low, high = _log_view([*line.low, *line.middle, *line.high, *(mark.value for mark in marks)])
    axes.set_ylim(low, high)
    ends = (np.clip(end, low / 2, high * 2) for end in (line.low, line.high))
    axes.fill_between(line.x, *ends, color=_BLUE, alpha=0.2, linewidth=0, label="all seeds")
    middle = np.where(line.middle > 0, np.minimum(line.middle, high * 2), np.nan)
    alone = "o" if len(line.x) == 1 else ""
    axes.plot(line.x, middle, color=_BLUE, label="median over seeds", marker=alone)
    for mark in marks:
        axes.axhline(mark.value, color=_GREY, lw=0.9, ls=(0, (4, 3)))
    _beside(axes, [(mark.value, mark.name) for mark in marks])
    _plain(axes.yaxis)
    if len(line.x):
        axes.legend(loc="best")
    else:
        axes.set_xticks([])
    return figure


@_drawn
def over_sizes(title: str, label: str, series: Sequence[Series], margin: float | None = None) -> Figure:
    """The difference to sequential over the number of training samples, a panel for each W.

    Args:
        title: above the drawing.
        label: the difference and its unit.
        series: x in training samples; `world_size` is the panel.
        margin: with its sign, the difference from which on a loss matters: -0.01 of an accuracy, +0.01 of a loss.
    """
    sizes = sorted({s.world_size for s in series})
    figure, panels = _figure(title, label, "training samples", panels=max(1, len(sizes)))
    levels = [Level(0.0, "")] + ([Level(margin, "")] if margin is not None else [])
    low, high = _view([p for s in series for p in s.points], levels)
    ticks = sorted({p.x for s in series for p in s.points if p.x > 0})
    for panel, size in zip(panels, sizes or [0]):
        panel.set_xscale("log")
        panel.set_ylim(low, high)
        panel.axhline(0, color=_BLACK, lw=0.9)
        if margin is not None:
            panel.axhline(margin, color=_GREY, lw=0.9, ls=(0, (4, 3)), label="margin")
        if size:
            panel.set_title(f"W = {size}", fontsize=8.5, loc="center")
        _plain(panel.xaxis, _sparse(ticks, 3 if len(panels) > 1 else 6))
        if ticks:
            panel.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
        _marks(panel, [s for s in series if s.world_size == size], apart=True)
    _legend(figure, panels, below=True)
    return figure


@_drawn
def trials(title: str, label: str, series: Sequence[Series]) -> Figure:
    """The time to the best configuration over the number of trials, by how devices are shared out.

    Args:
        title: above the drawing.
        label: the time and its unit.
        series: x is the number of trials, y the time, both above 0; dashed where predicted.
    """
    figure, (axes,) = _figure(title, label, "trials")
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({p.x for s in series for p in s.points if p.x > 0})
    axes.set_ylim(*_log_view(v for s in series for p in s.points for v in (p.y, p.low, p.high)))
    if ticks:
        axes.set_xlim(ticks[0] / 1.2, ticks[-1] * 1.2)
    _plain(axes.xaxis, _sparse(ticks, 10))
    _plain(axes.yaxis)
    # The best mix is often one of the others.
    _marks(axes, series, nested=True)
    _legend(figure, [axes])
    return figure


# ---- files ---------------------------------------------------------------------------------------------------------


@_drawn
def save(figure: Figure, folder: Path, name: str) -> str:
    """Writes <folder>/<name>.svg and .pdf, each at once, and returns the text of the SVG."""
    # Laid out once: a second time would move by a rounding error, and the ids follow from the places.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    title = figure.get_suptitle()
    svg = _rendered(figure, "svg", {"Title": title, "Date": None, "Creator": None, "Format": None, "Type": None})
    # What matplotlib leaves there would make a reader of the file name an address that it never asks for.
    pdf = _rendered(figure, "pdf", {"Title": title, "CreationDate": None, "Creator": None, "Producer": None})
    folder.mkdir(parents=True, exist_ok=True)
    for data, ending in ((svg, "svg"), (pdf, "pdf")):
        file = folder / f"{name}.{ending}"
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        write_synced(temporary, data)
        os.replace(temporary, file)
    return svg.decode()


def _rendered(figure: Figure, kind: str, metadata: Mapping[str, str | None]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata=dict(metadata))
    return stream.getvalue()


def data_uri(svg: str) -> str:
    """An SVG as the address of an <img>: there, the ids of several figures in one page never meet."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


# ---- parts ---------------------------------------------------------------------------------------------------------


def _figure(title: str, label: str, x_label: str = "", panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, and its panels, at most three in a row, which share `label`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure((_WIDTH, _HEIGHT + 1.7 * (rows - 1)), layout="constrained")
    figure.suptitle(title, fontsize=9, x=0.012, ha="left")
    grid = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for i, axes in enumerate(grid):
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10]))
        if i % columns == 0:
            axes.set_ylabel(label)
        elif label:
            axes.tick_params(labelleft=False)
    return figure, grid


def _styles(names: Iterable[tuple[str, str]]) -> list[_Style]:
    """The style of each (name, arm); who is no arm gets one by its place among the others."""
    others: dict[str, int] = {}
    styles = []
    for name, arm in names:
        known = _ARMS.get(arm or name)
        if known is None:
            place = others.setdefault(arm or name, len(others))
            mark, colour = _OTHERS[place % len(_OTHERS)]
            known = _Style(name, colour, mark, place // len(_OTHERS) % 2 == 0)
        styles.append(known if name in _ARMS else known._replace(label=name))
    return styles


def _look(style: _Style, dashed: bool = False) -> dict[str, Any]:
    """What a line of this style is drawn with."""
    dashes = _PREDICTED if dashed else style.dashes
    return {
        "color": style.colour,
        "marker": style.mark,
        "markersize": {"*": 7.5, "X": 6, "P": 6, "o": 5, "s": 4.6, "D": 4.4}.get(style.mark, 5.4),
        "markerfacecolor": style.colour if style.filled else "white",
        "markeredgewidth": 0.6 if style.filled else 1.1,
        "markeredgecolor": "white" if style.filled else style.colour,
        "linestyle": (0, dashes) if dashes else "solid",
    }


def _marks(axes: Axes, series: Sequence[Series], apart: bool = False, nested: bool = False) -> None:
    """Series as marks with bars, joined.

    `apart` shifts each a little, so that bars do not cover one another; `nested` draws each wider than those on top of
    it, so that lines do not.

    The view is as wide as it is: what lies beyond it is an arrow at the edge, and what is not finite a cross.
    """
    low, high = axes.get_ylim()
    styles = _styles([(s.name, s.arm) for s in series])
    shifts = _shifts(len(series), {p.x for s in series for p in s.points}) if apart else [1.0] * len(series)
    edges = axes.get_xaxis_transform()
    beyond = broken = False
    for place, (one, style, shift) in enumerate(zip(series, styles, shifts)):
        points = sorted((p for p in one.points if p.x > 0), key=lambda p: p.x)
        xs, ys = (
            [p.x * shift for p in points],
            [min(max(p.y, low), high) if math.isfinite(p.y) else math.nan for p in points],
        )
        inside = [i for i, p in enumerate(points) if low <= p.y <= high]
        more: dict[str, Any] = {"color": style.colour, "zorder": 3 + place / 100}
        look = _look(style, one.dashed)
        if nested:
            below = len(series) - 1 - place
            look |= {"linewidth": 1.3 + 1.1 * below, "markersize": look["markersize"] + 1.5 * below}
        axes.plot(xs, ys, markevery=inside, label=style.label, zorder=more["zorder"], **look)
        for p, x in zip(points, xs):
            if not math.isfinite(p.y):
                broken = True
                _cross(axes, [x], [0.03], style.colour, transform=edges)
                continue
            if math.isfinite(p.low) and math.isfinite(p.high) and p.high >= low and p.low <= high:
                ends = [max(p.low, low), min(p.high, high)]
                axes.plot([x, x], ends, lw=1.1, solid_capstyle="butt", **more)
            if not low <= p.y <= high:
                beyond, up = True, p.y > high
                axes.plot(
                    [x], [up], marker=6 if up else 7, transform=edges, ms=6, clip_on=False, in_layout=False, **more
                )
    if beyond:
        axes.plot([], [], ls="none", marker=6, color=_GREY, ms=6, in_layout=False, label="beyond the axis")
    if broken:
        _cross(axes, [], [], _GREY, label="not finite")


def _cross(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, **more: Any) -> None:
    # Out of the layout, which would make room for what is not clipped, on every side.
    more |= {"clip_on": False, "in_layout": False, "zorder": 4}
    axes.plot(x, y, ls="none", marker="x", color=colour, ms=5.5, mew=1.5, **more)


def _shifts(count: int, xs: Iterable[float]) -> list[float]:
    """(count,) factors of x on a logarithmic axis, together about half of the narrowest gap at most."""
    places = sorted(math.log2(x) for x in xs if x > 0)
    gap = min((1.0, *(b - a for a, b in itertools.pairwise(places))))  # in octaves
    step = min(0.09 * gap, 0.56 * gap / max(1, count - 1))
    return [2.0 ** (step * (i - (count - 1) / 2)) for i in range(count)]


def _view(points: Iterable[Point], levels: Iterable[Level]) -> tuple[float, float]:
    """The range to show. What is a thousand times off would make a line of all the rest, and is left outside."""
    fixed = [v for level in levels for v in (level.value, level.low, level.high) if math.isfinite(v)]
    values = [p.y for p in points if math.isfinite(p.y)]
    ends = [v for p in points for v in (p.low, p.high) if math.isfinite(v) and math.isfinite(p.y)]
    sizes = sorted(abs(v) for v in [*fixed, *values] if v)
    most = 1000 * sizes[(len(sizes) - 1) // 2] if sizes else 1.0
    if fixed and max(map(abs, fixed)) > 0:
        most = max(1000 * max(map(abs, fixed)), most if not values else 0.0)
    shown = [v for v in [*fixed, *values, *ends] if abs(v) <= most]
    if not shown:
        return 0.0, 1.0
    low, high = min(shown), max(shown)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


class _Line(NamedTuple):
    """Curves of one group on one grid, each part (n,), and where curves broke off."""

    x: Any
    middle: Any
    low: Any
    high: Any
    ends: list[tuple[float, float]]


def _across_seeds(curves: Sequence[Curve]) -> _Line:
    """The median, least and greatest of curves on a common grid; a curve that broke off is infinite from there on."""
    parts: list[tuple[Any, Any, bool]] = []
    for curve in curves:
        x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
        bad = np.flatnonzero(~np.isfinite(y))
        end = int(bad[0]) if len(bad) else len(y)
        if end:
            parts.append((x[:end], y[:end], curve.broken or end < len(y)))
    if not parts:
        nothing = np.zeros(0)
        return _Line(nothing, nothing, nothing, nothing, [])
    grid = np.unique(np.concatenate([x for x, _, _ in parts]))
    if len(grid) > _GRID:
        grid = np.linspace(grid[0], grid[-1], _GRID)
    values = np.array([np.interp(grid, x, y, np.nan, np.inf if broken else np.nan) for x, y, broken in parts])
    # Before its first value and after its last one, a curve has no part in the median.
    known = np.any(np.isfinite(values), axis=0)
    grid, values = grid[known], values[:, known]
    ends = [(float(x[-1]), float(y[-1])) for x, y, broken in parts if broken]
    return _Line(grid, _median(values), np.nanmin(values, axis=0), np.nanmax(values, axis=0), ends)


def _median(values: Any) -> Any:
    """(n,) medians of the columns of (k, n) values that are no nan; infinite where half of them are."""
    columns = (np.sort(column[~np.isnan(column)]) for column in values.T)
    return np.array([(c[(len(c) - 1) // 2] + c[len(c) // 2]) / 2 for c in columns])


def _curve_view(lines: Sequence[_Line]) -> tuple[float, float, bool]:
    """(low, high, whether logarithmic) of an axis for curves; one that explodes leaves it."""
    seen = [float(v) for line in lines for v in (*line.middle, *line.low, *line.high) if math.isfinite(v)]
    if not seen:
        return 0.0, 1.0, False
    most = 1000 * (sorted(map(abs, seen))[len(seen) // 2] or 1.0)
    shown = [v for v in seen if abs(v) <= most]
    low, high = min(shown), max(shown)
    if low > 0 and high > 10 * low:
        return low / 1.2, high * 1.2, True
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room, False


def _log_view(values: Iterable[float]) -> tuple[float, float]:
    """The range to show on a logarithmic axis: what is above 0, but for what is a million times off."""
    known = sorted(v for v in values if math.isfinite(v) and v > 0)
    shown = [v for v in known if known[len(known) // 2] / 1e6 <= v <= known[len(known) // 2] * 1e6] or [1.0]
    return shown[0] / 1.4, min(shown[-1], 1e200) * 1.4


def _level(axes: Axes, level: Level, colour: str, dashes: Any) -> None:
    if math.isfinite(level.low) and math.isfinite(level.high):
        axes.axhspan(level.low, level.high, color=colour, alpha=0.12, linewidth=0, zorder=1)
    if math.isfinite(level.value):
        axes.axhline(level.value, color=colour, lw=0.9, ls=dashes, label=level.name, zorder=2)


def _world_size_axis(axes: Axes, sizes: Iterable[float]) -> None:
    """Logarithmic, with a tick at each W."""
    ticks = sorted(size for size in sizes if size > 0) or [1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 2**0.5, ticks[-1] * 2**0.5)
    axes.set_xlabel("W, ranks")
    _plain(axes.xaxis, ticks)


def _plain(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Numbers as people write them, in place of powers, on a logarithmic axis; at `ticks`, if given."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    if ticks is not None:
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
    else:
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _sparse(ticks: Sequence[float], most: int) -> list[float]:
    """At most `most` of the ticks, evenly taken, the ends among them."""
    if len(ticks) <= most:
        return list(ticks)
    return [ticks[round(i * (len(ticks) - 1) / (most - 1))] for i in range(most)]


def _beside(axes: Axes, names: Iterable[tuple[float, str]]) -> None:
    """Names of lines across, at the right of the drawing and clear of one another."""
    low, high = (math.log(v) for v in axes.get_ylim())
    last = -1.0
    for value, name in sorted(names):
        last = max((math.log(value) - low) / (high - low), last + 0.06)
        axes.annotate(
            name, (1, last), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color="#333333", annotation_clip=False,
        )  # fmt: skip


def _legend(figure: Figure, panels: Sequence[Axes], below: bool = False) -> None:
    """One legend for all panels, outside of them."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            found.setdefault(label, handle)
    if not found:
        return
    columns = min(len(found), 4 if max(map(len, found)) < 20 else 3) if below else 1
    where: Literal["outside lower center", "outside right upper"]
    where = "outside lower center" if below else "outside right upper"
    figure.legend(list(found.values()), list(found), loc=where, ncols=columns)
