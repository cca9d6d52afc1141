"""`python -m trainer report`: the results of a study as tables, figures and one page that opens in any browser.

Everything is made of `study.json`, `runs/`, `tuning/` and `timing/`. The page has no script and loads nothing. Its
figures are part of it, and lie beside it as SVG and PDF.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..record.console import say
from .album import figures_of
from .arms import SEQUENTIAL, Place, Settings, title_of
from .causes import cause_rows, cause_sentences
from .definitions import definitions
from .interaction import interaction_sentences
from .judgement import FAILINGS, Comparison
from .noise import scales_by_epoch
from .prediction import search_times
from .results import Results, rows_of, speed_ups
from .sentences import (
    CLAIMS,
    budget_sentences,
    claims,
    headline,
    noise_sentences,
    search_sentences,
    sequential_sentences,
    size_sentences,
    strong_sentences,
    too_few_sentences,
    verdicts,
)
from .sheet import document, shown_value, table
from .to_target import target_sentences
from .trend import trend_sentences
from .tuning import edges_of
from .variance import variance_sentences, variance_table


def report(folders: Sequence[str], paper: str | None = None) -> int:
    """Prints the verdicts of studies and writes their tables and pages. Returns the exit code.

    Args:
        folders: of the studies.
        paper: a page to write with all of them; None for none.

    Raises:
        UserError: a folder is not a study's, or a paper cannot be written to `paper`.
    """
    from .paper import check_paper, write_paper

    # First, so that a mistake in --paper is told before any report is written.
    if paper is not None:
        check_paper(folders, paper)
    for folder in folders:
        say(*verdicts(Path(folder)), "", f"report: {write_report(Path(folder))}")
    if paper is not None:
        say(f"paper: {write_paper(folders, paper)}")
    return 0


def write_report(folder: Path) -> Path:
    """Writes results.csv, results.parquet, figures/, tensorboard/ and report.html into a study's folder.

    Returns:
        The page.

    Raises:
        UserError: the folder is not a study's, or a package is missing.
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
        f'<p class="headline">{escape(" ".join(headline(results)))}</p>',
        "<p>A weak run on W ranks was computed exactly on one: its bits follow from its global batch and micro-batches "
        "alone. Accuracy is judged by these runs; speed by runs on real ranks only.</p>",
        *_warnings(results),
        "<h2>Verdicts</h2>",
        *(f"<p>{escape(line)}</p>" for line in strong_sentences(results)),
        *(f"<p>{escape(line)}</p>" for line in too_few_sentences(results)),
        *(_block(results, variant, budget) for variant, budget in results.blocks()),
        *(f"<p>{escape(line)}</p>" for line in search_sentences(results)),
        *(f"<p>{escape(line)}</p>" for line in noise_sentences(results)),
        *_listed("At how many training samples does weak scaling lose?", size_sentences(results)),
        *_listed("With which budget does weak scaling lose?", budget_sentences(results)),
        *_causes(results),
        *_listed("How many updates to the target?", target_sentences(results)),
        *_listed("Does the loss fall with the number of training samples?", trend_sentences(results)),
        *_listed("Does the loss depend on the variant?", interaction_sentences(results)),
        *_listed("One split of the data, or many?", variance_sentences(results)),
        "<details><summary>Every verdict with its numbers</summary>",
        *(f"<p>{escape(line)}.</p>" for line in sequential_sentences(results)),
    ]
    for claim, what, comparisons in claims(results):
        parts.append(f"<h3>{escape(what)}: {escape(CLAIMS[claim])}?</h3><ul>")
        parts += [
            f"<li>W = {c.place.world_size}: {_marked(c.verdicts[claim])}. {escape(c.sentences[claim])}</li>"
            for c in comparisons
        ]
        parts.append("</ul>")
    parts += ["</details>", *figures_of(results, folder), _searches(results), _trials_table(results)]
    parts += [_comparison_table(results), variance_table(results), _noise_table(results), _impossible(results)]
    parts += [
        "<h2>Declared before the runs</h2><ul>",
        *(f"<li>{escape(d)}</li>" for d in definitions(results)),
        "</ul>",
    ]
    parts += [_origin(results)]
    parts += ["<h2>Every run</h2><details><summary>Open the table</summary>"]
    parts += [table([list(r.values()) for r in rows], list(rows[0])), "</details>"]
    return document(f"Scaling study: {results.task}", parts)


