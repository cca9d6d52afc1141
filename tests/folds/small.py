"""A cross-validation of seconds on the digits, and a folder of results that is made by hand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from tests.distributed.jobs import ROOT
from trainer.folds.declaration import Declared, load

STRONG = str(ROOT / "ds_configs" / "strong.json")
SMALL: dict[str, Any] = {
    "trainer.task_options": {"model": "mlp", "width": 8},
    "trainer.epochs": 1,
    "trainer.learning_rate": {},
    "tensorboard": {"enabled": False},
    "cross_validation.folds": 3,
    "cross_validation.max_parallel": 1,
}


def overrides(folder: Path, **more: Any) -> dict[str, Any]:
    return SMALL | {"cross_validation.output_dir": str(folder)} | more


def write_results(folder: Path, fold_of: list[list[int]], metrics: list[dict[str, float | None]]) -> Declared:
    """The folder of a cross-validation whose runs have finished, as the runs and `runner` leave it.

    Each sample has its row as target, and 7 as prediction.

    Args:
        folder: a new one.
        fold_of: of each repeat, the fold of each sample.
        metrics: on test, of each run, repeat by repeat.
    """
    folds = max(fold_of[0]) + 1
    more = {"cross_validation.folds": folds, "cross_validation.repeats": len(fold_of)}
    declared = load(STRONG, overrides(folder, **more))
    for place, measured in zip(declared.places, metrics, strict=True):
        run = declared.run_folder(place)
        run.mkdir(parents=True)
        summary = {"status": "finished", "steps": 5, "exactness": "bitwise", "parameters_sha256": "ab" * 32}
        (run / "summary.json").write_text(json.dumps(summary | {"metrics": {"test": measured}}))
        write_predictions(run, [row for row, fold in enumerate(fold_of[place.repeat]) if fold == place.fold])
    known = {
        "samples": len(fold_of[0]), "validation_fraction": 0.2, "fold_of": fold_of, "groups": None, "classes": 10,
        "metrics": ["loss", "accuracy"], "best_metric": None, "facts": {"torch": "2.13"}, "lines": [], "notes": [],
    }  # fmt: skip
    state = {"declared": declared.fixed(), "known": known, "command": "python -m trainer cross-validate a<b>.json"}
    (folder / "cross_validation.json").write_text(json.dumps(state))
    return declared


def write_predictions(run: Path, rows: list[int]) -> None:
    with (run / "fold_predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "target", "prediction"])
        writer.writerows([row, row, 7] for row in rows)
