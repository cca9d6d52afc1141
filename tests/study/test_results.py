"""A study's folder, read: its runs, rows and searches. What it says is in test_sentences.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_up import network, results, timed
from trainer.errors import UserError
from trainer.study.arms import id_of_values
from trainer.study.judgement import Outcome
from trainer.study.results import Results, digest_of, epochs_of, metric_of, outcome_of, rows_of, speed_ups, starts


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a study's folder: it has no study\.json"):
        Results(tmp_path)


def test_a_run_that_stopped_being_finite_has_no_metric() -> None:
    assert metric_of({"metrics": {"test": {"accuracy": 1}}}, "test/accuracy") == 1.0
    assert metric_of({"metrics": {"test": {"loss": 1}}}, "test/accuracy") is None
    assert metric_of({"metrics": {}}, "test/accuracy") is None
    assert metric_of({"metrics": {"test": {"loss": math.inf}}}, "test/loss") is None


def test_how_a_run_ended() -> None:
    """The last training loss is a mean over the last tenth of the windows: one window is one batch, or few."""
    losses = [2.3, *[1.0] * 27, 0.5, 0.3, 0.4]
    run = {"metrics": {"test": {"accuracy": 0.9}}, "curves": {"train/loss": {"value": losses}}}
    assert outcome_of(run, "test/accuracy", 2.3) == Outcome(0.9, 2.3, pytest.approx((1.0 + 0.5 + 0.3 + 0.4) / 4))
    assert outcome_of({"metrics": {}, "curves": {}}, "test/accuracy") == Outcome(None, None, None)


def test_where_runs_start_does_not_depend_on_how_long_they_are() -> None:
    """A longer run logs longer windows, over the first of which the loss has fallen further."""

    def run(seed: int, steps: int, loss: float, model: str = "mlp") -> dict[str, Any]:
        curves = {"train/loss": {"step": [steps, 2 * steps], "value": [loss, 0.1]}}
        return {"config": {"trainer": {"task": "t", "seed": seed, "task_options": {"model": model}}}, "curves": curves}

    runs = {
        "long": run(0, 114, 1.4), "short": run(0, 1, 2.3), "as short": run(0, 1, 2.4), "between": run(0, 12, 2.2),
        "another seed": run(1, 12, 2.1), "another model": run(0, 12, 2.0, "cnn"), "not finite": run(2, 1, math.nan),
        "no curve": {"config": {"trainer": {"seed": 3}}, "curves": {}},
    }  # fmt: skip
    found = starts(runs)
    assert [found[name] for name in ("long", "short", "as short", "between")] == [pytest.approx(2.35)] * 4
    assert (found["another seed"], found["another model"]) == (2.1, 2.0)
    assert not {"not finite", "no curve"} & found.keys()


def test_every_cell_is_one_row_with_the_same_keys(tmp_path: Path) -> None:
    read = Results(results(tmp_path, noise={"scale_samples": 146.0}))
    rows = rows_of(read)
    assert len(rows) == 10 * (1 + 2 * 2)
    assert len({tuple(row) for row in rows}) == 1
    assert [rows[0][key] for key in ("arm", "world_size", "version_torch", "noise_scale_samples")] == [
        "sequential", 1, "2", 146.0,
    ]  # fmt: skip
    (broken,) = (row for row in rows if row["status"] == "not finite")
    assert broken["test/accuracy"] is None
    assert math.isclose(rows[0]["test/accuracy"] + rows[0]["test/loss"], 1)


def test_the_base_is_named_by_its_epochs_among_budgets(tmp_path: Path) -> None:
    read = Results(results(tmp_path, seeds=2, epochs=[60]))
    assert epochs_of(read) == {"": 20, "60 epochs": 60}
    assert [read.named(variant, "weak") for variant in read.variants] == ["20 epochs: weak", "60 epochs: weak"]
    (tmp_path / "plain").mkdir()
    read = Results(results(tmp_path / "plain", seeds=2))
    assert (epochs_of(read), read.named("", "weak"), read.named("wide", "weak", ", ")) == ({}, "weak", "wide, weak")


# Strong scaling


def test_speed_ups_are_predicted_where_the_plan_allows_them(tmp_path: Path) -> None:
    """4 micro-batches can be dealt to 4 ranks, and not to 8."""
    folder = results(tmp_path, seeds=2)
    assert speed_ups(Results(folder)) == ({}, {})
    timed(folder, 1)
    network(folder)
    measured, predicted = speed_ups(Results(folder))
    assert measured == {1: 1.0}
    assert list(predicted) == [1, 2, 4]
    assert predicted[1] == pytest.approx(1.0)
    assert 1.0 < predicted[2] < predicted[4] < 4.0


# What speaks against reading the verdicts


def test_a_declaration_that_was_changed_after_the_runs_is_noticed(tmp_path: Path) -> None:
    """Runs of earlier versions kept no digest: nothing is said of them."""
    folder = results(tmp_path, seeds=2)
    file = folder / "study.json"
    digest = digest_of(json.loads(file.read_text()))
    first, second, *_ = sorted((folder / "runs").iterdir())
    for run in (first, second):
        run.write_text(json.dumps(json.loads(run.read_text()) | {"declaration_sha256": digest}))
    assert Results(folder).doubts() == []
    declared = json.loads(file.read_text())
    file.write_text(json.dumps(declared | {"command": "another", "declared_at_s": 0}))
    assert Results(folder).doubts() == []
    file.write_text(json.dumps(declared | {"study": declared["study"] | {"margin": 0.02}}))
    (doubt,) = Results(folder).doubts()
    assert doubt.startswith("study.json has been changed: 2 runs of 10 had another declaration.")


def test_declared_comparisons_cannot_be_taken_out(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=2)
    file = folder / "study.json"
    declared = json.loads(file.read_text())
    run = next((folder / "runs").iterdir())
    run.write_text(json.dumps(json.loads(run.read_text()) | {"declaration_sha256": digest_of(declared)}))
    assert Results(folder).doubts() == []
    fewer = [cell for cell in declared["cells"] if cell["arm"] != "weak"]
    file.write_text(json.dumps(declared | {"cells": fewer}))
    assert any(line.startswith("study.json has been changed") for line in Results(folder).doubts())


def test_sequential_runs_that_fail_are_pointed_out(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=4, lost=lambda cell: cell.arm == "sequential" and cell.seed < 2)
    for file in (folder / "runs").iterdir():
        run = json.loads(file.read_text())
        if run["arm"] == "sequential" and run["seed"] < 2:
            file.write_text(json.dumps(run | {"status": "not finite", "metrics": {}}))
    (doubt,) = Results(folder).doubts()
    assert doubt == "sequential: of its 4 runs 2 are not finite. Comparisons with them say little."


@pytest.mark.parametrize("damage", [{}, {"cells": None}, {"study": {"metric": "zzz"}}, {"base": {}}])
def test_a_damaged_declaration_is_named(tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = results(tmp_path, seeds=2)
    file = folder / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | damage if damage else {}))
    with pytest.raises(UserError, match=r"study\.json"):
        Results(folder)


@pytest.mark.parametrize("damage", [{"metrics": None}, {"metrics": {"test": {"accuracy": "x"}}}, {"facts": None}])
def test_a_damaged_run_is_passed_over(tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = results(tmp_path, seeds=2)
    run = next((folder / "runs").iterdir())
    run.write_text(json.dumps(json.loads(run.read_text()) | damage))
    assert Results(folder).missing() == 1


def test_rows_have_the_rate_that_was_used(tmp_path: Path) -> None:
    """A rule changes the base's rate: who checks the rule looks for the rate of the run."""
    curves = {"train/learning_rate": {"epoch": [1, 2], "step": [1, 2], "value": [0.2, 0.1]}}
    row = rows_of(Results(results(tmp_path, seeds=2, curves=curves)))[0]
    assert (row["learning_rate"], row["base_learning_rate"]) == (0.2, 0.003)


