"""How anything in a study's figures is drawn: styles of arms, panels, axes, marks, levels and legends.

An arm looks the same in every figure. Colour stands for a family of arms, and the mark and the line for the member, so
that figures can be read without colour too.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np

from ..errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Inches: the width of a page's text. In one of two columns a figure has half of this, so no text is below 8 points.
_WIDTH, _HEIGHT = 6.5, 3.6

BLACK, GREY = "#000000", "#6e6e6e"
# Okabe and Ito's palette without its yellow, which is hard to see on white.
_ORANGE, _SKY, _GREEN, BLUE, _VERMILLION, _PURPLE = "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7"

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
    "sequential": _Style("sequential", BLACK, "o"),
    "strong": _Style("strong", GREY, "P"),
    "weak": _Style("weak", _VERMILLION, "s"),
    "weak_linear": _Style("weak, linear", _ORANGE, "^"),
    "weak_linear_warmup": _Style("weak, linear, warm-up", _ORANGE, "v", False, (5, 1.5)),
    "weak_sqrt": _Style("weak, square root", _SKY, "D"),
    "weak_sqrt_adam": _Style("weak, square root, Adam", _SKY, "d", False, (5, 1.5)),
    "weak_lars": _Style("weak, LARS", _GREEN, ">"),
    "weak_lamb": _Style("weak, LAMB", _GREEN, "<", False, (5, 1.5)),
    "weak_adascale": _Style("weak, AdaScale", _PURPLE, "X"),
    "weak_tuned": _Style("weak, tuned", BLUE, "*"),
    "sequential_tuned": _Style("sequential, tuned", BLACK, "o", False, (5, 1.5)),
    "sequential_lars": _Style("sequential, LARS", BLACK, ">", False, (4, 1, 1, 1)),
    "sequential_lamb": _Style("sequential, LAMB", BLACK, "<", False, (1, 1)),
    "sequential_equal_updates": _Style("sequential, as few updates", GREY, "X", True, (3, 1.2)),
    "sequential_tuned_equal_updates": _Style("sequential, tuned, as few updates", GREY, "X", False, (1, 1)),
}
ARMS = tuple(_ARMS)
_OTHERS = [("s", BLUE), ("o", _VERMILLION), ("D", _GREEN), ("^", _PURPLE), ("v", _ORANGE), ("P", _SKY), ("X", GREY)]
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
        arm: whose colour, mark and line it has; "" for those of the arm called `name`. If there is none, its own.
        dashed: predicted, not measured.
        world_size: the panel of `over_sizes` it is drawn in; 0 in the other figures.
        hollow: draws hollow marks, for a series that accompanies another one of the same style.
    """

    name: str
    points: Sequence[Point]
    arm: str = ""
    dashed: bool = False
    world_size: int = 0
    hollow: bool = False


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


