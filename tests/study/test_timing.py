"""Which runs on real ranks a study makes, and what it reads from them. The runs themselves are made up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_up import network, planned, timed, write
from trainer.config.keys import Config
from trainer.errors import UserError
from trainer.study import timing
from trainer.study.declaration import Plan, Timing
from trainer.study.timing import check_bits, read_timings, time_ranks


class Ranks:
    """In place of `workers.run_ranks`: notes what is run, and gives numbers for it."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.configs: list[Config] = []
        self.networks: list[int] = []

    def __call__(self, function: Any, world_size: int, config: Any, **more: Any) -> list[Any]:
        if not isinstance(config, Config):
            self.networks.append(world_size)
            return [{"world_size": world_size, "latency_us": 5.0, "bandwidth_gb_per_s": 2.0}]
        folder = Path(str(config.trainer.output_dir))
        assert not folder.exists(), "each run starts in an empty folder"
        (folder / "model").mkdir(parents=True)
        self.runs.append(world_size)
        self.configs.append(config)
        steps = config.trainer.max_steps
        return [
            {
                "world_size": world_size, "steps": steps, "step_time_s": 0.1 / world_size, "samples_per_s": 1.0,
                "wall_time_s": 1.0, "parameters_sha256": f"{steps}", "exactness": "bitwise", "floats": 10,
                "phases_s": {"data": 0.0, "compute": 0.1}, "micro_batches": 4, "max_steps": steps,
            }
        ]  # fmt: skip


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Eight cores, and no processes."""
    made_up = Ranks()
    monkeypatch.setattr(timing, "run_ranks", made_up)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    return made_up


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Of a study with 4 micro-batches a step."""
    _, plan = planned(write(tmp_path, {"seeds": [7, 3], "arms": ["strong", "weak"], "world_sizes": [2]}))
    (tmp_path / "study").mkdir()
    return plan


def test_ranks_are_timed_in_turn_up_to_the_devices_and_the_micro_batches(
    tmp_path: Path, ranks: Ranks, plan: Plan
) -> None:
    """Eight cores, four micro-batches: so a slow minute of the machine falls on every W alike."""
    time_ranks(Timing(max_steps=20, repeats=2), plan, tmp_path / "study", cuda=False)
    assert ranks.runs == [1, 2, 4, 1, 2, 4]
    assert ranks.networks == [4]
    (config,) = {str(c) for c in ranks.configs}
    assert "seed=7" in config and "max_steps=20" in config and "gradient_noise=False" in config
    assert not (tmp_path / "study" / "running").exists()
    timings = read_timings(tmp_path / "study")
    assert timings is not None
    assert timings.speed_ups() == {1: [1, 1], 2: pytest.approx([2, 2]), 4: pytest.approx([4, 4])}


def test_a_finished_timing_is_not_made_again(tmp_path: Path, ranks: Ranks, plan: Plan) -> None:
    folder, wanted = tmp_path / "study", Timing(world_sizes=[2], max_steps=20, repeats=2)
    time_ranks(wanted, plan, folder, cuda=False)
    (folder / "timing" / "W2-0.json").unlink()
    ranks.runs.clear()
    time_ranks(wanted, plan, folder, cuda=False)
    assert ranks.runs == [2]
    assert ranks.networks == [2], "the network is measured once"


def test_after_a_change_of_the_steps_no_older_timing_is_read(tmp_path: Path, ranks: Ranks, plan: Plan) -> None:
    """Its hash is that of other steps, and would be reported as other bits."""
    folder = tmp_path / "study"
    time_ranks(Timing(world_sizes=[2, 4], max_steps=20, repeats=2), plan, folder, cuda=False)
    ranks.runs.clear()
    time_ranks(Timing(world_sizes=[2], max_steps=40, repeats=1), plan, folder, cuda=False)
    assert ranks.runs == [1, 2]
    timings = read_timings(folder)
    assert timings is not None
    assert timings.hashes == {1: ["40"], 2: ["40"]}
    assert check_bits(timings, None) == ([1, 2], [])


