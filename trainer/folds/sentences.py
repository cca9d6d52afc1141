"""What a cross-validation prints and writes on its page, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..wording import counted
from .declaration import Declared
from .inference import Estimate
from .results import Results


def plan_lines(declared: Declared, known: Mapping[str, Any], parallel: int) -> list[str]:
    """Says before the first run what will be done, one line each."""
    o, count = declared.options, known["samples"]
    how = [f"stratified by {known['classes']} classes"] if known["classes"] is not None else []
    how += [f"{known['groups']:,} groups stay whole"] if known["groups"] is not None else []
    sizes = [known["fold_of"][0].count(fold) for fold in range(o.folds)]
    repeats = f", {o.repeats} times" if o.repeats > 1 else ""
    lines = [f"data: {line}" for line in known["lines"]]
    lines += [f"note: {note}" for note in known["notes"]]
    lines += [
        f"{count:,} samples in {o.folds} folds of {_span(sizes)}{repeats}" + (f" ({'; '.join(how)})" if how else ""),
        f"{counted(len(declared.places), 'run')}, {parallel} at a time, in {declared.folder}; "
        f"{100 * known['validation_fraction']:.3g} % of what a run learns from is for validation",
    ]
    if known["lines"] or known["notes"]:
        lines.insert(0, "of the first fold:")
    return lines


def _span(sizes: list[int]) -> str:
    least, most = min(sizes), max(sizes)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def interval_text(estimate: Estimate, alpha: float) -> str:
    """An estimate in a few words."""
    level = f"{100 * (1 - alpha):g} %"
    return f"{estimate.mean:.4f} ({level} interval {estimate.low:.4f} to {estimate.high:.4f})"


def result_lines(results: Results) -> list[str]:
    """The metrics on the console, one a line, and what is missing."""
    alpha = results.declared.options.alpha
    lines = [f"{name:<14} {interval_text(e, alpha)}" for name, e in results.estimates.items()]
    for name, places in results.lacking.items():
        lines.append(f"{name:<14} no interval: {', '.join(map(str, places[:5]))} did not measure it")
    return lines


def headline(results: Results, page: Path) -> str:
    """The one line at the end."""
    o, estimate = results.declared.options, results.estimates.get(results.metric)
    what = f"{o.folds} folds" + (f", {o.repeats} times" if o.repeats > 1 else "")
    if estimate is None:
        return f"{results.metric}: not in every run ({what}): {page}"
    return f"{results.metric} {interval_text(estimate, o.alpha)}, {what}, {results.known['samples']:,} samples: {page}"


def about(results: Results) -> list[str]:
    """Two paragraphs: what the interval is about, and how it is computed."""
    o = results.declared.options
    J, k = o.folds * o.repeats, o.folds
    return [
        "The interval is about this way of training, on as many samples as one run has, with other samples of the same "
        "kind, another cut and another seed. It is not about one of the trained models, nor about a model that is "
        "trained on all samples, which is likely to be a little better.",
        f"It is the corrected resampled t interval of Nadeau and Bengio (2003): the mean plus and minus t(J - 1) "
        f"s sqrt(1 / J + n_test / n_train), with J = {J} runs, {J - 1} degrees of freedom and n_test / n_train = "
        f"1 / {k - 1}. The usual s / sqrt(J) is too small, because any two runs learn from mostly the same samples. "
        "The correction is only a good approximation, because an exact one does not exist. Near the end of a metric's "
        "range, such as an accuracy of 1, the interval may reach beyond it.",
    ]