def _warnings(results: Results) -> list[str]:
    return [f"<p><strong>{escape(line)}</strong></p>" for line in results.doubts()]


def _listed(question: str, lines: Sequence[str]) -> list[str]:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return [f"<h3>{escape(question)}</h3><ul>{items}</ul>"] if lines else []


def _causes(results: Results) -> list[str]:
    """Why weak scaling loses: a sentence for each arm, and the numbers in a table."""
    rows = cause_rows(results)
    if not rows:
        return []
    header = ["variant", "arm", "W", "why", "in all", "verdict", "by fewer updates", "verdict"]
    header += ["by the batch itself", "from", "to", "verdict"]
    return [
        *_listed("Fewer updates, or the batch: why does weak scaling lose?", cause_sentences(results)),
        "<details><summary>The comparisons behind these sentences</summary>",
        table(rows, header),
        "</details>",
    ]


def _marked(verdict: str) -> str:
    return f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'


def _block(results: Results, variant: str, budget: str) -> str:
    """Two tables of arms by W: the loss of the typical run with its verdict, and the runs that fail."""
    what = results.named(variant, results.budget(budget))
    reference = results.judgement.references[Place(variant, SEQUENTIAL, "epochs", 1)]
    about = (
        f"Difference of the typical run to the sequential run of its seed (the typical sequential run has "
        f"{shown_value(reference.centre)}; tuned arms, LARS and LAMB have sequential runs of their own), the verdict "
        "on a loss, the interval where it is undecided (undecided does not mean that nothing is lost), and how many "
        "runs collapsed, if any."
    )
    failing = (
        "Runs that miss the target, and runs that do not converge. The number in brackets counts the sequential runs "
        "of the same seeds that fail so. Bold: it is shown that the runs of this arm fail more often."
    )
    return (
        f"<h3>Does the typical run lose {escape(results.study.metric)}? {escape(what)}</h3><p>{escape(about)}</p>"
        + _by_size(results, variant, budget, _verdict_cell)
        + f"<h3>Do runs fail? {escape(what)}</h3><p>{failing}</p>"
        + _by_size(results, variant, budget, _failing_cell)
    )


def _by_size(results: Results, variant: str, budget: str, cell: Callable[[Comparison], str]) -> str:
    groups = results.groups(variant, budget)
    sizes = sorted({c.place.world_size for cs in groups.values() for c in cs})
    lines = []
    for arm, comparisons in groups.items():
        by_size = {c.place.world_size: c for c in comparisons}
        filled = [(W, cell(by_size[W]) if W in by_size else "-") for W in sizes]
        cells = "".join(f'<td data-size="{W}">{content}</td>' for W, content in filled)
        lines.append(f"<tr><td>{escape(title_of(arm, budget))}</td>{cells}</tr>")
    head = "".join(f"<th>W = {W}</th>" for W in sizes)
    return f"<table class='by-size'><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _verdict_cell(c: Comparison) -> str:
    number = f"{c.difference:+.4f}" if math.isfinite(c.difference) else "not finite"
    lines = [f"<span>{number}</span> {_marked(c.verdicts['loses'])}"]
    if c.size_open:
        lines.append("loses, and the size is open")
    low, high = c.difference_interval
    if c.verdicts["loses"] == "undecided":  # a small difference alone would read as if nothing were lost
        known = math.isfinite(low) or math.isfinite(high)
        lines.append(f"{low:+.3f} to {high:+.3f}" if known else "too few runs" if c.unable else "no interval")
    if c.collapsed:
        lines.append(f"{c.collapsed} collapsed")
    return " ".join([lines[0], *(f'<span class="more">{line}</span>' for line in lines[1:])])


