"""How `doctor` judges what it has measured of a step. The measurements themselves need minutes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.commands.doctor import speed
from trainer.commands.doctor.machine import Machine
from trainer.errors import TrainerError

CPU, GPU, GPUS = Machine(0, 2), Machine(1, 8), Machine(4, 8)


def pretended(monkeypatch: pytest.MonkeyPatch, result: Any) -> list[tuple[int, Any]]:
    """No ranks are started. Returns the list of (ranks, config) that is filled by each call."""
    asked: list[tuple[int, Any]] = []

    def ran(function: Any, world_size: int, config: Any, **_: Any) -> list[Any]:
        asked.append((world_size, config))
        return [result]

    monkeypatch.setattr(speed, "run_ranks", ran)
    return asked


def test_the_speed_is_a_median_and_the_share_of_the_loop_that_ran_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn is 5 steps of 256 samples. The machine was busy in the last turns, for both."""
    ours, plain = [2.0, 2.0, 2.0, 2.0, 8.0], [1.0, 1.0, 1.0, 1.0, 4.0]
    asked = pretended(monkeypatch, {"ours": ours, "plain": plain})
    said, figures = speed.throughput(CPU, tmp_path)
    assert [W for W, _ in asked] == [1, 2]
    assert figures["2"] == {"samples_per_s": 640, "of_a_plain_loop": [0.5, 0.5, 0.5]}
    assert "640 samples/s at 2 ranks, 0.50 of a plain loop's (0.50 to 0.50)" in said
    assert "no bound is set" in said, "a slow machine is no failure"


@pytest.mark.parametrize(
    ("machine", "names"),
    [
        (Machine(0, 1), ["1"]),
        (GPU, ["1", "1 with CUDA graphs"]),
        (GPUS, ["1", "1 with CUDA graphs", "4", "4 with CUDA graphs"]),
    ],
)
def test_which_speeds_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine, names: list[str]
) -> None:
    """One rank, all GPUs, and CUDA graphs where there is a GPU."""
    asked = pretended(monkeypatch, {"ours": [1.0, 1.0], "plain": [1.0, 1.0]})
    assert list(speed.throughput(machine, tmp_path)[1]) == names
    graphs = [config.trainer.cuda_graph for _, config in asked]
    assert graphs == ["auto" if "graphs" in name else None for name in names]


@pytest.mark.parametrize(
    ("waits", "launches", "wrong"),
    [
        (1.0, 300.0, None),
        (1.25, 300.0, "1.2 host waits a step, but a step should wait once at most"),
        (0.0, 0.0, "torch's profiler saw no kernel"),
    ],
)
def test_a_step_that_waits_more_than_once_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: float, launches: float, wrong: str | None
) -> None:
    found = {"ours": {"waits": waits, "launches": launches}, "plain": {"waits": 0.0, "launches": 200.0}}
    pretended(monkeypatch, found)
    if wrong is None:
        said, figures = speed.kernels(GPU, tmp_path / "kernels")
        assert said.startswith("300 kernels a step, 1.5 times a plain loop's")
        assert figures == found
        return
    with pytest.raises(TrainerError, match=wrong):
        speed.kernels(GPU, tmp_path / "kernels")


def test_waits_and_launches_are_told_by_the_names_of_cudas_calls() -> None:
    """A launch has several names, by the version of CUDA. An asynchronous copy is no wait."""
    names = ["cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "aten::mul", "cudaMemcpyAsync"]
    names += ["cudaStreamSynchronize", "cudaMemcpy"]
    profile = SimpleNamespace(events=lambda: [SimpleNamespace(name=name) for name in names])
    assert speed._calls(profile) == {"waits": 2, "launches": 3}


def test_the_exchange_is_shown_beside_an_all_reduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretended(monkeypatch, {"40 MB": {"exchange": 12.25, "all_reduce": 10.0}})
    said, figures = speed.exchange(GPUS, tmp_path)
    assert said == "4 ranks: 40 MB 12.25 ms, all-reduce 10.00 ms. Measured, no bound is set"
    assert figures["world_size"] == 4
    speed.exchange(CPU, tmp_path)
    assert [W for W, _ in asked] == [4, 2]
