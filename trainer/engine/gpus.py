"""The GPUs of this machine: how many torch can use, why it can use none, and which build of torch could.

`launch/setup.sh` asks before torch is installed, so torch is not imported at the top.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from pathlib import Path

from ..config.keys import Config
from ..errors import UserError

# The oldest driver for each CUDA (its major version) that a build of torch brings: CUDA's release notes.
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes
_OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
# Torch 2.13 comes in two builds. That of PyPI has CUDA 13, and kernels for compute capability 7.5 and newer. The older
# one has CUDA 12, and kernels for 5.0 to 9.0. https://github.com/pytorch/pytorch/blob/main/RELEASE.md
_PYPI_CUDA, _PYPI_OLDEST_GPU = 13, 7.5
_OLDER_BUILD, _OLDER_CUDA, _OLDER_NEWEST_GPU = "https://download.pytorch.org/whl/cu126", 12, 9.0


def usable_gpus(wanted: str) -> int:
    """The number of GPUs that ranks of this machine can use.

    Args:
        wanted: as trainer.device. With "cpu" there are none.

    Raises:
        UserError: the machine has GPUs, but torch cannot use them. Nobody would expect a run on the CPU then.
    """
    if wanted == "cpu":
        return 0
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    found = problem()
    if found is not None:
        raise UserError(found)
    return 0


def sharing(config: Config, world_size: int, gpus: int) -> Config:
    """The config, with `ranks_per_gpu` large enough for `world_size` ranks on one machine. It changes no bit."""
    if gpus == 0:
        return config
    each = max(config.trainer.ranks_per_gpu, -(-world_size // gpus))
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, ranks_per_gpu=each))


def build_for(driver: str, capability: float) -> str | None:
    """The torch build for a machine's driver and GPU.

    Args:
        driver: its version, as in "535.104.05".
        capability: the GPU's compute capability, as in 7.5.

    Returns:
        An index of pip; "" for PyPI; None if neither build fits.
    """
    version = _numbers(driver)
    if version >= _OLDEST_DRIVER[_PYPI_CUDA] and capability >= _PYPI_OLDEST_GPU:
        return ""
    if version >= _OLDEST_DRIVER[_OLDER_CUDA] and capability <= _OLDER_NEWEST_GPU:
        return _OLDER_BUILD
    return None


def problem() -> str | None:
    """Why torch can use none of this machine's NVIDIA GPUs, and what to do; None if it can, or if there are none.

    GPUs that the user has hidden do not count, nor those that a scheduler or a container withholds.
    """
    devices = list(Path("/dev").glob("nvidia[0-9]*"))
    if not devices or _hidden():
        return None
    import torch

    found = 0 if torch.cuda.is_available() else sum(map(_opens, devices))
    if not found:
        return None
    driver, cuda, version = driver_version(), torch.version.cuda, torch.__version__
    needed = _OLDEST_DRIVER.get(int(cuda.split(".")[0]), (0, 0)) if cuda is not None else (0, 0)
    what = (
        f"This machine has {found} NVIDIA GPU{'s' * (found > 1)} (driver {driver or 'unknown'}), but torch {version} "
        "cannot use them"
    )
    index = build_for(driver, _OLDER_NEWEST_GPU) if driver else ""
    install = f"pip install --force-reinstall torch=={version.partition('+')[0]}" + f" --index-url {index}" * bool(
        index
    )
    if cuda is None:
        why = "it was built without CUDA"
        remedy = "Update the driver." if index is None else f"Install a build with CUDA: {install}"
    elif driver and _numbers(driver) < needed:
        why = f"its CUDA {cuda} needs driver {needed[0]}.{needed[1]} or newer"
        remedy = "Update the driver" + (f", or install a build for this one: {install}" if index else ".")
    else:
        why, remedy = _torchs_reason(), "See what nvidia-smi says. Restart the machine if the driver was just updated."
    return f"{what}: {why}.\n{remedy}\nOr train on the CPU on purpose: trainer.device=cpu (predict: --device cpu)."


def _hidden() -> bool:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    return first in ("", "-1", "NoDevFiles")  # the last one is SLURM's


def _opens(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def driver_version() -> str:
    """Of NVIDIA's driver; "" where there is none."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return found[0] if found is not None else ""


def _numbers(driver: str) -> tuple[int, int]:
    major, minor = driver.split(".")[:2]
    return int(major), int(minor)


def _torchs_reason() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0].rstrip(".")
    return "it finds none"


def main(arguments: list[str]) -> None:
    """For launch/setup.sh: prints the index for "DRIVER, CAPABILITY" as nvidia-smi writes it; else the problem."""
    if arguments:
        driver, capability = arguments[0].split(",")
        print(build_for(driver.strip(), float(capability)) or "")
    else:
        print(problem() or "")


if __name__ == "__main__":
    main(sys.argv[1:])
