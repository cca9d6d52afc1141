"""A search's folder: one file a trial, the choice, one file a tested run; and the sentences about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config.schema import read_json
from ..errors import UserError
from ..wording import counted

TRIALS, TESTS, CHOICE, BEST, PAGE = "trials", "test", "choice.json", "best.json", "report.html"
TIMES = "timing.json"  # what was measured of the devices


def trial_file(folder: Path, number: int) -> Path:
    """Where the result of a trial is."""
    return folder / TRIALS / f"{number:04d}.json"


def read_results(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The results in files, in the order of the files' names. A file that cannot be read is left out."""
    found = []
    for file in sorted(files):
        try:
            found.append(read_json(file))
        except UserError:
            continue
    return found


def trials_in(folder: Path) -> list[dict[str, Any]]:
    """The trials that have ended, in the order of their numbers."""
    return read_results((folder / TRIALS).glob("*.json"))


def tests_in(folder: Path) -> list[dict[str, Any]]:
    """The tested runs of the best configuration, in the order of their seeds."""
    return sorted(read_results((folder / TESTS).glob("seed-*.json")), key=lambda result: result["seed"])


def rank(trial: Mapping[str, Any], mode: str) -> tuple[float, float, int]:
    """A sort key: the best trial has the smallest. The metric decides, then the loss on validation, then the number."""
    loss = trial["metrics"].get("validation", {}).get("loss")
    value = trial["value"] if mode == "min" else -trial["value"]
    return value, math.inf if loss is None else loss, trial["number"]


def best_of(trials: Iterable[Mapping[str, Any]], mode: str) -> Mapping[str, Any] | None:
    """The best of the trials that have come to their end; None if there is none."""
    known = [trial for trial in trials if trial["state"] == "complete"]
    return min(known, key=lambda trial: rank(trial, mode)) if known else None


def ties(trials: Iterable[Mapping[str, Any]], best: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The other finished trials with the same metric as the best one. A trial that only repeats a run is no tie."""
    known = [t for t in trials if t["state"] == "complete" and t["number"] != best["number"] and "as" not in t]
    return [trial for trial in known if trial["value"] == best["value"]]


def tie_sentence(trials: Iterable[Mapping[str, Any]], best: Mapping[str, Any], metric: str) -> str:
    """Says which of several equal trials is taken, and why; an empty text if there is no tie."""
    others = ties(trials, best)
    if not others:
        return ""
    names = ", ".join(str(trial["number"] + 1) for trial in others[:5]) + (", ..." if len(others) > 5 else "")
    first = all(rank(trial, "min")[1] == rank(best, "min")[1] for trial in others)
    has = f"trial{'s' * (len(others) > 1)} {names} {'have' if len(others) > 1 else 'has'} the same {metric}"
    why = "it was found first" if first else "its loss on validation is the lowest (of equal ones, the first is taken)"
    return f"a tie: {has}. Trial {best['number'] + 1} is taken, since {why}"


def spread(values: list[float]) -> str:
    """The values of several seeds in words: mean, standard deviation and range."""
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
    return counted(len(states), "trial") + (f": {', '.join(parts)}" if parts else "")


_WORDS = {"complete": "finished", "pruned": "ended early", "failed": "failed"}


def test_sentence(tests: list[dict[str, Any]], metric: str) -> str:
    """What the tested runs say about the chosen metric, in words."""
    finite = [test for test in tests if test["status"] != "not finite"]
    lost = f"; {len(tests) - len(finite)} of {len(tests)} runs stopped being finite" if len(finite) < len(tests) else ""
    if not finite:
        return f"no test {metric}: none of {counted(len(tests), 'run')} with fresh seeds stayed finite"
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
    """The result of a search in words: the best configuration, its metric on validation, its metric on test."""
    metric = choice["metric"]
    lines = [
        f"best: trial {choice['number'] + 1}, {text}",
        f"  validation {metric} {choice['value']:.4f}, the best of {counts(trials)}. "
        "It was chosen for this value, so the value flatters",
        f"  {test_sentence(tests_in(folder), metric)}",
    ]
    best = next((trial for trial in trials if trial["number"] == choice["number"]), None)
    tie = "" if best is None else tie_sentence(trials, best, metric)
    if tie:
        lines.insert(2, f"  {tie}")
    inexact = sum(trial.get("exactness") == "tolerance" for trial in trials)
    if inexact:
        labelled = counted(inexact, "trial is", "trials are")
        lines.append(f"  {labelled} labelled tolerance: on another number of ranks, other bits are possible")
    return lines
