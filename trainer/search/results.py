"""A search's folder: one file a trial, the choice, one file a tested run; and the sentences about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config.schema import read_json
from ..errors import UserError

TRIALS, TESTS, CHOICE, BEST, PAGE = "trials", "test", "choice.json", "best.json", "report.html"
TIMES = "timing.json"  # what was measured of the devices


def trial_file(folder: Path, number: int) -> Path:
    """Where the result of a trial is."""
    return folder / TRIALS / f"{number:04d}.json"


def read_results(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Results, in the order of their names. A file that cannot be read is as if it were not there."""
    found = []
    for file in sorted(files):
        try:
            found.append(read_json(file))
        except UserError:
            continue
    return found


def trials_in(folder: Path) -> list[dict[str, Any]]:
    """The trials that have ended, by number."""
    return read_results((folder / TRIALS).glob("*.json"))


def tests_in(folder: Path) -> list[dict[str, Any]]:
    """The tested runs of the best configuration, by seed."""
    return sorted(read_results((folder / TESTS).glob("seed-*.json")), key=lambda result: result["seed"])


def rank(trial: Mapping[str, Any], mode: str) -> tuple[float, float, int]:
    """The better the smaller: by the metric, then by the loss on validation, then the earlier."""
    loss = trial["metrics"].get("validation", {}).get("loss")
    value = trial["value"] if mode == "min" else -trial["value"]
    return value, math.inf if loss is None else loss, trial["number"]


def best_of(trials: Iterable[Mapping[str, Any]], mode: str) -> Mapping[str, Any] | None:
    """The best trial that has come to its end; None if there is none."""
    known = [trial for trial in trials if trial["state"] == "complete"]
    return min(known, key=lambda trial: rank(trial, mode)) if known else None


def spread(values: list[float]) -> str:
    """Several seeds' values in words."""
    if len(values) == 1:
        return f"{values[0]:.4f} (one fresh seed)"
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    return (
        f"{mean:.4f} ± {deviation:.4f} (mean and standard deviation over {len(values)} fresh seeds, "
        f"{min(values):.4f} to {max(values):.4f})"
    )


def counts(trials: Iterable[Mapping[str, Any]]) -> str:
    """How many trials there are, and how they ended."""
    states = [trial["state"] for trial in trials]
    parts = [f"{states.count(state)} {word}" for state, word in _WORDS.items() if state in states]
    return f"{len(states):,} trial{'s' * (len(states) != 1)}" + (f": {', '.join(parts)}" if parts else "")


_WORDS = {"complete": "finished", "pruned": "ended early", "failed": "failed"}


def test_sentence(tests: list[dict[str, Any]], metric: str) -> str:
    """What the tested runs say of the chosen metric."""
    finite = [test for test in tests if test["status"] != "not finite"]
    lost = f"; {len(tests) - len(finite)} of {len(tests)} runs stopped being finite" if len(finite) < len(tests) else ""
    if not finite:
        return f"no test {metric}: none of the {len(tests)} runs with fresh seeds stayed finite"
    split = "test" if "test" in finite[0]["metrics"] else "validation"
    values = [test["metrics"][split].get(metric) for test in finite]
    known = [float(value) for value in values if value is not None]
    if not known:
        return f"no test {metric}: it is not a finite number there{lost}"
    if split == "test":
        return f"test {metric} {spread(known)}, measured once, after the choice{lost}"
    return (
        f"validation {metric} {spread(known)}{lost}. The task has no test split, so nothing says how good the "
        "configuration is on data that the search has not seen"
    )


def sentences(folder: Path, choice: Mapping[str, Any], trials: list[dict[str, Any]], text: str) -> list[str]:
    """The end of a search in words: the best configuration, its validation metric, its test metric."""
    metric = choice["metric"]
    lines = [
        f"best: trial {choice['number'] + 1}, {text}",
        f"  validation {metric} {choice['value']:.4f}, the best of {counts(trials)}. Chosen for it, the value flatters",
        f"  {test_sentence(tests_in(folder), metric)}",
    ]
    inexact = sum(trial.get("exactness") == "tolerance" for trial in trials)
    if inexact:
        lines.append(f"  {inexact} trials are labelled tolerance: on another number of ranks they may have other bits")
    return lines
