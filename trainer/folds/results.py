"""Reads the folder of a cross-validation: what every run measured, and what it predicted for each sample."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.schema import read_json
from ..files import whole_file
from ..record.folder import PREDICTIONS
from ..run.claim import finished_summary
from .declaration import Declared, Place
from .inference import Estimate, corrected

STATE = "cross_validation.json"
ALL_PREDICTIONS = "predictions.csv"
# The most classes of a confusion matrix: a larger one cannot be read.
_MOST_CLASSES = 30


def finished(declared: Declared) -> dict[Place, dict[str, Any]]:
    """The summaries of the runs that have finished and left their predictions."""
    found = {place: finished_summary(declared.run_folder(place)) for place in declared.places}
    return {
        place: summary
        for place, summary in found.items()
        if summary is not None and (declared.run_folder(place) / PREDICTIONS).is_file()
    }


class Results:
    """What a finished cross-validation has found.

    Attributes:
        declared: the cross-validation.
        known: what was known before the first run (`work.examine`).
        runs: the summary of each run, in order.
        metric: the one that is named first.
        estimates: metric on test -> its estimate; without the metrics that are missing or not finite in any run.
        lacking: metric -> the runs in which it is missing or not finite.
    """

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        state = read_json(declared.folder / STATE)
        self.known: dict[str, Any] = state["known"]
        self.metric: str = chosen_metric(declared, self.known)
        self.runs = finished(declared)
        self.estimates: dict[str, Estimate] = {}
        self.lacking: dict[str, list[Place]] = {}
        tests = {place: run["metrics"]["test"] for place, run in self.runs.items()}
        for name in dict.fromkeys(name for values in tests.values() for name in values):
            values = [tests[place].get(name) for place in self.runs]
            if all(value is not None and math.isfinite(value) for value in values):
                self.estimates[name] = corrected(values, self.ratio, declared.options.alpha)
            else:
                self.lacking[name] = [p for p, v in zip(self.runs, values) if v is None or not math.isfinite(v)]

    @property
    def ratio(self) -> float:
        """Samples that a run tests, over samples that it learns from. Validation samples count as learnt from."""
        return 1 / (self.declared.options.folds - 1)

    def values(self, metric: str) -> list[float | None]:
        """A metric of each run; None where a run lacks it."""
        return [run["metrics"]["test"].get(metric) for run in self.runs.values()]

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return {
            "metric": self.metric,
            "samples": self.known["samples"],
            "folds": self.declared.options.folds,
            "repeats": self.declared.options.repeats,
            "alpha": self.declared.options.alpha,
            "metrics": {
                name: {
                    "mean": e.mean,
                    "deviation": e.deviation,
                    "naive_error": e.naive_error,
                    "corrected_error": e.error,
                    "interval": [e.low, e.high],
                    "runs": self.values(name),
                }
                for name, e in self.estimates.items()
            },
            "test_over_train": self.ratio,
        }


def chosen_metric(declared: Declared, known: Mapping[str, Any]) -> str:
    """The metric that is named first: the declared one, the task's own choice, accuracy, or loss."""
    wishes = (declared.options.metric, known["best_metric"], "accuracy", "loss")
    return next(str(name) for name in wishes if name in known["metrics"])


def _lines(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        yield from csv.DictReader(opened)


def write_predictions(declared: Declared) -> tuple[Path, dict[tuple[str, str], int]]:
    """Puts the predictions of all runs into one file: repeat by repeat, each in the order of the data.

    Returns:
        The file, and (target, prediction) -> how often; empty if the task names no such columns.
    """
    folder, confusions = declared.folder, Counter[tuple[str, str]]()
    path = folder / ALL_PREDICTIONS
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None
        for repeat in range(declared.options.repeats):
            rows: list[tuple[int, int, dict[str, str]]] = []
            for fold in range(declared.options.folds):
                source = declared.run_folder(Place(repeat, fold)) / PREDICTIONS
                rows += [(int(line["row"]), fold, line) for line in _lines(source)]
            for row, fold, line in sorted(rows, key=lambda one: one[0]):
                if writer is None:
                    columns = [name for name in line if name != "row"]
                    writer = csv.DictWriter(file, ["row", "repeat", "fold", *columns], lineterminator="\n")
                    writer.writeheader()
                writer.writerow({"repeat": repeat, "fold": fold, **line, "row": row})
                if "target" in line and "prediction" in line:
                    confusions[line["target"], line["prediction"]] += 1
    return path, dict(confusions)


def matrix(counts: Mapping[tuple[str, str], int], names: Sequence[str]) -> list[list[int]]:
    """The confusion matrix. Rows are true classes, columns are predicted classes."""
    return [[counts.get((truth, said), 0) for said in names] for truth in names]


def classes_of(counts: Mapping[tuple[str, str], int], known: Mapping[str, Any]) -> list[str]:
    """The classes of a confusion matrix, in natural order; none for a regression, or if there are too many classes."""
    names = {name for pair in counts for name in pair}
    if known["classes"] is None or not 2 <= len(names) <= _MOST_CLASSES:
        return []
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))
