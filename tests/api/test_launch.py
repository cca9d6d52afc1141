"""Ranks of a run on this machine: who may start them, and what they get."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.jobs import small_config
from trainer.api import launch
from trainer.errors import LostRankError, UserError
from trainer.ranks.workers import Died


@pytest.mark.parametrize(
    "variables", [{"WORLD_SIZE": "4", "RANK": "1"}, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}]
)
def test_ranks_start_no_ranks(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    launch.refuse_launchers("train()")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"train\(\) starts its ranks itself, but .* as rank 1 of 4\."):
        launch.refuse_launchers("train()")


def test_ranks_have_the_environment_of_the_call_and_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "1")
    got: dict[str, Any] = {}

    def run_ranks(*given: Any, **named: Any) -> list[dict[str, Any]]:
        got.update(named, order=given[2])
        assert named["hear"](("log", {"step": 1})) == "enough"
        return [{"steps": 1}]

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    order = launch.Order.of(small_config("x", device="cpu"), "name", "auto")
    assert launch.on_ranks(order, 2, lambda kind, values: "enough") == {"steps": 1}
    assert got["environment"]["MINE"] == "1" and got["timeout_s"] == float("inf") and not got["cuda"]
    assert got["order"] is order and (order.name, order.resume) == ("name", "auto")


def test_a_rank_that_dies_before_the_ranks_meet_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_ranks(*given: Any, **named: Any) -> Any:
        raise Died("rank 1 was killed by SIGKILL")

    monkeypatch.setattr(launch, "run_ranks", run_ranks)
    with pytest.raises(
        LostRankError, match=r"^Rank 1 was killed by SIGKILL \(as by the system, if memory runs out\)\."
    ):
        launch.on_ranks(launch.Order.of(small_config("x", device="cpu"), "name"), 2)
