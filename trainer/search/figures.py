"""The figures of a search: its history, its curves, the importance of keys, and slices through what was tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..study.drawing import BLACK, BLUE, GREY, draw_cross, draw_legend, drawn, empty_figure, plain_numbers
from .results import best_of
from .space import Parameter, same, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BEST = "#d55e00"
_MARK = {"ls": "none", "marker": "o", "ms": 4.5, "mew": 0.5, "mec": "white"}
_HOLLOW = _MARK | {"mfc": "white", "mec": GREY, "mew": 1.0}


def last_value(trial: Mapping[str, Any], metric: str) -> float:
    """The metric of a trial. If it was ended early, its last value; nan if there is none, as for a failed trial."""
    if trial["value"] is not None:
        return float(trial["value"])
    values = [v for v in (trial.get("curves") or {}).get(metric, {}).get("value", ()) if v is not None]
    return float(values[-1]) if values and trial["state"] == "pruned" else math.nan


@drawn
def history(trials: Sequence[Mapping[str, Any]], metric: str, mode: str) -> Figure:
    """The metric over the number of the trial, and the best so far."""
    figure, (axes,) = empty_figure("History", f"validation {metric}", "trial")
    _view(axes, [last_value(t, metric) for t in trials], mode)
    _marks(axes, trials, [t["number"] + 1.0 for t in trials], metric, mode)
    known = [t for t in trials if t["state"] == "complete"]
    if known:
        steps = list(itertools.accumulate((t["value"] for t in known), max if mode == "max" else min))
        xs = [t["number"] + 1 for t in known]
        axes.plot([*xs, trials[-1]["number"] + 1], [*steps, steps[-1]], color=BLACK, lw=1, drawstyle="steps-post",
                  label="best so far", zorder=2)  # fmt: skip
    axes.set_xlim(0.5, trials[-1]["number"] + 1.5)
    draw_legend(figure, [axes])
    return figure


@drawn
def curves(trials: Sequence[Mapping[str, Any]], metric: str, mode: str) -> Figure:
    """The metric over the epochs, a line for each trial."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = empty_figure("Validation by epoch", f"validation {metric}", "epoch")
    _view(axes, [v for t in trials for v in _curve(t, metric)[1]], mode)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    best = best_of(trials, mode)
    names = {
        "complete": ("finished", BLUE, 0.5),
        "pruned": ("ended early", GREY, 0.7),
        "failed": ("failed", BLACK, 0.7),
    }
    told: set[str] = set()
    for trial in trials:
        x, y = _curve(trial, metric)
        if not x:
            continue
        name, colour, alpha = names[trial["state"]]
        look: dict[str, Any] = {"color": colour, "alpha": alpha, "lw": 1.0, "zorder": 2}
        if trial is best:
            name, look = "the best", {"color": _BEST, "lw": 2.0, "zorder": 4}
        label = name if name not in told else "_"
        told.add(name)
        axes.plot(x, y, marker="." if len(x) == 1 or trial["state"] == "pruned" else None, markevery=[len(x) - 1],
                  label=label, **look)  # fmt: skip
    draw_legend(figure, [axes])
    return figure


