"""`python -m trainer report`: what a study's folder says, as tables and as one page that opens anywhere.

Made of `study.json` and `runs/` alone. The page has no script and asks nobody for anything; its figures are inline SVG.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .arms import SEQUENTIAL, WEAK
from .console import say
from .errors import UserError
from .inference import Comparison, Judgement, Rules, judge
from .schema import build, read_json
from .study import Study, finished, metric_of

# Okabe and Ito's palette, which colour-blind readers can tell apart; marks differ as well.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
_CLAIMS = {"loses": "loses accuracy against the sequential runs", "fails": "fails to converge more often than not"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; }
code { font-size: 0.85em; overflow-wrap: anywhere; }
.verdict { font-weight: 600; } .supported { color: #b3261e; } .contradicted { color: #006d3c; }
.undecided { color: #555; } figure { margin: 1.5rem 0; } svg { max-width: 100%; height: auto; }
"""


class _Results:
    """A study's folder, read and judged."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "study.json").is_file():
            raise UserError(f"{folder} holds no study: there is no study.json in it.")
        self.declared = read_json(folder / "study.json")
        self.study: Study = build(Study, self.declared["study"], "study.")
        self.runs = finished(folder)
        self.cells = [cell for cell in self.declared["cells"] if cell["id"] in self.runs]
        if not self.cells:
            raise UserError(f"{folder} holds no finished run yet.")
        sequential: dict[int, float | None] = {}
        weak: dict[tuple[str, str, int], dict[int, float | None]] = {}
        planned = set()
        for cell in self.declared["cells"]:
            place = (cell["arm"], cell["budget"], cell["world_size"])
            values = sequential if cell["arm"] == SEQUENTIAL else weak.setdefault(place, {})
            planned.add(place)
            if cell["id"] in self.runs:
                values[cell["seed"]] = metric_of(self.runs[cell["id"]], self.study.metric)
        weak = {place: values for place, values in weak.items() if values}
        self.judgement: Judgement = judge(sequential, weak, self.study.rules, len(planned) - 1, len(self.study.seeds))

    def budget(self, name: str) -> str:
        """A budget in words."""
        most = self.study.max_epochs
        return f"equal {name}" + (f", at most {most} epochs" if name == "updates" and most is not None else "")

    @property
    def rules(self) -> Rules:
        return self.study.rules

    def missing(self) -> int:
        """Runs that are declared and not finished."""
        return len({cell["id"] for cell in self.declared["cells"]} - self.runs.keys())


def _claims(results: _Results) -> Iterable[tuple[str, str, list[Comparison]]]:
    """(claim, what it is about, its comparisons by W), for each weak arm and budget."""
    for claim in _CLAIMS:
        groups: dict[tuple[str, str], list[Comparison]] = {}
        for c in results.judgement.comparisons:
            groups.setdefault((c.arm, c.budget), []).append(c)
        for (arm, budget), comparisons in groups.items():
            yield claim, f"{WEAK[arm].title}, {results.budget(budget)}", comparisons


def _strong_sentences(results: _Results) -> list[str]:
    strong = results.declared["strong"]
    if not strong:
        return []
    hashes = [
        r["parameters_sha256"] for r in results.runs.values() if r["arm"] == SEQUENTIAL and r["parameters_sha256"]
    ]
    possible = [W for W, answer in strong if isinstance(answer, int)]
    lines = []
    if possible:
        micro_batches = next(answer for _, answer in strong if isinstance(answer, int))
        lines.append(
            f"strong scaling has the accuracy of the sequential runs: supported at W = {_listed(possible)}, by "
            f"construction and not by a test. At each of these W the plan is the sequential run's: the same "
            f"{micro_batches} micro-batches a step, each dealt to one rank, added along the same tree. Its parameters "
            f"are those of the {len(hashes)} sequential runs (sha256 {', '.join(h[:8] for h in hashes[:3])}"
            f"{', ...' if len(hashes) > 3 else ''}). These are equal plans, not runs on W ranks; `python -m trainer "
            "verify` makes those."
        )
    lines += [
        f"strong scaling at W = {W}: impossible here. {answer}" for W, answer in strong if isinstance(answer, str)
    ]
    return lines


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers)


def verdicts(folder: Path) -> list[str]:
    """The verdicts of a study as lines of text, one a claim, arm and budget."""
    results = _Results(folder)
    lines = [
        _sequential_sentence(results),
        *([f"{results.missing():,} declared runs are missing."] if results.missing() else []),
        *_strong_sentences(results),
    ]
    for claim, what, comparisons in _claims(results):
        lines.append(f"{what}: {_CLAIMS[claim]}?")
        lines += [f"  W = {c.world_size}: {c.verdicts[claim]}. {c.sentences[claim]}" for c in comparisons]
    return lines


def _sequential_sentence(results: _Results) -> str:
    j = results.judgement
    return (
        f"sequential: {results.study.metric} {j.mean:.4f}, standard deviation {j.deviation:.4f}, "
        f"{100 * (1 - j.rules.alpha):g} % interval of the mean {j.interval[0]:.4f} to {j.interval[1]:.4f}, "
        f"{len(j.sequential)} seeds; target {j.target:.4f}"
    )


def report(folder: str) -> int:
    """Prints the verdicts of a study and writes its tables and page. Returns the exit code. Raises UserError."""
    say(*verdicts(Path(folder)), "", f"report: {write_report(Path(folder))}")
    return 0


# ---- tables --------------------------------------------------------------------------------------------------------


def rows_of(results: _Results) -> list[dict[str, Any]]:
    """One row for each arm, budget, W and seed that has a result: plain values, every row with the same keys."""
    names = sorted({f"{s}/{m}" for run in results.runs.values() for s, ms in run["metrics"].items() for m in ms})
    kept = ["status", "global_batch_size", "micro_batch_size", "epochs", "steps", "exactness", "parameters_sha256"]
    kept += ["started_at_s", "wall_time_s", "step_time_s", "samples_per_s", "code_sha256", "device_model"]
    rows = []
    for cell in results.cells:
        run = results.runs[cell["id"]]
        facts = {f"version_{name}": run["facts"].get(name) for name in ("trainer", "python", "torch", "deepspeed")}
        row = {k: cell[k] for k in ("arm", "budget", "world_size", "seed")} | {"config_sha256": cell["id"]}
        rows.append(row | {k: run[k] for k in kept} | facts | {name: metric_of(run, name) for name in names})
    return rows


def _write_tables(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import csv

    import pyarrow
    import pyarrow.parquet

    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / "results.parquet")


# ---- the page ------------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> Path:
    """Writes results.csv, results.parquet and report.html into a study's folder. Raises UserError if it is none.

    Returns:
        The page.
    """
    results = _Results(folder)
    rows = rows_of(results)
    _write_tables(folder, rows)
    page = folder / "report.html"
    page.write_text(_page(results, rows), encoding="utf-8")
    return page


def _page(results: _Results, rows: Sequence[Mapping[str, Any]]) -> str:
    study, task = results.study, results.declared["base"]["trainer"].get("task", "digits")
    parts = [
        f"<h1>Strong against weak scaling: {escape(str(task))}</h1>",
        "<p>A weak run on W ranks was computed exactly on one: its bits follow from its global batch and micro-batches "
        "alone. Accuracy is judged here, time is not.</p>",
        *_warnings(results),
        "<h2>Verdicts</h2>",
        f"<p>{escape(_sequential_sentence(results))}.</p>",
        *(f"<p>{escape(line)}</p>" for line in _strong_sentences(results)),
    ]
    for claim, what, comparisons in _claims(results):
        parts.append(f"<h3>{escape(what)}: {escape(_CLAIMS[claim])}?</h3><ul>")
        parts += [
            f'<li>W = {c.world_size}: <span class="verdict {c.verdicts[claim]}">{c.verdicts[claim]}</span>. '
            f"{escape(c.sentences[claim])}</li>"
            for c in comparisons
        ]
        parts.append("</ul>")
    budgets = list(dict.fromkeys(c.budget for c in results.judgement.comparisons))
    for budget in budgets:
        parts += [_accuracy_figure(results, budget), _failure_figure(results, budget)]
    parts += [_comparison_table(results), _impossible(results), _definitions(study, results), _origin(results)]
    parts += ["<h2>Every run</h2>", _table([list(r.values()) for r in rows], list(rows[0]))]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Scaling study: {escape(str(task))}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _warnings(results: _Results) -> list[str]:
    lines = []
    if results.missing():
        lines.append(f"{results.missing():,} declared runs are missing: nothing is decided before they are there.")
    for key, what in (("code_sha256", "versions of the code"), ("device_model", "device models")):
        found = {run[key] for run in results.runs.values()}
        if len(found) > 1:
            lines.append(f"The runs come from {len(found)} {what}, which give different bits.")
    return [f"<p><strong>{escape(line)}</strong></p>" for line in lines]


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.0f}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(_shown(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>\n{body}\n</tbody></table>"


def _comparison_table(results: _Results) -> str:
    seeds = results.study.seeds
    rows: list[list[Any]] = []
    j = results.judgement
    rows.append(["sequential", "-", 1, j.mean, j.deviation, *j.interval, "-", "-", "-", "-", "-", "-", "-"])
    rows[0] += [j.sequential.get(seed) for seed in seeds]
    for c in j.comparisons:
        numbers = [c.mean, c.deviation, *c.interval, c.difference, *c.difference_interval]
        p = [c.p["loses, supported"], c.adjusted["loses, supported"]]
        rows.append([c.arm, c.budget, c.world_size, *numbers, *p, f"{c.failures} of {len(c.values)}"])
        rows[-1] += [f"{c.failure_interval[0]:.2f} to {c.failure_interval[1]:.2f}"]
        rows[-1] += [c.values.get(seed) for seed in seeds]
    header = ["arm", "equal", "W", "mean", "s.d.", "from", "to", "difference", "from", "to", "p", "adjusted p"]
    header += ["failed", "interval", *(f"seed {seed}" for seed in seeds)]
    return f"<h2>Every comparison: {escape(results.study.metric)}</h2>" + _table(rows, header)


def _impossible(results: _Results) -> str:
    rows = results.declared["impossible"]
    return "<h2>What could not be run</h2>" + _table(rows, ["arm", "equal", "W", "because"]) if rows else ""


def _definitions(study: Study, results: _Results) -> str:
    more = "more" if study.direction == "max" else "less"
    if study.target is not None:
        target = f"{study.target:g}, as given"
    else:
        sign = "minus" if study.direction == "max" else "plus"
        target = (
            f"{results.judgement.target:.4f}, the sequential mean {sign} {study.target_deviations:g} standard "
            f"deviations (none smaller than {study.deviation_floor:g})"
        )
    lines = [
        f"Metric: {study.metric} of the model that a run keeps; {more} is better.",
        f"Seeds: {_listed(study.seeds)}, the same for every arm.",
        "Equal epochs: as many passes over the data as the sequential run. Equal updates: as many optimizer steps"
        + (f", but at most {study.max_epochs} epochs." if study.max_epochs else "."),
        f"A run fails to converge if its loss stops being finite, or it does not reach the target: {target}. The "
        "intervals of failure rates take the target as given.",
        "Nothing is decided before all declared seeds are there.",
        f"A loss matters from a margin of {study.margin:g} on.",
        "Loses accuracy: supported if flipping the signs of the differences paired by seed shows a loss above 0; "
        "contradicted if it shows one below the margin, and no run was not finite. The test is exact up to 16 seeds; "
        "against the margin it takes differences to be symmetric about their mean.",
        "Fails more often than not: supported or contradicted if the exact binomial test and the Clopper-Pearson "
        "interval exclude one half.",
        f"Each of these four families of tests is corrected by Holm over all comparisons of the study, at alpha = "
        f"{study.alpha:g}; intervals are not corrected, and have level {1 - study.alpha:g}.",
        "The rules: linear (Goyal et al. 2017), square root (Hoffer et al. 2017) of the learning rate alone, and with "
        "Adam's betas and eps as well (Malladi et al. 2022); weight decay is never scaled. No arm's learning rate was "
        "tuned at its own batch, so a loss is that of the rule, not of the batch (Shallue et al. 2019).",
    ]
    return "<h2>Declared before the runs</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _origin(results: _Results) -> str:
    import json

    facts = next(iter(results.runs.values()))["facts"]
    listed = ", ".join(f"{name} {value}" for name, value in facts.items())
    base = json.dumps(results.declared["base"], indent=2)
    return (
        f"<h2>How it came about</h2><p><code>{escape(results.declared['command'])}</code></p><p>{escape(listed)}</p>"
        f"<details><summary>The base config</summary><pre>{escape(base)}</pre></details>"
    )


# ---- figures ---------------------------------------------------------------------------------------------------------

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 760, 380, 64, 48, 16, 250


class _Axes:
    """One drawing: W on a logarithmic axis from left to right, a quantity from `low` to `high` upwards."""

    def __init__(self, world_sizes: Sequence[int], low: float, high: float, title: str, label: str) -> None:
        self._low, self._high = low, high
        self._first, last = math.log2(min(world_sizes)), math.log2(max(world_sizes))
        self._octaves = max(last - self._first, 1.0)
        self._parts = [
            f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" font-size="13">',
            f"<title>{escape(title)}</title>",
        ]
        self._legend = 0
        for i in range(6):
            value = low + (high - low) * i / 5
            y = self.y(value)
            self._parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
            self._text(_LEFT - 8, y + 4, f"{value:.3g}", "end")
        for W in world_sizes:
            self._text(self.x(W), _HEIGHT - _BOTTOM + 20, str(W), "middle")
        self._text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, "W, ranks", "middle")
        self._text(_LEFT, _TOP - 3, label, "start")

    def x(self, world_size: int) -> float:
        inner = _WIDTH - _LEFT - _RIGHT - 40
        return _LEFT + 20 + inner * (math.log2(world_size) - self._first) / self._octaves

    def y(self, value: float) -> float:
        share = (min(max(value, self._low), self._high) - self._low) / (self._high - self._low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP - 8) * share

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, value: float, text: str, dash: str) -> None:
        """A line across the drawing, named in the legend."""
        y = self.y(value)
        self._parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#333" stroke-dasharray="{dash}"/>')
        self._name(text, "#333", dash)

    def band(self, low: float, high: float) -> None:
        """A grey band across the drawing."""
        top, bottom = self.y(high), self.y(low)
        self._parts.append(
            f'<path d="M{_LEFT} {top:.1f}H{_WIDTH - _RIGHT}V{bottom:.1f}H{_LEFT}z" fill="#333" fill-opacity="0.15"/>'
        )

    def series(self, name: str, place: int, points: Sequence[tuple[int, float, float, float]]) -> None:
        """(W, value, low, high) as marks with bars, joined; `place` among the series keeps bars apart."""
        colour, shift = _COLOURS[place % len(_COLOURS)], 5.0 * (place - 2)
        known = [(self.x(W) + shift, v, low, high) for W, v, low, high in points if math.isfinite(v)]
        path = "".join(f"{'L' if i else 'M'}{x:.1f} {self.y(v):.1f}" for i, (x, v, _, _) in enumerate(known))
        if len(known) > 1:
            self._parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for (x, v, low, high), (W, *_) in zip(known, [p for p in points if math.isfinite(p[1])]):
            y = self.y(v)
            text = f"{name}, W = {W}: {v:.4f}"
            bar = ""
            if math.isfinite(low):
                bar = f'<path d="M{x:.1f} {self.y(low):.1f}V{self.y(high):.1f}" stroke="{colour}"/>'
                text += f" ({low:.4f} to {high:.4f})"
            mark = (
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>',
                f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>',
                f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" fill="{colour}"/>',
                f'<path d="M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z" fill="{colour}"/>',
                f'<path d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8" stroke="{colour}" stroke-width="2"/>',
            )[place % 5]
            self._parts.append(f"<g><title>{escape(text)}</title>{bar}{mark}</g>")
        self._name(name, colour, "none")

    def _name(self, text: str, colour: str, dash: str) -> None:
        x, y = _WIDTH - _RIGHT + 12, _TOP + 14 + 20 * self._legend
        self._legend += 1
        self._parts.append(f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>')
        self._text(x + 24, y, text, "start")

    def close(self, caption: str) -> str:
        return "\n".join([*self._parts, "</svg>", f"<figcaption>{escape(caption)}</figcaption></figure>"])


def _by_arm(results: _Results, budget: str) -> dict[str, list[Comparison]]:
    groups: dict[str, list[Comparison]] = {}
    for c in results.judgement.comparisons:
        if c.budget == budget:
            groups.setdefault(c.arm, []).append(c)
    return groups


def _accuracy_figure(results: _Results, budget: str) -> str:
    j, groups = results.judgement, _by_arm(results, budget)
    sizes = sorted({c.world_size for cs in groups.values() for c in cs})
    seen = [v for cs in groups.values() for c in cs for v in (c.mean, *c.interval)] + [j.mean, *j.interval, j.target]
    seen = [v for v in seen if math.isfinite(v)]
    if not seen:
        return ""
    room = 0.05 * (max(seen) - min(seen)) or 0.01
    title = f"{results.study.metric} over W by arm, {results.budget(budget)}"
    axes = _Axes(sizes, min(seen) - room, max(seen) + room, title, results.study.metric)
    if math.isfinite(j.interval[0]):
        axes.band(*j.interval)
    axes.line(j.mean, "sequential, and strong", "none")
    axes.line(j.target, "target", "4 4")
    for place, (arm, comparisons) in enumerate(groups.items()):
        axes.series(arm, place, [(c.world_size, c.mean, *c.interval) for c in comparisons])
    level = f"{100 * (1 - j.rules.alpha):g} %"
    return axes.close(f"{title}. Means over seeds; bars and the grey band are {level} intervals of the mean.")


def _failure_figure(results: _Results, budget: str) -> str:
    groups = _by_arm(results, budget)
    sizes = sorted({c.world_size for cs in groups.values() for c in cs})
    title = f"Share of runs that fail to converge over W by arm, {results.budget(budget)}"
    axes = _Axes(sizes, 0.0, 1.0, title, "failure rate")
    axes.line(0.5, "one half", "4 4")
    for place, (arm, comparisons) in enumerate(groups.items()):
        axes.series(arm, place, [(c.world_size, c.failures / len(c.values), *c.failure_interval) for c in comparisons])
    return axes.close(f"{title}. Bars are {100 * (1 - results.rules.alpha):g} % Clopper-Pearson intervals.")
