"""An interrupted run goes on, at any other number of ranks, to the bits of the run that nobody disturbed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import linear_is_torchs, small_config, train, train_interrupted
from tests.distributed.test_exactness import BF16, digits
from tests.distributed.test_options import ADAMW, overfits, words
from tests.standing import run_ranks
from trainer.config.keys import Config
from trainer.errors import UserError
from trainer.exact.checks.hashes import state_sha256
from trainer.exact.splits import Split
from trainer.record.checkpoints import list_checkpoints, way_on
from trainer.run.banner import banner


def curve(folder: Path) -> list[dict[str, float]]:
    """All records of a run, without times and memory."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("throughput/", "memory/", "time_s"))} for line in lines]


def interrupted(make: Any, path: Path, sessions: list[tuple[int, int]], rank: int = 0) -> dict[str, Any]:
    """Runs in sessions of (world size, step after which one rank gets a SIGTERM; 0 for the end)."""
    merged: dict[int, dict[str, str]] = {}
    for number, (W, stop) in enumerate(sessions):
        result = run_ranks(train_interrupted, W, make(path), {stop: min(rank, W - 1)})[0]
        merged |= result["trace"]
        if stop:
            assert "SIGTERM" in result["stopped"], number
            assert not (path / "summary.json").exists()
    return result | {"trace": [merged[step] for step in sorted(merged)]}


def same_end(make: Any, tmp_path: Path, sessions: list[tuple[int, int]], rank: int = 0) -> dict[str, Any]:
    reference = run_ranks(train, 2, make(tmp_path / "whole"))[0]
    result = interrupted(make, tmp_path / "parts", sessions, rank)
    for step, (a, b) in enumerate(zip(reference["trace"], result["trace"], strict=True), start=1):
        assert a == b, (step, [name for name in a if a[name] != b.get(name)])
    for name in ("parameters_sha256", "model_sha256", "metrics", "steps", "exactness"):
        assert result[name] == reference[name], name
    for name in ("gradient_noise", "adascale"):
        assert result.get(name) == reference.get(name), name
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    saved = [state_sha256(load_file(tmp_path / n / "model" / "model.safetensors")) for n in ("whole", "parts")]
    assert saved[0] == saved[1]
    return result


@pytest.mark.parametrize("precision", [{}, BF16], ids=["fp32", "bf16"])
def test_digits_in_the_middle_of_an_epoch(tmp_path: Path, precision: dict[str, Any]) -> None:
    rate = {"schedule": "cosine", "warmup_epochs": 1}
    result = same_end(
        lambda path: digits(path, "cnn", learning_rate=rate, **precision), tmp_path, [(1, 4), (3, 8), (8, 11), (2, 0)]
    )
    history = json.loads((tmp_path / "parts" / "manifest.json").read_text())["history"]
    assert [h["world_size"] for h in history] == [1, 3, 8, 2]
    assert history[0]["from_step"] == 0
    assert result["world_size"] == 2


def test_the_best_model_and_early_stopping(tmp_path: Path) -> None:
    best = {"metric": "loss", "patience_evaluations": 2}
    result = same_end(lambda path: overfits(path, best=best), tmp_path, [(2, 7), (1, 11), (3, 0)], rank=1)
    assert result["status"] == "stopped early"


@pytest.mark.parametrize(
    "extra",
    [
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}},
        {"optimizer": {"type": "Adagrad", "params": {"lr": 0.01}}},
        {"optimizer": {"type": "NAdam", "params": {"lr": 0.01}}},
        {"parameter_groups": {"outer": {"lr": 0.002}}, "optimizer": ADAMW},
    ],
    ids=["sgd", "deepspeed's schedule", "adagrad", "nadam", "groups"],
)
def test_every_kind_of_state(tmp_path: Path, extra: dict[str, Any]) -> None:
    same_end(lambda path: small_config(path, **extra), tmp_path, [(2, 7), (3, 0)])


def test_texts_and_frozen_weights(tmp_path: Path) -> None:
    same_end(lambda path: words(path, freeze=["words"]), tmp_path, [(3, 3), (2, 0)])


def killed_after(path: Path, steps: int, **extra: Any) -> Config:
    """A finished run of `steps` steps, with a checkpoint every 2, made to look like one that was killed."""
    run_ranks(train, 2, small_config(path, checkpoint={"every_steps": 2, "keep": 4}, max_steps=steps, **extra))
    (path / "summary.json").unlink()
    shutil.rmtree(path / "checkpoints" / f"step-{steps:09d}")
    return small_config(path, checkpoint={"every_steps": 2, "keep": 3}, **extra)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": lambda c: flip_a_bit(c / "model.safetensors"),
    "truncated": lambda c: (c / "optimizer.safetensors").write_bytes((c / "optimizer.safetensors").read_bytes()[:-9]),
    "missing file": lambda c: (c / "model.safetensors").unlink(),
    "flipped bit in the manifest": lambda c: flip_a_bit(c / "manifest.json"),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "empty manifest": lambda c: (c / "manifest.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    reference = run_ranks(train, 1, small_config(tmp_path / "whole"))[0]
    config = killed_after(tmp_path / "run", 9)
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [c.name for c in checkpoints] == ["step-000000008", "step-000000006", "step-000000004"]
    DAMAGES[damage](checkpoints[0])
    result = run_ranks(train_interrupted, 3, config, {})[0]
    assert min(result["trace"]) == 7
    assert result["parameters_sha256"] == reference["parameters_sha256"]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_all_damaged_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    config = killed_after(tmp_path / "run", 5)
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (checkpoint / "model.safetensors").write_bytes(b"")
    before = sorted(str(p) for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match=r"All checkpoints .* damaged: .*step-000000004/model.safetensors has 0 bytes"):
        run_ranks(train_interrupted, 2, config, {})
    assert sorted(str(p) for p in (tmp_path / "run").rglob("*")) == before


def test_a_changed_config(tmp_path: Path) -> None:
    config = killed_after(tmp_path / "run", 5)
    harmless = dataclasses.replace(config.trainer, log_every_steps=3, guard_every_steps=1, hang_timeout_s=60.0)
    changed = dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, seed=1), gradient_clipping=0.25, train_batch_size=96
    )
    with pytest.raises(UserError) as caught:
        run_ranks(train_interrupted, 2, changed, {})
    for words_of_it in ("trainer.seed: 0 before, 1 now", "gradient_clipping: 0.5 before, 0.25", "104 before, 96 now"):
        assert words_of_it in str(caught.value)
    assert "--allow_changed_config" in str(caught.value)
    reference = run_ranks(train, 1, small_config(tmp_path / "whole"))[0]
    result = run_ranks(train_interrupted, 3, dataclasses.replace(config, trainer=harmless), {})[0]
    assert result["parameters_sha256"] == reference["parameters_sha256"]
    assert result["exactness"] == "bitwise"
    # It has come to its end: nothing is done again.
    again = run_ranks(train_interrupted, 2, config, {})[0]
    assert again["trace"] == {}
    assert again["parameters_sha256"] == reference["parameters_sha256"]