@drawn
def importance(shares: Mapping[str, float]) -> Figure:
    """The share of the metric's variance that each key explains."""
    names = sorted(shares, key=lambda name: shares[name])
    figure, (axes,) = empty_figure("Importance of the keys (fANOVA)", "", "share of the variance over the trials")
    axes.barh(range(len(names)), [shares[name] for name in names], color=BLUE, height=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.grid(False)
    axes.set_xlim(0, 1)
    for place, name in enumerate(names):
        axes.annotate(
            f"{shares[name]:.2f}", (shares[name], place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    return figure


@drawn
def slices(parameters: Sequence[Parameter], trials: Sequence[Mapping[str, Any]], metric: str, mode: str) -> Figure:
    """The metric over each key's values, a panel for each."""
    figure, panels = empty_figure("Slices", f"validation {metric}", panels=len(parameters))
    everything = [last_value(t, metric) for t in trials]
    for axes, parameter in zip(panels, parameters):
        _view(axes, everything, mode)
        axes.set_xlabel(parameter.name)
        own = [t for t in trials if parameter.key in t["point"]]
        values = [t["point"][parameter.key] for t in own]
        if parameter.choices:
            xs = [float(next(i for i, c in enumerate(parameter.choices) if same(c, v))) for v in values]
            # Marks of the same choice stand side by side. The offset comes from the trial's number and not from chance,
            # so a page that is made again is the same. 0.618 (of the golden ratio) keeps successive numbers apart.
            xs = [x + ((t["number"] * 0.618) % 1 - 0.5) * 0.36 for x, t in zip(xs, own)]
            labels = [shown(choice) for choice in parameter.choices]
            axes.set_xticks(range(len(labels)), [t if len(t) < 15 else f"{t[:13]}..." for t in labels])
            axes.set_xlim(-0.5, len(labels) - 0.5)
            if sum(map(len, labels)) > 24:
                axes.tick_params(axis="x", labelrotation=30)
        else:
            xs = [float(value) for value in values]
            if parameter.log:
                axes.set_xscale("log")
                axes.set_xlim(parameter.low / 1.15, parameter.high * 1.15)
                plain_numbers(axes.xaxis)
            else:
                room = 0.05 * (parameter.high - parameter.low)
                axes.set_xlim(parameter.low - room, parameter.high + room)
        _marks(axes, own, xs, metric, mode)
    draw_legend(figure, panels, below=True)
    return figure


def _curve(trial: Mapping[str, Any], metric: str) -> tuple[list[float], list[float]]:
    curve = (trial.get("curves") or {}).get(metric, {})
    pairs = [
        (e, v) for e, v in zip(curve.get("epoch", ()), curve.get("value", ())) if v is not None and math.isfinite(v)
    ]
    return [e for e, _ in pairs], [v for _, v in pairs]


def _view(axes: Axes, values: Sequence[float], mode: str) -> None:
    """Sets the range of the metric's axis. Outliers at the bad end are left out."""
    known = sorted(v for v in values if math.isfinite(v))
    if not known:
        return
    low, high = known[0], known[-1]
    middle = known[len(known) // 2]
    # One trial that diverged, to a loss of 1e6, would squeeze all others into a line. So the good end is always shown,
    # and the bad end up to 20 times the distance from the best value to the middle one.
    if mode == "min" and high - low > 20 * (middle - low) > 0:
        high = low + 20 * (middle - low)
    if mode == "max" and high - low > 20 * (high - middle) > 0:
        low = high - 20 * (high - middle)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _marks(axes: Axes, trials: Sequence[Mapping[str, Any]], xs: Sequence[float], metric: str, mode: str) -> None:
    """A mark for each trial: finished, ended early (its last value), failed (a cross below), and the best."""
    best = best_of(trials, mode)
    low, high = axes.get_ylim()

    def places(state: str) -> tuple[list[float], list[float]]:
        found = [(x, min(max(last_value(t, metric), low), high)) for x, t in zip(xs, trials) if t["state"] == state]
        return [x for x, _ in found], [y for _, y in found]

    if any(t["state"] == "pruned" for t in trials):
        axes.plot(*places("pruned"), label="ended early, last value", zorder=3, **_HOLLOW)  # type: ignore[arg-type]
    axes.plot(*places("complete"), label="finished", color=BLUE, zorder=3.5, **_MARK)  # type: ignore[arg-type]
    failed = [x for x, t in zip(xs, trials) if t["state"] == "failed"]
    if failed:
        draw_cross(axes, failed, [0.03] * len(failed), BLACK, label="failed", transform=axes.get_xaxis_transform())
    for x, trial in zip(xs, trials):
        if trial is best:
            axes.plot([x], [trial["value"]], ls="none", marker="*", ms=10, color=_BEST, mec="white", mew=0.5,
                      label="the best", zorder=5)  # fmt: skip
