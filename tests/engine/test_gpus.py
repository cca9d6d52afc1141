"""Which GPUs torch can use, what is said where it can use none, and which build of torch fits a driver."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config.keys import parse
from trainer.engine import gpus
from trainer.engine.device import choose
from trainer.engine.gpus import build_for, problem, sharing, usable_gpus
from trainer.errors import UserError
from trainer.ranks.place import Ranks

ROOT = Path(__file__).resolve().parents[2]
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22)\nGCC version:  12\n"
)
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 11.4.0\n"
CU126 = "https://download.pytorch.org/whl/cu126"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Makes this a machine with NVIDIA GPUs that torch does not find."""

    def make(driver: str, cuda: str | None, count: int = 2, opens: bool = True, kernel: str = OPEN) -> None:
        devices = [tmp_path / f"nvidia{i}" for i in range(count)]
        for device in devices:
            device.touch()
        glob, read = Path.glob, Path.read_text
        monkeypatch.setattr(
            Path, "glob", lambda self, pattern: iter(devices) if str(self) == "/dev" else glob(self, pattern)
        )
        texts = {"/proc/driver/nvidia/version": kernel.format(driver)}
        monkeypatch.setattr(Path, "read_text", lambda self, *a: texts.get(str(self)) or read(self, *a))
        monkeypatch.setattr(gpus, "_opens", lambda path: opens)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130" if cuda else "2.13.0+cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def run_config(**trainer: Any) -> Any:
    return parse({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "trainer": trainer})


@pytest.mark.parametrize("kernel", [OPEN, CLOSED])
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_driver_that_is_too_old_for_torch(machine: Any, wanted: str, kernel: str) -> None:
    """Not a run on the CPU that nobody asked for."""
    machine("535.104.05", "13.0", kernel=kernel)
    with pytest.raises(UserError) as caught:
        choose(run_config(device=wanted), Ranks())
    message = str(caught.value)
    assert "2 NVIDIA GPUs (driver 535.104.05), but torch 2.13.0+cu130 cannot use them" in message
    assert "its CUDA 13.0 needs driver 580.65 or newer" in message
    assert "Update the driver, or install a build for this one: pip install" in message
    assert f"torch==2.13.0 --index-url {CU126}" in message
    assert "trainer.device=cpu" in message


@pytest.mark.parametrize(
    ("driver", "cuda", "words"),
    [
        ("470.57.02", "13.0", r"needs driver 580\.65 or newer\.\nUpdate the driver\.\n"),  # no build of torch 2.13 fits
        ("470.57.02", "12.6", r"needs driver 525\.60 or newer\.\nUpdate the driver\.\n"),
        (
            "580.65.06",
            None,
            r"built without CUDA\.\nInstall a build with CUDA: pip install --force\S+ torch==2\.13\.0\n",
        ),
        ("550.54", None, rf"built without CUDA\.\nInstall a build with CUDA: .* --index-url {re.escape(CU126)}\n"),
        ("470.57.02", None, r"built without CUDA\.\nUpdate the driver\.\n"),
        ("590.44", "13.0", r"cannot use them: .*\nSee what nvidia-smi says"),
    ],
)
def test_each_reason_has_its_ways_out(machine: Any, driver: str, cuda: str | None, words: str) -> None:
    machine(driver, cuda)
    assert re.search(words, str(problem()))


def test_a_cpu_that_was_meant_is_no_problem(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("535.104.05", "13.0")
    assert usable_gpus("cpu") == 0
    for hidden in ("", "-1", "NoDevFiles", "-1,0"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert usable_gpus("auto") == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError):
        usable_gpus("auto")
    machine("535.104.05", "13.0", opens=False)  # a container, or a scheduler, withholds them
    assert usable_gpus("auto") == 0
    machine("535.104.05", "13.0", count=0)
    assert usable_gpus("auto") == 0


@pytest.mark.parametrize(
    ("driver", "capability", "build"),
    [
        ("580.65.06", 9.0, ""),
        ("595.10", 12.0, ""),
        ("535.104.05", 8.0, CU126),  # CUDA 13 needs driver 580
        ("580.60", 8.0, CU126),
        ("525.60.13", 6.1, CU126),
        ("580.65.06", 7.0, CU126),  # no kernels for a V100 in the build on PyPI
        ("575.10", 10.0, None),
        ("470.10", 8.0, None),
    ],
)
def test_the_build_for_a_driver_and_a_gpu(driver: str, capability: float, build: str | None) -> None:
    assert build_for(driver, capability) == build


def test_setup_asks_before_torch_is_installed() -> None:
    code = "import sys; sys.modules['torch'] = None; from trainer.engine import gpus; gpus.main(['550.54, 8.0'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{CU126}\n"


@pytest.mark.parametrize(("own", "ranks", "gpus", "each"), [(1, 3, 0, 1), (1, 2, 2, 1), (1, 5, 2, 3), (4, 2, 2, 4)])
def test_as_many_ranks_share_a_gpu_as_must(own: int, ranks: int, gpus: int, each: int) -> None:
    assert sharing(run_config(ranks_per_gpu=own), ranks, gpus).trainer.ranks_per_gpu == each
