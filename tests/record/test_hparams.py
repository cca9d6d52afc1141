"""A run's row in TensorBoard's HParams tab, read back as the tab reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.record.board import tab, value
from trainer.config.keys import parse
from trainer.record.hparams import settings
from trainer.record.writer import Writer


def test_the_settings_that_tell_runs_apart() -> None:
    config = parse(
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.002, "betas": [0.9, 0.999], "weight_decay": 0.01}},
            "trainer": {"task": "digits", "seed": 7, "epochs": 3, "task_options": {"model": "cnn"}},
        }
    ).as_dict()
    config["trainer"]["task_options"] |= {"words": 5, "lower": True, "columns": ["a"], "long": "x" * 500, "no": None}
    found = settings(config)
    assert found.items() >= {
        "task": "digits", "optimizer": "AdamW", "learning_rate": 0.002, "optimizer.weight_decay": 0.01, "epochs": 3,
        "seed": 7, "task_options.model": "cnn", "task_options.words": 5, "task_options.lower": True,
    }.items()  # fmt: skip
    assert len(str(found["task_options.long"])) == 100
    assert all(isinstance(part, (str, int, float, bool)) for part in found.values())
    assert not {"optimizer.betas", "optimizer.lr", "max_steps", "task_options.columns", "task_options.no"} & set(found)


def test_an_interrupted_run_has_one_row(tmp_path: Path) -> None:
    """It says how many ranks the last process had, and takes the results of the end."""
    from tensorboard.plugins.hparams import api_pb2

    for first_step, W in ((0, 1), (20, 4)):
        writer = Writer(tmp_path / "one", tensorboard=True, after_step=first_step) if first_step else None
        if writer is None:
            (tmp_path / "one").mkdir()
            writer = Writer(tmp_path / "one", tensorboard=True)
        writer.set_row({"world_size": W, "optimizer": "SGD", "nesterov": True}, 1000.0)
        writer.write({"step": first_step + 10, "epoch": 1, "train/loss": 1.0 / W})
        if W == 4:
            writer.end_row({"test/accuracy": 0.5}, 1060.0, 40)
        writer.close()
        (row,) = tab(tmp_path)[1]
        assert {key: value(part) for key, part in row.hparams.items()} == {
            "world_size": W, "optimizer": "SGD", "nesterov": True,
        }  # fmt: skip
        assert row.sessions[0].status == (api_pb2.STATUS_SUCCESS if W == 4 else api_pb2.STATUS_UNKNOWN)
    metrics = {metric.name.tag: metric.value for metric in row.metric_values}
    assert metrics.items() >= {"result/test/accuracy": pytest.approx(0.5), "train/loss": 0.25}.items()
    assert (row.sessions[0].start_time_secs, row.sessions[0].end_time_secs) == (1000, 1060)


def test_runs_with_other_settings_share_the_tab(tmp_path: Path) -> None:
    for name, shown in {"a": {"task_options.model": "cnn"}, "b": {"task_options.depth": 3}}.items():
        (tmp_path / name).mkdir()
        writer = Writer(tmp_path / name, tensorboard=True)
        writer.set_row(shown, 1000.0)  # type: ignore[arg-type]
        writer.close()
    experiment, rows = tab(tmp_path)
    assert {info.name for info in experiment.hparam_infos} == {"task_options.model", "task_options.depth"}
    assert len(rows) == 2


def test_without_tensorboard_there_is_no_row(tmp_path: Path) -> None:
    writer = Writer(tmp_path, tensorboard=False)
    writer.set_row({"world_size": 1}, 1000.0)
    writer.arrange(tokens=True, mfu=True)
    writer.end_row({"test/accuracy": 0.5}, 1060.0, 40)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
