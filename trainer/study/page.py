"""`python -m trainer report`: the results of a study as tables, figures and one page that opens in any browser.

Made of `study.json`, `runs/`, `tuning/` and `timing/` alone. The page has no script and asks nobody for anything; its
figures are part of it, and lie beside it as SVG and PDF.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..record.console import say
from .album import figures_of
from .arms import SEQUENTIAL, Place, title_of
from .inference import Comparison
from .prediction import search_times
from .results import (
    CLAIMS,
    Results,
    claims,
    listed,
    noise_sentences,
    rows_of,
    sequential_sentences,
    size_sentences,
    speed_ups,
    strong_sentences,
    verdicts,
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } th.text { text-align: inherit; }
code { font-size: 0.85em; overflow-wrap: anywhere; } summary { cursor: pointer; }
.verdict { font-weight: 600; } .supported { color: #b3261e; } .contradicted { color: #006d3c; }
.undecided { color: #555; } figure { margin: 1.5rem 0; } figure img { width: 100%; max-width: 50rem; }
"""


def report(folder: str) -> int:
    """Prints the verdicts of a study and writes its tables and page. Returns the exit code. Raises UserError."""
    say(*verdicts(Path(folder)), "", f"report: {write_report(Path(folder))}")
    return 0


def write_report(folder: Path) -> Path:
    """Writes results.csv, results.parquet, figures/, tensorboard/ and report.html into a study's folder.

    Returns:
        The page.

    Raises:
        UserError: the folder is none of a study, or a package is missing.
    """
    from .hparams import write_hparams

    results = Results(folder)
    rows = rows_of(results)
    _write_tables(folder, rows)
    write_hparams(folder, rows)
    page = folder / "report.html"
    page.write_text(_page(results, rows, folder / "figures"), encoding="utf-8")
    return page


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