def test_going_on_elsewhere(tmp_path: Path) -> None:
    """--resume DIR with another output folder: the first run's folder stays as it is."""
    reference = run_ranks(train, 1, small_config(tmp_path / "whole"))[0]
    killed_after(tmp_path / "run", 7)
    older = list_checkpoints(tmp_path / "run" / "checkpoints")[1]
    before = sorted(str(p) for p in (tmp_path / "run").rglob("*"))
    config = small_config(tmp_path / "other")
    result = run_ranks(train_interrupted, 2, config, {}, str(older))[0]
    assert result["parameters_sha256"] == reference["parameters_sha256"]
    assert curve(tmp_path / "other") == curve(tmp_path / "whole")
    assert sorted(str(p) for p in (tmp_path / "run").rglob("*")) == before
    with pytest.raises(UserError, match=r"step-000000006 in the same folder is newer"):
        run_ranks(train_interrupted, 1, small_config(tmp_path / "run"), {}, str(older))
    with pytest.raises(UserError, match="no checkpoint"):
        run_ranks(train_interrupted, 1, small_config(tmp_path / "x"), {}, str(tmp_path))
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_goes_on_within_tolerance(tmp_path: Path, stage: int) -> None:
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    whole = run_ranks(train, 2, small_config(tmp_path / "whole", **zero))[0]
    first = run_ranks(train_interrupted, 2, small_config(tmp_path / "run", **zero), {6: 1})[0]
    assert "stopped" in first
    result = run_ranks(train_interrupted, 3, small_config(tmp_path / "run", **zero), {})[0]
    assert result["exactness"] == "tolerance"
    assert result["steps"] == whole["steps"]
    assert result["metrics"]["test"]["loss"] == pytest.approx(whole["metrics"]["test"]["loss"], rel=1e-2)
    # Stage 3 replaces torch's own function. A later run in the same process would have other bits.
    assert run_ranks(linear_is_torchs, 3) == [True] * 3


def test_time_budget(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", max_wall_time_s=0.001)
    result = run_ranks(train_interrupted, 3, config, {})[0]
    assert "wall-time budget" in result["stopped"]
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000000001"]


@pytest.mark.parametrize(("every_steps", "left"), [(500, ["step-000000003"]), (0, [])])
def test_a_run_that_is_shorter_than_the_interval_keeps_its_last_step(
    tmp_path: Path, every_steps: int, left: list[str]
) -> None:
    run_ranks(train, 1, small_config(tmp_path / "run", max_steps=3, checkpoint={"every_steps": every_steps}))
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == left


@pytest.mark.parametrize(("first_step", "words"), [(0, "at the first step, "), (1200, "at step 1,201, ")])
def test_the_start_up_lines_name_the_step_of_their_learning_rate(first_step: int, words: str) -> None:
    config = small_config("unused")
    pieces: Any = SimpleNamespace(
        config=config,
        plan=config.plan(1),
        host_splits={"train": Split({"x": torch.zeros(500, 2)})},
        total_steps=1500,
        steps_per_epoch=5,
        facts={"device_model": "a device"},
        engine=SimpleNamespace(model=torch.nn.Linear(2, 2)),
        task=None,
        inexact=[],
    )
    assert f"AdamW, learning rate 0.01 {words}gradients clipped" in "\n".join(banner(pieces, None, 0.01, first_step))


def test_the_way_on_speaks_only_of_checkpoints_that_are_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    nowhere = "There is no checkpoint yet, so the run has to begin again: start it with --resume auto --output_dir "
    assert way_on(run) == f"{nowhere}{run}."
    last = "To go on from the last checkpoint"
    assert way_on(run, began=True).startswith(f"{last}, start"), "of another machine's folder"
    (run / "checkpoints" / ".step-000000500.1").mkdir(parents=True)  # half written
    assert way_on(run, began=True) == f"{nowhere}{run}."
    assert way_on(run, resumed=True) == "Start the same command again: it goes on from the same checkpoint."
    for step in (500, 1000):
        (run / "checkpoints" / f"step-{step:09d}").mkdir()
    assert way_on(run).startswith(f"{last}, that of step 1,000, start the run again with --resume auto --output_dir")
