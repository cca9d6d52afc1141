"""What watches over the promise: the guard, the comparison of ranks at start-up, `verify`, and the labels."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import USER_TASKS, small_config, train, train_interrupted, train_on_two_device_models
from trainer.commands.verify import first_difference, verify
from trainer.config.keys import Config
from trainer.errors import RanksDifferError, UserError
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks
from trainer.record.checkpoints import list_checkpoints

BAD = f"{USER_TASKS}/bad_tasks.py"


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    """It flips in the third step of 13 micro-batches over 3 ranks; the guard runs every second."""
    config = small_config(tmp_path / "run", task=f"{BAD}:FlipsABit", guard_every_steps=2)
    with pytest.raises(RanksDifferError, match=r"After step 4 rank 1 differs from the others, first in \S+\."):
        run_ranks(train, 3, config)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_without_the_interval_the_end_of_the_run_still_notices(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", task=f"{BAD}:FlipsABit", guard_every_steps=0, max_steps=6)
    with pytest.raises(RanksDifferError, match="After step 6 rank 1 differs"):
        run_ranks(train, 3, config)


def train_with_a_flipped_moment(ranks: Ranks, config: Config, rank: int, step: int) -> None:
    """A run in which one bit of one moment changes on one rank, after a step's update: a memory fault."""
    import torch

    from trainer.run.run import run

    def flip(done: int, engine: Any, losses: Any) -> None:
        if ranks.rank == rank and done == step:
            moment = engine.optimizer.state[engine.model.outer.weight]["exp_avg"]
            moment.view(-1).view(torch.int32)[5] ^= 1 << 3

    run(config, ranks, config_name="test", started_at_s=time.time(), trace=flip)


@pytest.mark.parametrize(("world_size", "rank", "who"), [(3, 0, "rank 0 differs"), (2, 1, "ranks 0 and 1 differ")])
def test_a_flipped_moment_is_in_no_checkpoint(tmp_path: Path, world_size: int, rank: int, who: str) -> None:
    """The parameters of that step are alike still: only the optimizer's state tells."""
    config = small_config(tmp_path / "run", guard_every_steps=1, checkpoint={"every_steps": 2, "keep": 9})
    with pytest.raises(RanksDifferError, match=rf"After step 6 {who}.*, first in optimizer outer\.weight\.exp_avg\."):
        run_ranks(train_with_a_flipped_moment, world_size, config, rank, 6)
    checkpoints = [checkpoint.name for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert "step-000000002" in checkpoints
    assert "step-000000006" not in checkpoints
    # What is there is good: from it the run comes to its right end.
    whole = run_ranks(train, 1, small_config(tmp_path / "whole"))[0]
    assert run_ranks(train_interrupted, 2, config, {})[0]["parameters_sha256"] == whole["parameters_sha256"]


def test_a_flipped_weight_is_in_no_checkpoint(tmp_path: Path) -> None:
    """The guard would have run only later."""
    extra = {"guard_every_steps": 0, "checkpoint": {"every_steps": 6, "keep": 9}}
    config = small_config(tmp_path / "run", task=f"{BAD}:FlipsABit", **extra)
    with pytest.raises(
        RanksDifferError, match=r"After step 6 rank 1 differs from the others, first in parameter \S+\."
    ):
        run_ranks(train, 3, config)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


def test_what_an_optimizer_keeps_of_rows_that_a_forward_rescales_stops_no_labelled_run(tmp_path: Path) -> None:
    """With weight decay its moments follow the parameter, which ranks rescale by their own lookups."""
    adam = {"type": "Adam", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True, "adam_w_mode": False}}
    extra = {"optimizer": adam, "guard_every_steps": 1, "checkpoint": {"every_steps": 2}, "max_steps": 4}
    config = small_config(tmp_path / "run", task=f"{BAD}:RescalesRows", **extra)
    summary = run_ranks(train, 2, config)[0]
    assert summary["exactness"] == "tolerance"
    assert any("Embedding with max_norm rescales the rows" in reason for reason in summary["inexact"])
    assert list_checkpoints(tmp_path / "run" / "checkpoints")


