"""Loggers beside TensorBoard. What has a package of its own is tried where it is installed, without a network."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer.config.loggers import CometOptions, CsvMonitorOptions, MlflowOptions, WandbOptions
from trainer.record import loggers as module
from trainer.record.loggers import About, Loggers

RECORDS = [({"train/loss": 2.5, "throughput/samples_per_s": 10.0}, 10), ({"eval/validation/accuracy": 0.5}, 5)]


def about(folder: Path, after_step: int = 0) -> About:
    folder.mkdir(exist_ok=True)
    return About(folder, 1.0, {"trainer": {"seed": 3}, "optimizer": {"params": {}}}, after_step)


def log(blocks: dict[str, Any], of: About) -> Loggers:
    loggers = Loggers(blocks, of)
    for record in RECORDS:
        loggers.write(*record)
    loggers.close()
    return loggers


def rows(file: Path) -> list[list[str]]:
    return list(csv.reader(file.open()))


def test_csv_files_are_deepspeeds(tmp_path: Path) -> None:
    loggers = log({"csv_monitor": CsvMonitorOptions(True, job_name="mine")}, about(tmp_path))
    folder = tmp_path / "csv_monitor" / "mine"
    assert loggers.places == [f"csv_monitor: files in {folder}"] and loggers.notes() == []
    assert rows(folder / "train_loss.csv") == [["step", "loss"], ["10", "2.5"]]
    assert rows(folder / "eval_validation_accuracy.csv") == [["step", "accuracy"], ["5", "0.5"]]


def test_csv_files_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Steps that are made again replace those that were there; files of another run are left alone."""
    blocks = {"csv_monitor": CsvMonitorOptions(True)}
    log(blocks, about(tmp_path))
    assert log(blocks, about(tmp_path, after_step=7)).notes() == []
    file = tmp_path / "csv_monitor" / "train_loss.csv"
    assert rows(file) == [["step", "loss"], ["10", "2.5"]]
    assert len(rows(tmp_path / "csv_monitor" / "eval_validation_accuracy.csv")) == 3
    (note,) = log(blocks, about(tmp_path)).notes()
    assert "csv_monitor does not log this run" in note and "files of another run" in note
    assert len(rows(file)) == 2


def test_a_logger_that_fails_is_left_out_and_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        place = "broken"
        calls = 0

        def write(self, record: Mapping[str, float], step: int) -> None:
            Broken.calls += 1
            raise ConnectionError("the server is gone\nand more")

        def close(self) -> None:
            raise AssertionError("never reached")

    monkeypatch.setitem(module.KINDS, "mlflow", lambda options, about: Broken())
    loggers = log({"mlflow": MlflowOptions(True), "csv_monitor": CsvMonitorOptions(True)}, about(tmp_path))
    assert loggers.notes() == ["note: mlflow does not log this run: the server is gone. Nothing else is lost."]
    assert loggers.notes() == [] and Broken.calls == 1
    assert (tmp_path / "csv_monitor" / "train_loss.csv").exists()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")  # as a user has configured it
    loggers = log({"wandb": WandbOptions(True, project="mine")}, about(tmp_path))
    assert loggers.notes() == []
    assert loggers.places == [f"wandb: project mine, offline, in {tmp_path / 'wandb'}: nothing leaves this machine"]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"eval/validation/accuracy" in content and b"train/loss" in content


def test_mlflow_in_a_folder(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    blocks = {"mlflow": MlflowOptions(True, tracking_uri=str(tmp_path / "mlruns"), experiment_name="e")}
    of = about(tmp_path / "run")
    assert log(blocks, of).notes() == []
    assert log(blocks, of._replace(after_step=7)).notes() == []  # goes on in the same run
    client = mlflow.MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params["trainer.seed"] == "3"
    assert {m.step for m in client.get_metric_history(run.info.run_id, "train/loss")} == {10}
    assert run.data.metrics["eval/validation/accuracy"] == 0.5


def test_comet_offline(tmp_path: Path) -> None:
    pytest.importorskip("comet_ml", exc_type=ImportError)
    loggers = log({"comet": CometOptions(True, online=False)}, about(tmp_path))
    assert loggers.notes() == []
    assert loggers.places == [f"comet: offline, in {tmp_path / 'comet'}: nothing leaves this machine"]
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as files:
        content = b"".join(files.read(name) for name in files.namelist())
    assert b"train/loss" in content and b"trainer.seed" in content