def test_a_timing_that_fails_leaves_no_run_behind(
    tmp_path: Path, ranks: Ranks, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(function: Any, world_size: int, config: Config, **more: Any) -> list[Any]:
        ranks(function, world_size, config)
        raise UserError("no port is free")

    monkeypatch.setattr(timing, "run_ranks", fail)
    with pytest.raises(UserError, match="no port is free"):
        time_ranks(Timing(max_steps=20), plan, tmp_path / "study", cuda=False)
    assert not (tmp_path / "study" / "running").exists()
    assert read_timings(tmp_path / "study") is None


def test_more_ranks_than_micro_batches_are_refused_before_any_run(tmp_path: Path, ranks: Ranks, plan: Plan) -> None:
    with pytest.raises(UserError, match="5 ranks are more than"):
        time_ranks(Timing(world_sizes=[2, 5], max_steps=20), plan, tmp_path / "study", cuda=False)
    assert ranks.runs == []


def test_ranks_that_share_cores_are_noted(tmp_path: Path, ranks: Ranks, plan: Plan, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    time_ranks(Timing(world_sizes=[4], max_steps=20, repeats=1), plan, tmp_path / "study", cuda=False)
    timings = read_timings(tmp_path / "study")
    assert timings is not None
    assert timings.shared == [4]


def test_one_device_has_nothing_to_time_but_its_own_run(
    tmp_path: Path, ranks: Ranks, plan: Plan, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    time_ranks(Timing(max_steps=20, repeats=1), plan, tmp_path / "study", cuda=False)
    assert ranks.runs == [1]
    assert ranks.networks == []
    assert "there is one device" in capsys.readouterr().out


def test_a_network_that_is_given_is_not_measured(tmp_path: Path, ranks: Ranks, plan: Plan) -> None:
    given = Timing(world_sizes=[2], max_steps=20, repeats=1, latency_us=7.0, bandwidth_gb_per_s=3.0)
    time_ranks(given, plan, tmp_path / "study", cuda=False)
    assert ranks.networks == []
    timings = read_timings(tmp_path / "study")
    assert timings is not None and timings.measured is not None and timings.given
    assert (timings.measured.latency_s, timings.measured.bytes_per_s) == pytest.approx((7e-6, 3e9))


# What was timed


def test_nothing_timed_is_none(tmp_path: Path) -> None:
    assert read_timings(tmp_path) is None
    timed(tmp_path, 2)
    assert read_timings(tmp_path) is None, "without one rank there is nothing to compare with"


def test_speed_ups_are_those_of_the_same_repetition(tmp_path: Path) -> None:
    """A machine that is slow for one repetition is slow for all of its ranks."""
    for repeat, (one, two) in enumerate([(0.1, 0.05), (0.3, 0.15)]):
        timed(tmp_path, 1, repeat, one)
        timed(tmp_path, 2, repeat, two)
    timings = read_timings(tmp_path)
    assert timings is not None
    assert timings.speed_ups() == {1: [1, 1], 2: [2, 2]}


def test_shared_devices_count_for_the_bits_and_not_for_the_time(tmp_path: Path) -> None:
    timed(tmp_path, 1)
    timed(tmp_path, 16, own_devices=False)
    timings = read_timings(tmp_path)
    assert timings is not None
    assert timings.shared == [16]
    assert set(timings.speed_ups()) == {1}
    assert check_bits(timings, None) == ([1, 16], [])


def test_what_predictions_start_from(tmp_path: Path) -> None:
    """A step of 100 ms has 4 micro-batches of 20 ms, and 20 ms once. What is given wins over what was measured."""
    timed(tmp_path, 1)
    timings = read_timings(tmp_path)
    assert timings is not None and timings.measured is None, "nothing is known of the network"
    network(tmp_path)
    timings = read_timings(tmp_path)
    assert timings is not None and timings.measured is not None
    m = timings.measured
    assert (m.micro_batch_s, m.once_s, m.latency_s, m.bytes_per_s) == pytest.approx((0.02, 0.02, 1e-3, 1e9))
    assert (m.micro_batches, m.floats, timings.given) == (4, 100_000, False)
    network(tmp_path, latency_us=2.0)
    timings = read_timings(tmp_path)
    assert timings is not None and timings.measured is not None
    assert (timings.measured.latency_s, timings.measured.bytes_per_s) == pytest.approx((2e-6, 1e9))
    assert timings.given


def test_a_damaged_timing_is_named(tmp_path: Path) -> None:
    timed(tmp_path, 1)
    (tmp_path / "timing" / "W2-0.json").write_text("{")
    with pytest.raises(UserError, match=r"W2-0\.json"):
        read_timings(tmp_path)


@pytest.mark.parametrize(
    ("max_steps", "sequential", "same", "others"),
    [
        (20, "f" * 64, [1, 2], [4]),  # a cut run has a hash of its own: that of one rank counts
        (None, "a" * 64, [1, 2], [4]),
        (None, "f" * 64, [], [1, 2, 4]),  # whole runs must have the study's own bits
        (None, None, [1, 2], [4]),
    ],
)
def test_bits_are_compared(
    tmp_path: Path, max_steps: int | None, sequential: str | None, same: list[int], others: list[int]
) -> None:
    for repeat in (0, 1):
        timed(tmp_path, 1, repeat, max_steps=max_steps)
        timed(tmp_path, 2, repeat, max_steps=max_steps)
        sha256 = ("a" if repeat == 0 else "b") * 64  # once right, once wrong
        timed(tmp_path, 4, repeat, max_steps=max_steps, parameters_sha256=sha256)
    timings = read_timings(tmp_path)
    assert timings is not None
    assert check_bits(timings, sequential) == (same, others)
