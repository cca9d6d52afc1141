"""A study's runs in TensorBoard, read back as TensorBoard reads them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.record.board import tab, value
from trainer.study.hparams import write_hparams


def row(arm: str, world_size: int, seed: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {
        "variant": "", "arm": arm, "budget": "epochs", "world_size": world_size, "seed": seed,
        "config_sha256": f"{arm}{world_size}{seed}", "global_batch_size": 32 * world_size, "learning_rate": 0.1,
        "epochs": 20, "steps": 760, "status": "not finite" if accuracy is None else "finished",
        "started_at_s": 1000.0, "wall_time_s": 2.0, "device_model": "x", "test/accuracy": accuracy, "test/loss": 1.0,
    } | more  # fmt: skip


def test_the_hparams_tab_finds_every_run(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    rows = [row("weak", W, seed, None if (W, seed) == (8, 1) else 0.9 + W / 1000) for W in (2, 8) for seed in (0, 1)]
    rows += [row("sequential", 1, 0, 0.95, variant=name, learning_rate=None) for name in ("", "a/b", "a b", "../b")]
    for _ in range(2):  # and again, in place of the first
        write_hparams(tmp_path, rows)
    groups = {group.name: group for group in tab(tmp_path / "tensorboard")[1]}
    assert len(groups) == len(rows)
    names = {file.name for file in (tmp_path / "tensorboard").iterdir() if file.is_dir()}
    assert names == set(groups)
    assert {"weak-epochs-W2-seed0", "weak-epochs-W8-seed1", "sequential-epochs-W1-seed0"} <= names
    assert all("/" not in name for name in names)

    group = groups["weak-epochs-W2-seed0"]
    found = {key: value(part) for key, part in group.hparams.items()}
    assert found == {
        "variant": "base", "arm": "weak", "budget": "epochs", "world_size": 2, "seed": 0, "global_batch_size": 64,
        "learning_rate": 0.1, "epochs": 20, "steps": 760, "status": "finished", "config_sha256": "weak20",
    }  # fmt: skip
    metrics = {m.name.tag: m.value for m in group.metric_values}
    assert metrics == {"test/accuracy": pytest.approx(0.902), "test/loss": 1.0}
    assert (group.sessions[0].start_time_secs, group.sessions[0].end_time_secs) == (1000, 1002)
    assert group.sessions[0].status == api_pb2.STATUS_SUCCESS
    broken = groups["weak-epochs-W8-seed1"]
    assert broken.sessions[0].status == api_pb2.STATUS_FAILURE
    assert {m.name.tag for m in broken.metric_values} == {"test/loss"}
    assert value(broken.hparams["status"]) == "not finite"
    assert not groups["sequential-epochs-W1-seed0"].hparams["learning_rate"].WhichOneof("kind")
    assert [file.name for file in tmp_path.iterdir()] == ["tensorboard"]


def test_metrics_are_read_by_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_hparams(tmp_path, [row("weak", 2, 0, 0.9)])
    events = EventAccumulator(str(folder / "weak-epochs-W2-seed0")).Reload()
    assert [event.value for event in events.Scalars("test/accuracy")] == [pytest.approx(0.9)]
    assert re.match(r"events\.out\.tfevents\.\d+", next((folder / "weak-epochs-W2-seed0").iterdir()).name)


def test_a_thousand_runs_take_seconds(tmp_path: Path) -> None:
    began_s = time.monotonic()
    folder = write_hparams(tmp_path, [row("weak", 2**i, seed, 0.9) for i in range(10) for seed in range(100)])
    assert time.monotonic() - began_s < 20  # one second, on a machine that is left alone
    assert len(list(folder.rglob("events.*"))) == 1001


def test_the_tab_offers_boxes_for_few_values_and_a_range_for_many(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import api_pb2

    rows = [row("weak", W, seed, 0.9) for W in (2, 8) for seed in range(31)]
    experiment, _ = tab(write_hparams(tmp_path, rows))
    infos = {info.name: info for info in experiment.hparam_infos}
    assert [v.number_value for v in infos["world_size"].domain_discrete.values] == [2, 8]
    assert (infos["seed"].domain_interval.min_value, infos["seed"].domain_interval.max_value) == (0, 30)
    assert infos["arm"].type == api_pb2.DATA_TYPE_STRING
    assert [v.string_value for v in infos["status"].domain_discrete.values] == ["finished"]
    assert "device_model" not in infos
    assert {info.name.tag for info in experiment.metric_infos} == {"test/accuracy", "test/loss"}


def test_a_metric_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    """TensorBoard's pages fail on a nan."""
    _, (group,) = tab(write_hparams(tmp_path, [row("weak", 2, 0, float("nan"))]))
    assert {m.name.tag for m in group.metric_values} == {"test/loss"}


def test_runs_of_the_same_name_have_folders_of_their_own(tmp_path: Path) -> None:
    names = ["x" * 100, "x" * 99 + "y", "x" * 99 + "y"]
    folder = write_hparams(tmp_path, [row("weak", 2, 0, 0.9, variant=name) for name in names])
    made = sorted(file.name for file in folder.iterdir() if file.is_dir())
    assert made == [f"weak-epochs-W2-seed0-{'x' * 60}{end}" for end in ("", "-2", "-3")]
