"""The page of a cross-validation, for any browser. It has no script and loads nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..config.schema import read_json
from ..study.sheet import document, table
from .inference import Estimate
from .results import STATE, Results, classes_of, matrix
from .sentences import about, interval_text


def write_page(results: Results, confusions: Mapping[tuple[str, str], int]) -> Path:
    """Writes report.html into the folder of a cross-validation, with a figure if matplotlib is installed.

    Args:
        results: of all its runs.
        confusions: (target, prediction) -> how often, over all runs; empty if the task names no predictions.

    Returns:
        The path of report.html.
    """
    declared = results.declared
    state, task = read_json(declared.folder / STATE), declared.config.trainer.task
    shown = results.estimates.get(results.metric)
    parts = [f"<h1>Cross-validation: {escape(task)}</h1>"]
    if shown is not None:
        what = f"{results.metric} {interval_text(shown, declared.options.alpha)}"
        parts.append(f'<p class="verdict">{escape(what)}</p>')
    parts += [f"<p>{escape(line)}</p>" for line in about(results)]
    parts += _figure(results, shown)
    parts += ["<h2>Metrics</h2>", _estimates(results), "<h2>Every run</h2>", _runs(results)]
    names = classes_of(confusions, results.known)
    if names:
        parts += ["<h2>Confusions</h2>", _confusions(confusions, names, declared.options.repeats)]
    facts = ", ".join(f"{name} {value}" for name, value in results.known["facts"].items())
    parts += [
        "<h2>How it came about</h2>",
        f"<p><code>{escape(state['command'])}</code></p><p>{escape(facts)}</p>",
        "<details><summary>As declared</summary>"
        f"<pre>{escape(json.dumps(state['declared'], indent=2, ensure_ascii=False))}</pre></details>",
    ]
    path = declared.folder / "report.html"
    path.write_text(document(f"Cross-validation: {task}", parts), encoding="utf-8")
    return path


def _estimates(results: Results) -> str:
    rows: list[list[Any]] = [
        [name, e.mean, e.low, e.high, e.deviation, e.error, e.naive_error] for name, e in results.estimates.items()
    ]
    rows += [
        [name, None, None, None, f"not measured by {', '.join(map(str, places))}", None, None]
        for name, places in results.lacking.items()
    ]
    header = ["metric", "mean", "from", "to", "deviation of a run", "corrected error", "naive error (too small)"]
    return table(rows, header)


def _runs(results: Results) -> str:
    metrics = [*results.estimates, *results.lacking]
    rows: list[list[Any]] = []
    for place, run in results.runs.items():
        tested = results.known["fold_of"][place.repeat].count(place.fold)
        measured = [run["metrics"]["test"].get(name) for name in metrics]
        rows.append([place.repeat, place.fold, tested, *measured, run["steps"], run["exactness"]])
        rows[-1].append(run["parameters_sha256"])
    return table(rows, ["repeat", "fold", "tested", *metrics, "steps", "exactness", "parameters sha256"])


def _confusions(counts: Mapping[tuple[str, str], int], names: list[str], repeats: int) -> str:
    """The confusion matrix. A darker cell has a larger share of its row."""
    lines = []
    for name, row in zip(names, matrix(counts, names)):
        total = max(1, sum(row))
        cells = "".join(
            f'<td style="background: rgba(0, 114, 178, {0.75 * n / total:.3f})">{n:,}</td>' if n else "<td></td>"
            for n in row
        )
        lines.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    often = "once" if repeats == 1 else f"{repeats} times, once a repeat"
    return (
        f"<p>Rows are true classes, columns predicted ones. Each sample counts {often}, by the run that did not learn "
        f"from it.</p><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _figure(results: Results, estimate: Estimate | None) -> list[str]:
    """The metric of each run, with mean and interval; nothing if matplotlib is not installed."""
    if estimate is None or importlib.util.find_spec("matplotlib") is None:
        return []
    from ..study.album import Album

    album = Album(results.declared.folder / "figures")
    caption = f"{results.metric} of each run by fold; the line is the mean, the band its corrected interval"
    album.add("folds", _drawn(results, estimate), caption)
    return album.parts


def _drawn(results: Results, estimate: Estimate) -> Any:
    from ..study.drawing import BLACK, BLUE, Level, Point, draw_level, drawn, empty_figure, view_of

    @drawn
    def draw() -> Any:
        figure, (axes,) = empty_figure(f"Cross-validation: {results.metric}", results.metric, "fold")
        values = [float(value) for value in results.values(results.metric) if value is not None]
        level = Level(estimate.mean, "mean", estimate.low, estimate.high)
        folds = [place.fold for place in results.runs]
        axes.set_ylim(*view_of([Point(x + 1, y) for x, y in zip(folds, values)], [level]))
        axes.set_xlim(-0.5, results.declared.options.folds - 0.5)
        draw_level(axes, level, BLACK, "solid")
        axes.plot(folds, values, ls="none", marker="o", ms=5, color=BLUE, zorder=3)
        return figure

    return draw()
