"""What this machine has: devices, drivers and packages, and whether they fit together."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any

import torch
from packaging.requirements import Requirement

from ...engine.gpus import driver_version, usable_gpus
from ...errors import UserError

_PROJECT = "strong-scaling-trainer"


@dataclass(frozen=True)
class Machine:
    """What the other checks need to know of this machine.

    Attributes:
        gpus: how many GPUs torch can use.
        cores: how many CPU cores this process may use.
    """

    gpus: int
    cores: int

    @property
    def device(self) -> str:
        """The value of trainer.device: "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"

    def shared_by(self, world_size: int) -> bool:
        """Whether this many ranks have to share GPUs."""
        return 0 < self.gpus < world_size


def look(device: str) -> Machine:
    """This machine. `device` is "auto", "cpu" or "cuda". Raises UserError if torch cannot find or use such a device."""
    gpus = usable_gpus(device)
    if device == "cuda" and not gpus:
        raise UserError("--device cuda, but torch finds no GPU on this machine.")
    return Machine(gpus, len(os.sched_getaffinity(0)))


def devices(machine: Machine) -> tuple[str, dict[str, Any]]:
    """A sentence on the devices, and its figures. Raises UserError if torch has no kernels for a GPU."""
    from ...engine.device import cpu_model

    figures: dict[str, Any] = {"cpu": cpu_model(), "cores": machine.cores, "gpus": []}
    said = f"{cpu_model()}, {machine.cores} core{'s' * (machine.cores > 1)}; "
    if not machine.gpus:
        return said + "no GPU is used", figures
    built = torch.cuda.get_arch_list()
    for index in range(machine.gpus):
        found = torch.cuda.get_device_properties(index)
        figures["gpus"].append(
            {
                "name": found.name,
                "gib": round(found.total_memory / 2**30, 1),
                "capability": f"{found.major}.{found.minor}",
            }
        )
        # Kernels for 8.0 also run on 8.6: they fit all later minor versions of the same major one. "compute_" is
        # intermediate code (PTX), which the driver compiles for newer GPUs.
        fits = {name.removeprefix("sm_")[:-1] for name in built if name.startswith("sm_")}
        if built and str(found.major) not in fits and not any(name.startswith("compute_") for name in built):
            raise UserError(
                f"torch {torch.__version__} has no kernels for GPU {index} ({found.name}, "
                f"{found.major}.{found.minor}), only for {', '.join(built)}. Install a torch build for this GPU."
            )
    names = sorted({gpu["name"] for gpu in figures["gpus"]})
    if len(names) > 1:
        said += "different GPUs, so ranks on both are labelled tolerance: "
    return said + f"{machine.gpus} x {', '.join(names)}", figures


def versions(machine: Machine) -> tuple[str, dict[str, Any]]:
    """A sentence on drivers and packages, and their versions. Raises UserError if an installed package doesn't fit."""
    figures: dict[str, Any] = {}
    wrong = []
    for need in _needs():
        try:
            found = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is not installed ({need} is needed)")
            continue
        figures[need.name] = found
        if not need.specifier.contains(found, prereleases=True):
            wrong.append(f"{need.name} is {found} ({need} is needed)")
    if wrong:
        raise UserError(f"{'; '.join(wrong)}. Install these, or all tested versions: bash launch/setup.sh")
    main = f"torch {torch.__version__}, DeepSpeed {figures['deepspeed']}, transformers {figures['transformers']}"
    said = f"{main} and the rest fit the project"
    if machine.gpus:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        cuda = {
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": nccl,
        }
        figures |= cuda
        said += f"; driver {cuda['driver']}, CUDA {cuda['cuda']}, NCCL {nccl}"
    return said, figures


def _needs() -> list[Requirement]:
    """The packages that the project needs. If it was copied and not installed, only the main packages are known."""
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires(_PROJECT) or []]
    except importlib.metadata.PackageNotFoundError:
        return [Requirement(name) for name in ("torch", "deepspeed", "transformers", "datasets", "tensorboard")]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
