"""Finished runs at other numbers of ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer.config.keys import parse
from trainer.record import earlier
from trainer.record.earlier import Earlier

KEYS: dict[str, Any] = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}


def finished(folder: Path, world_size: int, speed: Any, sha: str = "a", time: int = 1, **trainer: Any) -> None:
    folder.mkdir()
    summary = {"world_size": world_size, "samples_per_s": speed, "parameters_sha256": sha}
    (folder / "summary.json").write_text(json.dumps(summary))
    config = parse(KEYS | {"trainer": {"output_dir": str(folder), **trainer}}).as_dict()
    (folder / "manifest.json").write_text(json.dumps({"config": config, "facts": {"device_model": "a GPU"}}))
    os.utime(folder / "summary.json", (time, time))


def test_runs_that_made_the_same_model_are_found(tmp_path: Path) -> None:
    finished(tmp_path / "old", 1, 100.0, time=1)
    finished(tmp_path / "new", 1, 110.0, time=2)
    finished(tmp_path / "eight", 8, 300.0)
    finished(tmp_path / "own", 2, 190.0)
    finished(tmp_path / "other", 4, 100.0, sha="b")
    finished(tmp_path / "short", 16, float("nan"))
    for name, content in {"damaged": "{", "list": "[]", "failed": '{"status": "lost"}', "none": "null"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(content)
    summary = {"world_size": 2, "parameters_sha256": "a"}
    found = earlier.of_this_model(summary, tmp_path / "own")
    assert found == {1: Earlier(tmp_path / "new", 110.0), 8: Earlier(tmp_path / "eight", 300.0)}


def test_runs_with_the_same_steps_are_found(tmp_path: Path) -> None:
    finished(tmp_path / "one", 1, 100.0, seed=3, epochs=7)
    finished(tmp_path / "two", 2, 190.0)
    finished(tmp_path / "mlp", 4, 900.0, task_options={"model": "mlp"})
    (tmp_path / "one" / "extra").write_text("")
    found = earlier.of_this_config(parse(dict(KEYS)).as_dict(), tmp_path)
    assert {W: run.folder.name for W, run in found.items()} == {1: "one", 2: "two"}
    assert earlier.of_this_config(parse(dict(KEYS)).as_dict(), tmp_path / "none") == {}


def test_more_ranks_that_do_not_pay_are_named() -> None:
    one, two = Earlier(Path("runs/one"), 100.0), Earlier(Path("runs/two"), 64.0)
    assert earlier.compared(2, 190.0, 1, one) == "1.90 times as fast as 1 rank (one)"
    assert earlier.compared(2, 64.0, 1, one).endswith("1 rank (one): 2 ranks don't pay here, 1 is faster")
    assert earlier.compared(1, 100.0, 2, two).endswith("2 ranks (two): 2 ranks don't pay here, 1 is faster")
    assert earlier.compared(4, 50.0, 2, two).endswith("4 ranks don't pay here, 2 are faster")
    assert "pay" not in earlier.compared(1, 50.0, 2, two)


def manifest_of(folder: Path, **trainer: Any) -> dict[str, Any]:
    config = parse(KEYS | {"trainer": {"output_dir": str(folder), **trainer}}).as_dict()
    return {"config": config, "facts": {"device_model": "a GPU"}}


def test_a_run_is_compared_with_the_last_of_its_config_at_another_size(tmp_path: Path) -> None:
    finished(tmp_path / "old", 1, 100.0, time=1)
    finished(tmp_path / "eight", 8, 300.0, time=2)
    finished(tmp_path / "last", 4, 200.0, time=3)
    finished(tmp_path / "same", 2, 190.0, time=4)
    finished(tmp_path / "longer", 1, 100.0, time=5, epochs=99)
    finished(tmp_path / "elsewhere", 1, 100.0, time=6)
    (tmp_path / "elsewhere" / "manifest.json").write_text(
        json.dumps(manifest_of(tmp_path) | {"facts": {"device_model": "another GPU"}})
    )
    own = tmp_path / "own"
    assert earlier.at_another_size(manifest_of(own), 2, own) == (4, Earlier(tmp_path / "last", 200.0))
    assert earlier.at_another_size(manifest_of(own), 4, own) == (2, Earlier(tmp_path / "same", 190.0))
    assert earlier.at_another_size(manifest_of(own, seed=3), 2, own) is None
    assert earlier.at_another_size(manifest_of(own), 2, tmp_path / "none" / "own") is None


def test_what_lies_beside_a_run_is_passed_over(tmp_path: Path) -> None:
    contents = {
        "deep": "[" * 100_000, "bytes": "\udcff", "zero": '{"world_size": 0, "samples_per_s": 1.0}',
        "yes": '{"world_size": true, "samples_per_s": 1.0}', "alone": '{"world_size": 1, "samples_per_s": 1.0}',
        "text": '{"world_size": 1, "samples_per_s": "1"}',
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(content, errors="surrogateescape")
    for name, facts in {"list": "[]", "no facts": json.dumps(manifest_of(tmp_path) | {"facts": None})}.items():
        finished(tmp_path / name, 1, 100.0)
        (tmp_path / name / "manifest.json").write_text(facts)
    (tmp_path / "folder" / "summary.json").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "summary.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "summary.json")
    (tmp_path / "summary.json").write_text("a file of the user's")
    assert earlier.at_another_size(manifest_of(tmp_path / "own"), 2, tmp_path / "own") is None
    found = earlier.of_this_config(parse(dict(KEYS)).as_dict(), tmp_path)
    assert {W: run.folder.name for W, run in found.items()} == {1: "no facts"}


def test_an_efficiency_is_a_share_of_the_speed_of_a_rank() -> None:
    one, four = Earlier(Path("runs/one"), 100.0), Earlier(Path("runs/four"), 320.0)
    assert earlier.efficiency(4, 320.0, 1, one) == 0.8  # T1 / (4 T4)
    assert earlier.efficiency(1, 100.0, 4, four) == 1.25
    assert earlier.efficiency(8, 480.0, 4, four) == 0.75  # 4 T4 / (8 T8)