def drawn(make: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Runs a function with our settings of matplotlib instead of the user's."""

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
        raise UserError(
            f'The figures of a study need matplotlib ({error}): pip install "strong-scaling-trainer[study]"'
        ) from None
    with matplotlib.style.context(["default", _RC]):
        yield


def empty_figure(title: str, label: str, x_label: str = "", panels: int = 1) -> tuple[Figure, list[Axes]]:
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


def styles_of(names: Iterable[tuple[str, str]]) -> list[_Style]:
    """The style of each (name, arm). A name that is no arm gets a style by its position among the others."""
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


def look_of(style: _Style, dashed: bool = False) -> dict[str, Any]:
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


def draw_marks(
    axes: Axes,
    series: Sequence[Series],
    apart: bool = False,
    nested: bool = False,
    infinite: tuple[float, str] = (0.03, "not finite"),
) -> None:
    """Series as marks with bars, joined.

    The view does not grow. What lies beyond it is drawn as an arrow at the edge, and what is not finite as a cross.

    Args:
        axes: where to draw; its range of y is set before.
        series: what to draw.
        apart: shift each series a little, so that bars do not cover one another.
        nested: draw each series wider than those on top of it, so that lines do not cover one another.
        infinite: the height of a cross, as a share of the axes' height, and its name in the legend.
    """
    low, high = axes.get_ylim()
    styles = styles_of([(s.name, s.arm) for s in series])
    moved = shifts(len(series), {p.x for s in series for p in s.points}) if apart else [1.0] * len(series)
    edges = axes.get_xaxis_transform()
    beyond = broken = False
    for place, (one, style, shift) in enumerate(zip(series, styles, moved)):
        points = sorted((p for p in one.points if p.x > 0), key=lambda p: p.x)
        xs, ys = (
            [p.x * shift for p in points],
            [min(max(p.y, low), high) if math.isfinite(p.y) else math.nan for p in points],
        )
        inside = [i for i, p in enumerate(points) if low <= p.y <= high]
        more: dict[str, Any] = {"color": style.colour, "zorder": 3 + place / 100}
        look = look_of(style._replace(filled=style.filled and not one.hollow), one.dashed)
        if nested:
            below = len(series) - 1 - place
            look |= {"linewidth": 1.3 + 1.1 * below, "markersize": look["markersize"] + 1.5 * below}
        axes.plot(xs, ys, markevery=inside, label=style.label, zorder=more["zorder"], **look)
        for p, x in zip(points, xs):
            if not math.isfinite(p.y):
                broken = True
                draw_cross(axes, [x], [infinite[0]], style.colour, transform=edges)
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
        axes.plot([], [], ls="none", marker=6, color=GREY, ms=6, in_layout=False, label="beyond the axis")
    if broken:
        draw_cross(axes, [], [], GREY, label=infinite[1])


def draw_cross(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, **more: Any) -> None:
    """Crosses at places that stand for what is not finite."""
    # Not in the layout: it would make room on every side for what is not clipped.
    more |= {"clip_on": False, "in_layout": False, "zorder": 4}
    axes.plot(x, y, ls="none", marker="x", color=colour, ms=5.5, mew=1.5, **more)


def shifts(count: int, xs: Iterable[float]) -> list[float]:
    """(count,) factors of x on a logarithmic axis, together about half of the narrowest gap at most."""
    places = sorted(math.log2(x) for x in xs if x > 0)
    gap = min((1.0, *(b - a for a, b in itertools.pairwise(places))))  # in octaves
    step = min(0.09 * gap, 0.56 * gap / max(1, count - 1))
    return [2.0 ** (step * (i - (count - 1) / 2)) for i in range(count)]


def view_of(points: Iterable[Point], levels: Iterable[Level]) -> tuple[float, float]:
    """The range to show. It leaves out values a thousand times off, which would squeeze all others into one line."""
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


class Line(NamedTuple):
    """Curves of one group on one grid, each part (n,), and where curves broke off."""

    x: Any
    middle: Any
    low: Any
    high: Any
    ends: list[tuple[float, float]]


def across_seeds(curves: Sequence[Curve]) -> Line:
    """The median, least and greatest of curves on a common grid. A curve that broke off is infinite from there on."""
    parts: list[tuple[Any, Any, bool]] = []
    for curve in curves:
        x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
        bad = np.flatnonzero(~np.isfinite(y))
        end = int(bad[0]) if len(bad) else len(y)
        if end:
            parts.append((x[:end], y[:end], curve.broken or end < len(y)))
    if not parts:
        nothing = np.zeros(0)
        return Line(nothing, nothing, nothing, nothing, [])
    grid = np.unique(np.concatenate([x for x, _, _ in parts]))
    if len(grid) > _GRID:
        grid = np.linspace(grid[0], grid[-1], _GRID)
    values = np.array([np.interp(grid, x, y, np.nan, np.inf if broken else np.nan) for x, y, broken in parts])
    # Before its first value and after its last one, a curve has no part in the median.
    known = np.any(np.isfinite(values), axis=0)
    grid, values = grid[known], values[:, known]
    ends = [(float(x[-1]), float(y[-1])) for x, y, broken in parts if broken]
    return Line(grid, _median(values), np.nanmin(values, axis=0), np.nanmax(values, axis=0), ends)


def _median(values: Any) -> Any:
    """(n,) medians of the columns of (k, n) values that are no nan; infinite where half of them are."""
    columns = (np.sort(column[~np.isnan(column)]) for column in values.T)
    return np.array([(c[(len(c) - 1) // 2] + c[len(c) // 2]) / 2 for c in columns])


def curve_view(lines: Sequence[Line]) -> tuple[float, float, bool]:
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


def log_view(values: Iterable[float]) -> tuple[float, float]:
    """The range to show on a logarithmic axis: values above 0, without those that are a million times off."""
    known = sorted(v for v in values if math.isfinite(v) and v > 0)
    shown = [v for v in known if known[len(known) // 2] / 1e6 <= v <= known[len(known) // 2] * 1e6] or [1.0]
    return shown[0] / 1.4, min(shown[-1], 1e200) * 1.4


def draw_level(axes: Axes, level: Level, colour: str, dashes: Any) -> None:
    """A line across, and its band."""
    if math.isfinite(level.low) and math.isfinite(level.high):
        axes.axhspan(level.low, level.high, color=colour, alpha=0.12, linewidth=0, zorder=1)
    if math.isfinite(level.value):
        axes.axhline(level.value, color=colour, lw=0.9, ls=dashes, label=level.name, zorder=2)


def world_size_axis(axes: Axes, sizes: Iterable[float]) -> None:
    """Logarithmic, with a tick at each W."""
    ticks = sorted(size for size in sizes if size > 0) or [1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(ticks[0] / 2**0.5, ticks[-1] * 2**0.5)
    axes.set_xlabel("W, ranks")
    plain_numbers(axes.xaxis, ticks)


def plain_numbers(axis: Axis, ticks: Sequence[float] | None = None) -> None:
    """Plain numbers instead of powers on a logarithmic axis; at `ticks`, if given."""
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


def sparse(ticks: Sequence[float], most: int) -> list[float]:
    """At most `most` of the ticks, evenly taken, the ends among them."""
    if len(ticks) <= most:
        return list(ticks)
    return [ticks[round(i * (len(ticks) - 1) / (most - 1))] for i in range(most)]


def name_levels(axes: Axes, names: Iterable[tuple[float, str]]) -> None:
    """Names of lines across, at the right of the drawing and clear of one another."""
    low, high = (math.log(v) for v in axes.get_ylim())
    last = -1.0
    for value, name in sorted(names):
        last = max((math.log(value) - low) / (high - low), last + 0.06)
        axes.annotate(
            name, (1, last), xycoords="axes fraction", xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, color="#333333", annotation_clip=False,
        )  # fmt: skip


def draw_legend(figure: Figure, panels: Sequence[Axes], below: bool = False) -> None:
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