def _failing_cell(c: Comparison) -> str:
    shown = []
    for failing, word in zip(FAILINGS, ("miss it", "not converged")):
        count = c.counts[failing]
        text = f"{word} {count.failed} of {count.runs} ({count.of_reference})"
        shown.append(f"<b>{text}</b>" if c.verdicts[failing] == "more often" else f"<span>{text}</span>")
    return " ".join(shown)


def _comparison_table(results: Results) -> str:
    seeds = results.study.seeds
    rows: list[list[Any]] = []
    for place, r in results.judgement.references.items():
        rows.append([place.variant or "-", place.arm, "-", 1, r.centre, *r.interval, *["-"] * 4, r.not_finite])
        rows[-1] += [r.failed["below"], "-", r.failed["unconverged"], "-", *(r.values.get(seed) for seed in seeds)]
    for c in results.judgement.comparisons:
        p = c.place
        rows.append([p.variant or "-", p.arm, p.budget, p.world_size, c.centre, *c.interval, c.difference])
        rows[-1] += [*c.difference_interval, c.collapsed, c.not_finite]
        for failing in FAILINGS:
            rows[-1] += [c.counts[failing].failed, c.counts[failing].adjusted]
        rows[-1] += [c.values.get(seed) for seed in seeds]
    header = ["variant", "arm", "equal", "W", "median", "from", "to", "difference", "from", "to", "collapsed"]
    header += [
        "not finite",
        "miss the target",
        "adjusted p",
        "not converged",
        "adjusted p",
        *(f"seed {seed}" for seed in seeds),
    ]
    return f"<h2>Every comparison: {escape(results.study.metric)}</h2>" + table(rows, header)


def _noise_table(results: Results) -> str:
    scales = scales_by_epoch(results.results_at(Place("", SEQUENTIAL, "epochs", 1)), results.rules.alpha)
    if not scales:
        return ""
    rows = [[epoch, scale.value, scale.low, scale.high] for epoch, scale in scales.items()]
    level = f"{100 * (1 - results.rules.alpha):g} %"
    return (
        f"<h2>Gradient noise scale by epoch</h2><p>In samples, with {level} intervals over the sequential seeds.</p>"
        + table(rows, ["epoch", "scale", "from", "to"])
    )


def _searches(results: Results) -> str:
    if not results.searches:
        return ""
    rows = []
    for name, search in results.searches.items():
        trials = sorted((t for t in search["trials"] if t["value"] is not None), key=lambda t: t["value"])
        best = trials[::-1] if results.study.direction == "max" else trials
        seen = "; ".join(f"{_settings(t)}: {shown_value(t['value'])}" for t in best[:3])
        edges = ", ".join(edges_of(search["trials"], search["best"]))
        rows.append([name, str(_settings(search["best"])), edges or "none", seen])
    return (
        f"<h2>Searches</h2><p>{len(rows):,} searches by {escape(results.study.tuning_metric)}: what each found, and "
        "the three settings with the best means (of one seed or more). Beyond the edge of what was tried there may be "
        "something better.</p>" + table(rows, ["search", "found: rate", "at the edge", "rate: mean"])
    )


def _settings(values: Mapping[str, Any]) -> Settings:
    return Settings(values["lr"], values["warmup_epochs"], values["momentum"])


def _impossible(results: Results) -> str:
    rows = results.declared["impossible"]
    return "<h2>What could not be run</h2>" + table(rows, ["arm", "because"]) if rows else ""


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
        "<h2>Where the devices serve a search best</h2><p>Seconds until the best of this many configurations is known, "
        f"for runs{whole} that take {trial_s:.3g} s on one device, and do not need one another's results. W trials at "
        "once waste no device while there are W trials left. One run on W ranks shows its result sooner, and lets a "
        "search learn from it before the next.</p>" + table(rows, header)
    )
