"""The doctor's checks where GPUs are: on pretended ones. It sees no bfloat16 and no kernel there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pretended_gpu.device import PretendedGpu
from tests.pretended_gpu.jobs import on_gpus
from trainer.commands.doctor import exactness, machine, speed
from trainer.commands.doctor.machine import Machine
from trainer.config.keys import Config, parse
from trainer.ranks import workers

GPUS = 2


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine with two GPUs, which this process and the ranks that it starts see."""

    def run_on_gpus(function: Callable[..., Any], world_size: int, *arguments: Any, cuda: bool) -> list[Any]:
        assert cuda
        return workers.run_ranks(on_gpus, world_size, GPUS, function, *arguments)

    def small(values: dict[str, Any], source: str) -> Config:
        values |= {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}
        values["trainer"]["task_options"]["width"] = 4
        return parse(values, source)

    for module in (exactness, speed):
        monkeypatch.setattr(module, "run_ranks", run_on_gpus)
    monkeypatch.setattr(exactness, "parse", small)
    with PretendedGpu(GPUS):
        yield machine.look("cuda")


def test_it_names_devices_and_what_belongs_to_them(gpus: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: (2, 29, 7))  # a torch for CPUs has none
    said, figures = machine.devices(gpus)
    assert f"{GPUS} x " in said and len(figures["gpus"]) == GPUS
    said, figures = machine.versions(gpus)
    assert "NCCL 2.29.7" in said and figures["driver"] in said


@pytest.mark.slow
def test_each_of_its_checks_passes(gpus: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, figures = exactness.one_hash(gpus, tmp_path / "float32", bf16=False)
    assert "1, 2, 3 (sharing) ranks" in said
    resumed = exactness.stop_and_resume(gpus, tmp_path / "stopped", figures["parameters_sha256"])
    assert "went on to the same hash" in resumed[0]
    assert "rank 1 of 2 was named" in exactness.killed_rank(gpus, tmp_path / "killed")[0]
    monkeypatch.setattr(speed, "_ROUNDS", 2)
    assert "samples/s at 2 ranks" in speed.throughput(gpus, tmp_path / "speed")[0]
    assert "2 ranks: 0.4 MB" in speed.exchange(gpus, tmp_path / "exchange")[0]