def test_ranks_with_other_data_are_refused_before_training(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", task=f"{BAD}:OtherDataOnRank1")
    with pytest.raises(UserError, match=r"rank 1 on .* has another data of train than the other ranks"):
        run_ranks(train, 3, config)
    assert not (tmp_path / "run").exists()


def test_ranks_on_two_device_models_are_labelled_and_audit_themselves(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", audit_every_steps=1, epochs=1)
    summary = run_ranks(train_on_two_device_models, 3, config)[0]
    assert summary["exactness"] == "tolerance"
    (reason,) = summary["inexact"]
    assert "rank 2 on" in reason
    assert "runs on another processor, others on" in reason
    with pytest.raises(UserError, match="runs on another processor"):
        run_ranks(train_on_two_device_models, 3, small_config(tmp_path / "bitwise", exactness="bitwise"))


def train_from_a_folder_of_its_own(ranks: Ranks, config: Config, folder: str) -> None:
    """As on machines with different checkouts: the same path, and another file."""
    import os

    from trainer.run.run import run

    os.chdir(Path(folder) / str(ranks.rank))
    run(config, ranks, config_name="test", started_at_s=time.time())


def test_ranks_with_different_code_of_a_task_are_refused(tmp_path: Path) -> None:
    source = Path(f"{USER_TASKS}/my_task.py").read_text()
    for rank, more in enumerate(["", "", "more = 1\n"]):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "my_task.py").write_text(source + more)
    config = small_config(tmp_path / "run", task="my_task.py:MyTask")
    with pytest.raises(UserError, match=r"rank 2 on .* has another task_code_sha256 than the other ranks"):
        run_ranks(train_from_a_folder_of_its_own, 3, config, str(tmp_path))


def test_two_device_models_hide_no_other_difference(tmp_path: Path) -> None:
    """Hosts with other data do not go on under the label."""
    config = small_config(tmp_path / "run", task=f"{BAD}:OtherDataOnRank1")
    with pytest.raises(UserError, match=r"rank 1 on .* has another data of train than the other ranks"):
        run_ranks(train_on_two_device_models, 3, config)
    assert not (tmp_path / "run").exists()


def test_verify_passes_an_exact_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(small_config(tmp_path / "run", epochs=1), [1, 3]) == 0
    out = capsys.readouterr().out
    assert "The same bits at every world size, in each of 5 steps" in out
    assert not (tmp_path / "run").exists(), "verify works in a scratch folder"


def test_verify_compares_sizes_of_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path / "run", epochs=2)  # 10 steps: packs are used from the fourth on, also with "auto"
    assert verify(config, [1, 2], [1, 2, "auto"]) == 0
    out = capsys.readouterr().out
    assert "2 ranks, packs of auto: " in out
    rows = [line.split()[:2] for line in out.splitlines() if line.endswith(("yes", "reference"))]
    assert re.search(r"^ *1 +auto \((?!1\))", out, re.MULTILINE), "it looks for packs in so short a run, too"
    assert rows == [["1", "1"], ["2", "1"], ["1", "2"], ["2", "2"], ["1", "auto"], ["2", "auto"]]
    assert "The same bits at every world size and with all packs, in each of 10 steps" in out


def test_verify_points_at_the_step_of_rank_seeded_randomness(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(small_config(tmp_path / "run", task=f"{BAD}:RankNoise", max_steps=3), [1, 2]) == 1
    out = capsys.readouterr().out
    assert "NO: first at step 1, in loss" in out
    assert "NOT the same bits" in out


def test_verify_reports_ranks_that_differ_within_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(small_config(tmp_path / "run", task=f"{BAD}:FlipsABit", max_steps=4), [2]) == 1
    assert "NO: After step" in capsys.readouterr().out


def test_verify_takes_a_stop_at_the_same_step_for_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(small_config(tmp_path / "run", task=f"{BAD}:InfiniteLater"), [1, 2]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^2 .* 2, stopped at 3 .* yes", out, re.MULTILINE)
    assert re.search(r"^2 ranks, stopped: Step 3 is not finite: the loss of micro-batch \d+ is", out, re.MULTILINE)
    assert "Every run stopped at step 3 for the same reason. Before it, the same bits" in out


def test_verify_refuses_weak_scaling(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weak scaling"):
        verify(small_config(tmp_path / "run", train_batch_size=None, gradient_accumulation_steps=2), [1, 2])


def test_first_difference_names_step_and_tensor(tmp_path: Path) -> None:
    steps = [{"loss": "a", "parameter w": "b", "optimizer w.exp_avg": "c"}] * 3
    changed = [steps[0], {**steps[1], "parameter w": "x", "optimizer w.exp_avg": "y"}, steps[2]]
    for name, lines in (("one", steps), ("other", changed)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert first_difference(tmp_path / "one", tmp_path / "one") is None
    assert first_difference(tmp_path / "one", tmp_path / "other") == (2, "parameter w")


@pytest.mark.parametrize(
    ("task", "reason"), [("StatefulModel", "buffer seen changes"), ("SyncNorm", "is a SyncBatchNorm")]
)
def test_a_model_that_cannot_be_exact_is_labelled_or_refused(tmp_path: Path, task: str, reason: str) -> None:
    if task == "StatefulModel":
        # Ranks differ in that buffer, and the guard leaves it alone.
        summary = run_ranks(train, 2, small_config(tmp_path / "auto", task=f"{BAD}:{task}", guard_every_steps=1))[0]
        assert summary["exactness"] == "tolerance"
        manifest = json.loads((tmp_path / "auto" / "manifest.json").read_text())
        assert manifest["exactness"] == "tolerance"
        assert reason in manifest["inexact"][0]
    with pytest.raises(UserError, match=reason):
        run_ranks(train, 2, small_config(tmp_path / "bitwise", task=f"{BAD}:{task}", exactness="bitwise"))
    assert not (tmp_path / "bitwise").exists()


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_trains_within_tolerance_and_says_so(tmp_path: Path, stage: int) -> None:
    """Uneven blocks and a last batch smaller than the world, with DeepSpeed's own reduction."""
    exact = run_ranks(train, 1, small_config(tmp_path / "exact", epochs=2))[0]
    config = small_config(tmp_path / "zero", epochs=2, zero_optimization={"stage": stage})
    ranks = run_ranks(train, 3, config)
    assert {summary["exactness"] for summary in ranks} == {"tolerance"}
    assert len({summary["model_sha256"] for summary in ranks}) == 1
    assert ranks[0]["metrics"]["test"]["loss"] == pytest.approx(exact["metrics"]["test"]["loss"], rel=0.02)
    assert (tmp_path / "zero" / "model" / "model.safetensors").stat().st_size == (
        tmp_path / "exact" / "model" / "model.safetensors"
    ).stat().st_size
