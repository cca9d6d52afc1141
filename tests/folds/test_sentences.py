"""What a cross-validation says before its runs and after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.folds.small import STRONG, overrides, write_results
from trainer.folds.declaration import load
from trainer.folds.inference import corrected
from trainer.folds.results import Results
from trainer.folds.sentences import about, headline, interval_text, plan_lines, result_lines

KNOWN: dict[str, Any] = {
    "samples": 7, "fold_of": [[0, 1, 2, 0, 1, 2, 0]], "classes": None, "groups": None, "validation_fraction": 0.15,
    "lines": [], "notes": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("known", "repeats", "said"),
    [
        ({}, 1, "7 samples in 3 folds of 2 to 3"),
        ({"fold_of": [[0, 1, 2, 0, 1, 2]], "samples": 6}, 1, "6 samples in 3 folds of 2"),
        ({"classes": 4}, 2, "7 samples in 3 folds of 2 to 3, 2 times (stratified by 4 classes)"),
        ({"classes": 4, "groups": 1000}, 1, "(stratified by 4 classes; 1,000 groups stay whole)"),
    ],
)
def test_the_plan_says_how_samples_are_cut(tmp_path: Path, known: dict[str, Any], repeats: int, said: str) -> None:
    declared = load(STRONG, overrides(tmp_path / "cv", **{"cross_validation.repeats": repeats}))
    first, second = plan_lines(declared, KNOWN | known, 2)
    assert first.endswith(said)
    runs = f"{3 * repeats} runs, 2 at a time, in {tmp_path / 'cv'}"
    assert second == f"{runs}; 15 % of what a run learns from is for validation"


def test_what_the_task_says_of_its_data_is_said_to_be_of_the_first_fold(tmp_path: Path) -> None:
    known = KNOWN | {"lines": ["4 columns"], "notes": ["one is empty"]}
    lines = plan_lines(load(STRONG, overrides(tmp_path)), known, 1)
    assert lines[:3] == ["of the first fold:", "data: 4 columns", "note: one is empty"]


def test_an_interval_names_its_level() -> None:
    estimate = corrected([0.8, 0.9, 1.0], 0.5, 0.1)
    assert interval_text(estimate, 0.1).startswith("0.9000 (90 % interval ")
    assert interval_text(corrected([0.5, 0.5], 1.0, 0.05), 0.05) == "0.5000 (95 % interval 0.5000 to 0.5000)"


def test_the_results_name_the_runs_that_lack_a_metric(tmp_path: Path) -> None:
    metrics = [{"accuracy": 0.5, "f1": 0.5}, {"accuracy": 0.5, "f1": None}]
    results = Results(write_results(tmp_path / "cv", [[0, 1, 0, 1]], metrics))
    assert result_lines(results) == [
        "accuracy       0.5000 (95 % interval 0.5000 to 0.5000)",
        "f1             no interval: repeat-0-fold-1 did not measure it",
    ]
    assert headline(results, Path("x.html")) == (
        "accuracy 0.5000 (95 % interval 0.5000 to 0.5000), 2 folds, 4 samples: x.html"
    )
    results.metric = "f1"
    assert headline(results, Path("x.html")) == "f1: not in every run (2 folds): x.html"


def test_the_formula_has_the_numbers_of_this_cross_validation(tmp_path: Path) -> None:
    """Two repeats of 3 folds: 6 runs, and each is tested on half as many samples as it learns from."""
    fold_of = [[0, 1, 2], [2, 1, 0]]
    results = Results(write_results(tmp_path / "cv", fold_of, [{"accuracy": 0.5}] * 6))
    _, formula = about(results)
    assert "with J = 6 runs, 5 degrees of freedom and n_test / n_train = 1 / 2." in formula