def _page(results: Results, rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    parts = [
        f"<h1>Strong against weak scaling: {escape(results.task)}</h1>",
        "<p>A weak run on W ranks was computed exactly on one: its bits follow from its global batch and micro-batches "
        "alone. Accuracy is judged by these runs; speed by runs on real ranks only.</p>",
        *_warnings(results),
        "<h2>Verdicts</h2>",
        *(f"<p>{escape(line)}</p>" for line in strong_sentences(results)),
        *(_verdict_table(results, variant, budget) for variant, budget in results.blocks()),
        *(f"<p>{escape(line)}</p>" for line in noise_sentences(results)),
        *_sizes(results),
        "<details><summary>Every verdict with its numbers</summary>",
        *(f"<p>{escape(line)}.</p>" for line in sequential_sentences(results)),
    ]
    for claim, what, comparisons in claims(results):
        parts.append(f"<h3>{escape(what)}: {escape(CLAIMS[claim])}?</h3><ul>")
        parts += [
            f'<li>W = {c.place.world_size}: <span class="verdict {c.verdicts[claim]}">{c.verdicts[claim]}</span>. '
            f"{escape(c.sentences[claim])}</li>"
            for c in comparisons
        ]
        parts.append("</ul>")
    parts += ["</details>", *figures_of(results, folder), _searches(results), _trials_table(results)]
    parts += [_comparison_table(results), _impossible(results), _definitions(results), _origin(results)]
    parts += ["<h2>Every run</h2><details><summary>Open the table</summary>"]
    parts += [_table([list(r.values()) for r in rows], list(rows[0])), "</details>"]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        f"<title>Scaling study: {escape(results.task)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _warnings(results: Results) -> list[str]:
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
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        words = [' class="text"' if isinstance(cell, str) and cell != "-" else "" for cell in cells]
        return "<tr>" + "".join(f"<{tag}{w}>{escape(_shown(c))}</{tag}>" for c, w in zip(cells, words)) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>\n{body}\n</tbody></table>"


def _sizes(results: Results) -> list[str]:
    lines = size_sentences(results)
    if not lines:
        return []
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return [f"<h3>From how many training samples on is weak scaling harmless?</h3><ul>{items}</ul>"]


def _verdict_table(results: Results, variant: str, budget: str) -> str:
    """Arms by W: the mean difference, the verdict on a loss, and how many runs failed."""
    groups = results.groups(variant, budget)
    sizes = sorted({c.place.world_size for cs in groups.values() for c in cs})
    lines = []
    for arm, comparisons in groups.items():
        by_size = {c.place.world_size: c for c in comparisons}
        cells = "".join(f"<td>{_verdict_cell(by_size[W]) if W in by_size else '-'}</td>" for W in sizes)
        lines.append(f"<tr><td>{escape(title_of(arm))}</td>{cells}</tr>")
    head = "".join(f"<th>W = {W}</th>" for W in sizes)
    what = f"{variant}: {results.budget(budget)}" if variant else results.budget(budget)
    reference = results.judgement.references[Place(variant, SEQUENTIAL, "epochs", 1)]
    return (
        f"<h3>Does weak scaling lose {escape(results.study.metric)}? {escape(what)}</h3>"
        f"<p>Mean difference to the sequential runs ({reference.mean:.4f}, standard deviation "
        f"{reference.deviation:.4f}; tuned arms: to tuned sequential runs), the verdict on a loss, and how many of "
        f"{len(results.study.seeds)} runs failed to converge, if any.</p>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _verdict_cell(c: Comparison) -> str:
    verdict = c.verdicts["loses"]
    number = "no metric" if math.isnan(c.difference) else f"{c.difference:+.4f}"
    failed = f", {c.failures} failed" if c.failures else ""
    return f'{number} <span class="verdict {verdict}">{verdict}</span>{failed}'


def _comparison_table(results: Results) -> str:
    seeds = results.study.seeds
    rows: list[list[Any]] = []
    for place, r in results.judgement.references.items():
        rows.append([place.variant or "-", place.arm, "-", 1, r.mean, r.deviation, *r.interval, *["-"] * 7])
        rows[-1] += [r.values.get(seed) for seed in seeds]
    for c in results.judgement.comparisons:
        p = c.place
        numbers = [c.mean, c.deviation, *c.interval, c.difference, *c.difference_interval]
        tests = [c.p["loses, supported"], c.adjusted["loses, supported"], f"{c.failures} of {len(c.values)}"]
        rows.append([p.variant or "-", p.arm, p.budget, p.world_size, *numbers, *tests])
        rows[-1] += [f"{c.failure_interval[0]:.2f} to {c.failure_interval[1]:.2f}"]
        rows[-1] += [c.values.get(seed) for seed in seeds]
    header = ["variant", "arm", "equal", "W", "mean", "s.d.", "from", "to", "difference", "from", "to", "p"]
    header += ["adjusted p", "failed", "interval", *(f"seed {seed}" for seed in seeds)]
    return f"<h2>Every comparison: {escape(results.study.metric)}</h2>" + _table(rows, header)


def _searches(results: Results) -> str:
    if not results.searches:
        return ""
    metric = results.study.tuning_metric
    rows = []
    for name, search in results.searches.items():
        trials = sorted(search["trials"], key=lambda trial: trial["lr"])
        seen = ", ".join(f"{t['lr']:g}: {_shown(t['value'])}" for t in trials)
        edge = search["best"] in (trials[0]["lr"], trials[-1]["lr"])
        rows.append([name, search["best"], "at the edge of its range" if edge else "inside", seen])
    return (
        f"<h2>Searched learning rates</h2><p>The rate with the best {escape(metric)} of {results.study.tuning.trials} "
        f"trials. A best rate at the edge of its range may not be the best there is.</p>"
        + _table(rows, ["search", "best rate", "where", "rate: value"])
    )


def _impossible(results: Results) -> str:
    rows = results.declared["impossible"]
    return "<h2>What could not be run</h2>" + _table(rows, ["arm", "because"]) if rows else ""


def _definitions(results: Results) -> str:
    study = results.study
    more = "more" if study.direction == "max" else "less"
    if study.target is not None:
        target = f"{study.target:g}, as given"
    else:
        sign = "minus" if study.direction == "max" else "plus"
        target = (
            f"the sequential mean {sign} {study.target_deviations:g} standard deviations (none smaller than "
            f"{study.deviation_floor:g})"
        )
    tuning = study.tuning
    lines = [
        f"Metric: {study.metric} of the model that a run keeps; {more} is better.",
        f"Seeds: {listed(study.seeds)}, the same for every arm.",
        "Equal epochs: as many passes over the data as the sequential run. Equal updates: as many optimizer steps"
        + (f", but at most {study.max_epochs} epochs." if study.max_epochs else "."),
        f"A run fails to converge if its loss stops being finite, or it does not reach the target: {target}. The "
        "intervals of failure rates take the target as given.",
        "Nothing is decided before all declared seeds are there.",
        f"A loss matters from a margin of {study.margin:g} on.",
        "Loses: supported if flipping the signs of the differences paired by seed shows a loss above 0; "
        "contradicted if it shows one below the margin, and no run was not finite. The test is exact up to 16 seeds; "
        "against the margin it takes differences to be symmetric about their mean.",
        "Fails more often than not: supported or contradicted if the exact binomial test and the Clopper-Pearson "
        "interval exclude one half.",
        f"Each of these four families of tests is corrected by Holm over all comparisons of the study, at alpha = "
        f"{study.alpha:g}; intervals are not corrected, and have level {1 - study.alpha:g}.",
        "The rules: linear (Goyal et al. 2017), square root (Hoffer et al. 2017) of the learning rate alone, and with "
        "Adam's betas and eps as well (Malladi et al. 2022); weight decay is never scaled. They start from the base "
        "config's rate, so a loss is that of the rule, not of the batch.",
        f"Tuned arms (Shallue et al. 2019): the best of {tuning.trials} rates by {study.tuning_metric}, with "
        f"{tuning.seeds} run{'s' if tuning.seeds > 1 else ''} each, of seeds that no other run has; the same number "
        f"of trials at every W, around the base's rate, by a factor of up to {tuning.spread:g}. Compared with "
        "sequential runs that were tuned alike. Only the rate is tuned.",
        "LARS (You et al. 2017) with the linear rule and LAMB (You et al. 2020) with the square-root rule, both with "
        "warm-up over 5 epochs, are other optimizers than the sequential runs'; their rates are searched with the "
        "batch of one rank.",
        "AdaScale (Johnson et al. 2020) was made for SGD. With equal updates it makes as many scale-invariant steps "
        "as the sequential run makes steps.",
        "synchronised_batch_norm: one micro-batch is as large as those of all ranks together. Its statistics are what "
        "synchronised BatchNorm would compute, up to rounding.",
    ]
    return "<h2>Declared before the runs</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _origin(results: Results) -> str:
    facts = next(iter(results.runs.values()))["facts"]
    shown = ", ".join(f"{name} {value}" for name, value in facts.items())
    base = json.dumps(results.declared["base"], indent=2)
    study = json.dumps(results.declared["study"], indent=2)
    return (
        f"<h2>How it came about</h2><p><code>{escape(results.declared['command'])}</code></p><p>{escape(shown)}</p>"
        f"<details><summary>The base config</summary><pre>{escape(base)}</pre></details>"
        f"<details><summary>The study as declared</summary><pre>{escape(study)}</pre></details>"
    )


# ---- times -----------------------------------------------------------------------------------------------------------


def _trials_table(results: Results) -> str:
    """The section on searches: one run at a time on all devices, or as many runs as devices."""
    measured, predicted = speed_ups(results)
    known = predicted | measured
    if results.timings is None or len(known) < 2:
        return ""
    trial_s = sorted(results.timings.walls_s[1])[len(results.timings.walls_s[1]) // 2]
    rows: list[list[Any]] = []
    for W in [W for W in known if W > 1]:
        for n in sorted({1, W // 2, W, 2 * W, 8 * W}):
            t = search_times(trial_s, known, W, n)
            source = "measured" if all(k in measured for k in (W, t.group)) else "predicted"
            rows.append(
                [
                    W,
                    n,
                    t.strong,
                    t.at_once,
                    t.mixed,
                    f"{W // t.group} at a time, {t.group} rank{'s' if t.group > 1 else ''} each",
                    source,
                ]
            )
    header = ["W", "trials", "one at a time on W, s", "W at once, s", "best mix, s", "which is", "speed-up"]
    whole = "" if results.timings.max_steps is None else f" of {results.timings.max_steps:,} steps"
    return (
        "<h2>Where the devices serve a search best</h2><p>Seconds until the best of so many configurations is known, "
        f"for runs{whole} that take {trial_s:.3g} s on one device, and do not need one another's results. W trials at "
        "once waste no device as long as there are W trials left; one run on W ranks shows its result sooner, and lets "
        "a search learn from it before the next.</p>" + _table(rows, header)
    )
