"""The device of a rank, kernels that are the same each time, and the facts that a run's bits depend on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.keys import Config, parse
from trainer.engine import device
from trainer.errors import UserError
from trainer.ranks.place import Ranks

CPU = torch.device("cpu")


def config(**trainer: Any) -> Config:
    return parse({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "trainer": trainer})


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes torch say that this machine has so many GPUs; returns those that ranks have taken."""
    taken: list[torch.device] = []
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)

    def pretend(count: int) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    return pretend


@pytest.mark.parametrize(("wanted", "count"), [("auto", 0), ("cpu", 0), ("cpu", 4)])
def test_ranks_without_a_gpu_meet_over_gloo(
    wanted: str, count: int, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = gpus(count)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert device.choose(config(device=wanted), Ranks(5, 8, 5, 8)) == (CPU, "gloo")
    assert os.environ["DS_ACCELERATOR"] == "cpu", "DeepSpeed takes the same"
    assert taken == []


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_rank_has_the_gpu_of_its_place_in_its_machine(wanted: str, gpus: Any) -> None:
    taken = gpus(4)
    assert device.choose(config(device=wanted), Ranks(5, 8, 2, 4)) == (torch.device("cuda", 2), "cpu:gloo,cuda:nccl")
    assert taken == [torch.device("cuda", 2)]


def test_ranks_that_share_a_gpu_go_round_and_meet_over_gloo(gpus: Any) -> None:
    """NCCL refuses two ranks on one GPU."""
    gpus(2)
    chosen = [device.choose(config(ranks_per_gpu=2), Ranks(rank, 4, rank, 4)) for rank in range(4)]
    assert [(d.index, backend) for d, backend in chosen] == [(0, "gloo"), (1, "gloo"), (0, "gloo"), (1, "gloo")]


def test_a_rank_that_sees_only_its_own_gpu(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's --gpus-per-task, with a rank for each task."""
    gpus(1)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert device.choose(config(), Ranks(7, 8, 3, 4)) == (torch.device("cuda", 0), "cpu:gloo,cuda:nccl")


def test_ranks_that_a_launcher_starts_inside_one_task_share_its_gpus(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`deepspeed --num_gpus 4` in a job with --gpus-per-task 4: each rank sees all four."""
    gpus(4)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "4")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    chosen = [device.choose(config(), Ranks(rank, 4, rank, 4))[0].index for rank in range(4)]
    assert chosen == [0, 1, 2, 3]
    with pytest.raises(UserError, match="5 ranks on this machine, but it has 4 GPUs"):
        device.choose(config(), Ranks(4, 5, 4, 5))


def test_a_device_that_is_not_there(gpus: Any) -> None:
    gpus(0)
    with pytest.raises(UserError, match=r'trainer\.device is "cuda", but torch finds no GPU.*Use "auto" or "cpu"'):
        device.choose(config(device="cuda"), Ranks())
    with pytest.raises(UserError, match=r"ranks_per_gpu is 2, but this run is on the CPU\. Leave it out"):
        device.choose(config(ranks_per_gpu=2), Ranks())


@pytest.mark.parametrize(
    ("count", "shared", "ranks", "words"), [(1, 1, 3, "it has 1 GPU."), (2, 2, 5, "it has 2 GPUs.")]
)
def test_more_ranks_than_gpus(count: int, shared: int, ranks: int, words: str, gpus: Any) -> None:
    taken = gpus(count)
    with pytest.raises(UserError) as caught:
        device.choose(config(ranks_per_gpu=shared), Ranks(0, ranks, 0, ranks))
    message = str(caught.value)
    assert f"{ranks} ranks on this machine, but {words}" in message
    assert f"Start at most {count * shared}," in message
    assert "trainer.ranks_per_gpu=3." in message, "what would be enough"
    assert taken == []


@pytest.fixture
def settings_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    was = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic
    tf32 = cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(was[0])
    cudnn.benchmark, cudnn.deterministic = was[1:]
    cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("settings_kept")
def test_kernels_give_the_same_each_time() -> None:
    torch.backends.cudnn.benchmark = True
    device.settle(config(cpu_threads=2))
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark, "no choice of kernels by timing them"
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    device.settle(config())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own, which is deterministic as well"


def test_the_hash_of_the_code_changes_with_any_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "trainer"
    shutil.copytree(Path(device.__file__).parents[1], code, ignore=shutil.ignore_patterns("__pycache__", "*.svg"))

    def hashed() -> str:
        return device.code_sha256.__wrapped__()

    here = hashed()
    monkeypatch.setattr(device, "__file__", str(code / "engine" / "device.py"))
    assert hashed() == here, "wherever it lies"
    (code / "notes.txt").write_text("not code")
    assert hashed() == here
    with (code / "exact" / "step.py").open("a") as file:
        file.write("\n")
    changed = hashed()
    assert changed != here
    (code / "exact" / "step.py").rename(code / "exact" / "steps.py")
    assert hashed() not in (here, changed)


def test_the_facts_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in device._SETTINGS:
        monkeypatch.delenv(name, raising=False)
    found = device.facts(CPU, "0.19.8")
    assert set(found) == {
        "trainer", "code_sha256", "python", "torch", "deepspeed", "device_type", "device_model", "cpu_capability",
        "cpu_threads",
    }  # fmt: skip
    assert (found["deepspeed"], found["device_type"], found["torch"]) == ("0.19.8", "cpu", torch.__version__)
    assert found["cpu_threads"] == torch.get_num_threads()
    assert all(found.values())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    found = device.facts(CPU, "0.19.8")
    assert found["math_settings"] == "MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41", "they change the bits"


def test_a_gpus_facts_name_its_model_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")
    found = device.facts(torch.device("cuda", 1), "0.19.8")
    assert found["device_model"] == "GPU number 1"
    assert set(found) >= {"cuda", "cudnn", "tf32"}
    assert found["cpu_model"] == device.facts(CPU, "0.19.8")["device_model"], "it draws the first weights"


@pytest.mark.usefixtures("settings_kept")
@pytest.mark.parametrize("wanted", [False, True])
def test_float32_is_float32_unless_tf32_is_wanted(wanted: bool) -> None:
    torch.backends.cudnn.allow_tf32 = not wanted
    device.settle(config(tf32=wanted))
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == wanted


@pytest.mark.parametrize(
    ("text", "model"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9: x\n\nprocessor\t: 1\n",
            "AMD EPYC 9: x (25/17)",
        ),
        ("model name\t: ARM\n", "ARM (?/?)"),
    ],
)
def test_a_processors_model_is_its_name_and_numbers(text: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one name may compute differently; its family and model number tell them apart."""
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert device.cpu_model() == model


def test_a_processor_that_the_system_does_not_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Path) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert device.cpu_model() == "arm64 (?/?)"


def test_deepspeed_takes_the_gpu_of_a_rank_that_shares_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the one that LOCAL_RANK names."""
    monkeypatch.setenv("LOCAL_RANK", "5")
    with device.as_local_rank(torch.device("cuda", 1)):
        assert os.environ["LOCAL_RANK"] == "1"
    assert os.environ["LOCAL_RANK"] == "5"
    monkeypatch.delenv("LOCAL_RANK")
    with device.as_local_rank(torch.device("cuda", 0)):
        assert os.environ["LOCAL_RANK"] == "0"
    assert "LOCAL_RANK" not in os.environ
    with device.as_local_rank(torch.device("cpu")):
        assert "LOCAL_RANK" not in os.environ