# Runs that are missing


def test_a_search_that_has_ended_gives_its_cells_their_runs(tmp_path: Path) -> None:
    """study.json does not know these ids: the settings were found later."""
    folder = results(tmp_path, seeds=2, arms=["weak_tuned"], world_sizes=[2])
    tuned = [cell for cell in json.loads((folder / "study.json").read_text())["cells"] if cell["id"] is None]
    assert {cell["arm"] for cell in tuned} == {"sequential_tuned", "weak_tuned"}
    assert Results(folder).missing() == 4
    assert Results(folder).searches == {}
    found: dict[str, dict[str, str]] = {"one": {}}
    for i, cell in enumerate(tuned):
        arm = f"{cell['arm']}, W = 2" if cell["world_size"] > 1 else cell["arm"]
        config = {"trainer": {"seed": i}}
        found["one"][f"{arm} seed {cell['seed']}"] = this = id_of_values(config)
        run = json.loads(next((folder / "runs").iterdir()).read_text()) | {"id": this, "config": config}
        (folder / "runs" / f"{this}.json").write_text(json.dumps(run))
    (folder / "tuning").mkdir()
    (folder / "tuning" / "found.json").write_text(json.dumps({"one": {"ids": found["one"]}}))
    read = Results(folder)
    assert read.missing() == 0
    assert {cell["id"] for cell in read.cells} >= set(found["one"].values())


def test_files_of_others_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Copies, notes and damaged files in a study's folder are named, and change no number."""
    out = results(tmp_path)
    timed(out, 1)
    before, times = rows_of(Results(out)), Results(out).timings
    assert "ignored" not in capsys.readouterr().out
    one = next((out / "runs").glob("*.json"))
    other = json.loads(one.read_text())
    other["config"]["trainer"]["seed"] += 100
    other["id"] = id_of_values(other["config"])
    names = (
        f"{one.stem} (copy).json",
        "notes.json",
        "list.json",
        "half.json",
        f"{other['id']}.json",
        "0" * 16 + ".json",
    )
    failed, changed = other | {"status": "failed"}, other | {"id": "0" * 16}
    texts = (one.read_text(), '{"id": "notes"}', "[]", '{"id": ', json.dumps(failed), json.dumps(changed))
    foreign = [out / "runs" / name for name in names]
    for file, text in zip(foreign, texts):
        file.write_text(text)
    copy = out / "timing" / "W1-0 (copy).json"
    copy.write_text((out / "timing" / "W1-0.json").read_text())
    again = Results(out)
    assert (rows_of(again), again.timings) == (before, times)
    said = capsys.readouterr().out
    assert all(f"note: {file} is not the result of a" in said for file in [*foreign, copy])
