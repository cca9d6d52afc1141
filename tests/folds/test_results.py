"""What is read of a cross-validation's folder: the metrics of the runs, and one row a sample."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from tests.folds.small import STRONG, overrides, write_results
from trainer.folds.declaration import Place, load
from trainer.folds.results import Results, chosen_metric, classes_of, finished, matrix, write_predictions
from trainer.tasks.digits import read_images


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_sample_is_predicted_once_in_the_order_of_the_data(made: Path) -> None:
    found = rows(made)
    assert [int(row["row"]) for row in found] == list(range(1797))
    assert [int(row["target"]) for row in found] == read_images()[1].tolist()
    known = json.loads((made / "cross_validation.json").read_text())["known"]
    assert [int(row["fold"]) for row in found] == known["fold_of"][0]
    # What is said of the folds is what is in the file.
    summary = json.loads((made / "summary.json").read_text())
    for fold, accuracy in enumerate(summary["metrics"]["accuracy"]["runs"]):
        own = [row["target"] == row["prediction"] for row in found if row["fold"] == str(fold)]
        assert accuracy == pytest.approx(sum(own) / len(own))


def test_predictions_stand_in_the_order_of_the_data_repeat_by_repeat(tmp_path: Path) -> None:
    fold_of = [[0, 1, 1, 0], [1, 0, 1, 0]]
    declared = write_results(tmp_path / "cv", fold_of, [{"accuracy": 0.5}] * 4)
    file, confusions = write_predictions(declared)
    found = rows(file.parent)
    assert list(found[0]) == ["row", "repeat", "fold", "target", "prediction"]
    assert [(int(row["repeat"]), int(row["row"]), int(row["fold"])) for row in found] == [
        (repeat, sample, fold) for repeat in (0, 1) for sample, fold in enumerate(fold_of[repeat])
    ]
    assert confusions == {(str(target), "7"): 2 for target in range(4)}


def test_a_run_without_its_predictions_has_not_finished(tmp_path: Path) -> None:
    """As after a kill between the two files, or before the end: it is made again, or continued."""
    declared = write_results(tmp_path / "cv", [[0, 1, 2]], [{"accuracy": 0.5}] * 3)
    (declared.run_folder(Place(0, 1)) / "fold_predictions.csv").unlink()
    summary = declared.run_folder(Place(0, 2)) / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "stopped"}))
    assert list(finished(declared)) == [Place(0, 0)]


def test_a_metric_that_a_run_lacks_has_no_interval_and_says_which_run(tmp_path: Path) -> None:
    """The mean over the other runs would be one over other samples."""
    metrics = [{"accuracy": 0.8, "f1": 0.5, "nll": 1.0}, {"accuracy": 0.9, "f1": None, "nll": math.nan}]
    results = Results(write_results(tmp_path / "cv", [[0, 1, 0, 1]], metrics))
    assert list(results.estimates) == ["accuracy"]
    assert results.estimates["accuracy"].mean == pytest.approx(0.85)
    assert results.lacking == {"f1": [Place(0, 1)], "nll": [Place(0, 1)]}
    assert results.values("f1") == [0.5, None]
    assert results.summary()["metrics"].keys() == {"accuracy"}


def test_test_over_train_follows_from_the_number_of_folds(tmp_path: Path) -> None:
    """Each run is tested on 1 of 5 folds and learns from 4. Validation counts as learnt from."""
    results = Results(write_results(tmp_path / "cv", [[0, 1, 2, 3, 4]], [{"accuracy": i / 10} for i in range(5)]))
    assert results.summary()["test_over_train"] == 0.25
    assert results.estimates["accuracy"].ratio == 0.25


@pytest.mark.parametrize(
    ("wish", "own", "metrics", "chosen"),
    [
        ("f1", "accuracy", ["loss", "accuracy", "f1"], "f1"),
        (None, "f1", ["loss", "accuracy", "f1"], "f1"),
        (None, None, ["loss", "accuracy", "f1"], "accuracy"),
        (None, "gone", ["loss", "f1"], "loss"),
    ],
)
def test_the_metric_to_begin_with(
    tmp_path: Path, wish: str | None, own: str | None, metrics: list[str], chosen: str
) -> None:
    declared = load(STRONG, overrides(tmp_path, **{"cross_validation.metric": wish}))
    assert chosen_metric(declared, {"best_metric": own, "metrics": metrics}) == chosen


def test_confusions_are_of_classes_in_their_natural_order() -> None:
    """10 after 9 and not after 1. Numbers, and very many classes, make no table."""
    counts = {("9", "10"): 2, ("10", "10"): 3, ("9", "-1"): 1}
    names = classes_of(counts, {"classes": 3})
    assert names == ["-1", "9", "10"]
    assert matrix(counts, names) == [[0, 0, 0], [1, 0, 2], [0, 0, 3]]
    assert classes_of({("b", "a"): 1}, {"classes": 2}) == ["a", "b"]
    assert classes_of(counts, {"classes": None}) == [], "a regression"
    assert classes_of({(str(i), "0"): 1 for i in range(31)}, {"classes": 31}) == []
