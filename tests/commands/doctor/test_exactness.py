"""Which numbers of ranks `doctor` tries, and that what differs fails. The runs themselves are tested elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.commands.doctor import exactness
from trainer.commands.doctor.machine import Machine
from trainer.errors import LostRankError, RanksDifferError, TrainerError

CPU = Machine(gpus=0, cores=2)


@pytest.mark.parametrize(
    ("gpus", "sizes", "shared"),
    [(0, [1, 2, 3], []), (1, [1, 3], [3]), (2, [1, 2, 3], [3]), (8, [1, 2, 4, 8, 9], [9]), (6, [1, 2, 4, 6, 7], [7])],
)
def test_the_numbers_of_ranks(gpus: int, sizes: list[int], shared: list[int]) -> None:
    """All GPUs, and more ranks than GPUs, which must share."""
    found = Machine(gpus, 8)
    assert exactness.world_sizes(found) == sizes
    assert [W for W in sizes if found.shared_by(W)] == shared
    assert [W for W in sizes if "sharing" in exactness.named(found, W)] == shared


def test_runs_that_differ_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(function: Any, world_size: int, config: Any, folder: str, **named: Any) -> Any:
        (Path(folder) / "trace.jsonl").write_text(json.dumps({"loss": "a", "weight": str(world_size // 2)}) + "\n")
        return [{"parameters_sha256": "0" * 64}]

    monkeypatch.setattr(exactness, "run_ranks", ran)
    with pytest.raises(RanksDifferError, match="2 ranks differ from 1, first at step 1, in weight"):
        exactness.one_hash(CPU, tmp_path / "runs", bf16=False)


def test_the_wrong_rank_named_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any, **named: Any) -> Any:
        (tmp_path / "killed" / "left_at_0").write_text("3.5")
        (tmp_path / "killed" / "killed_at").write_text("1.0")
        raise LostRankError(said)

    monkeypatch.setattr(exactness, "run_ranks", lost)
    said = "Rank 1 on here did not answer"
    assert exactness.killed_rank(CPU, tmp_path / "killed")[0] == "rank 1 of 2 was named, and the others left in 2.5 s"
    (tmp_path / "killed").rename(tmp_path / "before")
    said = "Rank 0 on here did not answer"
    with pytest.raises(TrainerError, match="rank 1 was killed, but the message is: Rank 0"):
        exactness.killed_rank(CPU, tmp_path / "killed")


def test_a_run_that_is_labelled_tolerance_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the bits agree this time."""

    def ran(function: Any, world_size: int, config: Any, folder: str, **named: Any) -> Any:
        (Path(folder) / "trace.jsonl").write_text('{"loss": "a"}\n')
        return [{"parameters_sha256": "0" * 64, "inexact": ["two device models"] if world_size == 2 else []}]

    monkeypatch.setattr(exactness, "run_ranks", ran)
    with pytest.raises(RanksDifferError, match="2 ranks are labelled tolerance: two device models"):
        exactness.one_hash(CPU, tmp_path / "runs", bf16=False)


@pytest.mark.parametrize(
    ("said", "ends_in", "wrong"),
    [
        ("stopped by SIGTERM", "ab" * 32, None),
        ("", "ab" * 32, "did not stop when one got SIGTERM"),
        ("stopped by SIGTERM", "cd" * 32, "after a stop the run ends in cdcdcdcdcdcdcdcd, not abababababababab"),
    ],
)
def test_a_stopped_run_has_to_end_in_the_expected_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, ends_in: str, wrong: str | None
) -> None:
    def ran(function: Any, world_size: int, config: Any, **named: Any) -> Any:
        return [said] * 2 if function is exactness._until_stopped else [{"parameters_sha256": ends_in}]

    monkeypatch.setattr(exactness, "run_ranks", ran)
    if wrong is None:
        assert exactness.stop_and_resume(CPU, tmp_path / "a", "ab" * 32)[1] == {"parameters_sha256": ends_in}
        return
    with pytest.raises(TrainerError, match=wrong):
        exactness.stop_and_resume(CPU, tmp_path / "a", "ab" * 32)


def test_a_killed_rank_that_nobody_notices_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "run_ranks", lambda *_, **__: [{}])
    with pytest.raises(TrainerError, match="the other ranks did not notice"):
        exactness.killed_rank(CPU, tmp_path / "killed")


def test_ranks_share_gpus_only_where_there_are_fewer(tmp_path: Path) -> None:
    two = Machine(gpus=2, cores=8)
    found = [exactness.config_for(two, tmp_path, W).trainer.ranks_per_gpu for W in (1, 2, 3)]
    assert found == [1, 1, 2]
    assert exactness.config_for(CPU, tmp_path, 3, bf16=True).torch_autocast.enabled
