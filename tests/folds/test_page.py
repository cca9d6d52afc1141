"""The page of a cross-validation: its parts, and that texts of data and tasks cannot break it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.folds.small import write_results
from trainer.folds.page import write_page
from trainer.folds.results import Results


def test_the_page_shows_runs_interval_and_confusions(made: Path) -> None:
    page = (made / "report.html").read_text()
    low, high = json.loads((made / "summary.json").read_text())["metrics"]["accuracy"]["interval"]
    assert f"interval {low:.4f} to {high:.4f}" in page
    assert "<h2>Confusions</h2>" in page
    assert "n_test / n_train = 1 / 2" in page
    assert "<script" not in page


def test_a_metric_that_a_run_lacks_is_shown_with_that_run(tmp_path: Path) -> None:
    metrics = [{"accuracy": 0.8, "f1": 0.5}, {"accuracy": 0.9, "f1": None}]
    results = Results(write_results(tmp_path / "cv", [[0, 1, 0, 1]], metrics))
    page = write_page(results, {}).read_text()
    assert "not measured by repeat-0-fold-1" in page
    assert "<h2>Confusions</h2>" not in page, "the task names no predictions"


def test_texts_are_shown_and_not_run(tmp_path: Path) -> None:
    """A class may have any name, and comes from the data."""
    results = Results(write_results(tmp_path / "cv", [[0, 1, 0, 1]], [{"accuracy": 0.8}, {"accuracy": 0.9}]))
    page = write_page(results, {("<script>", "b"): 1_000, ("b", "b"): 1}).read_text()
    assert "<th>&lt;script&gt;</th>" in page
    assert ">1,000</td>" in page
    assert "cross-validate a&lt;b&gt;.json" in page
    assert "<script" not in page


def test_without_matplotlib_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no package that a cross-validation needs."""
    declared = write_results(tmp_path / "cv", [[0, 1, 0, 1]], [{"accuracy": 0.8}, {"accuracy": 0.9}])
    assert "<figure>" in write_page(Results(declared), {}).read_text()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "<figure>" not in write_page(Results(declared), {}).read_text()
