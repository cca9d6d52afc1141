"""The device of a rank, its deterministic settings, and the facts that a run's bits depend on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import __version__
from ..config.keys import Config
from ..errors import UserError
from ..ranks.place import Ranks
from ..ranks.rendezvous import GLOO_AND_NCCL
from .gpus import usable_gpus


def choose(config: Config, ranks: Ranks) -> tuple[torch.device, str]:
    """The rank's device and the backend its collectives use. Raises UserError if the device isn't there."""
    wanted, shared = config.trainer.device, config.trainer.ranks_per_gpu
    gpus = usable_gpus(wanted)
    if wanted == "cuda" and gpus == 0:
        raise UserError(
            'trainer.device is "cuda", but torch finds no GPU on this machine. '
            'Use "auto" or "cpu", or install a torch build for your GPU.'
        )
    if gpus == 0:
        if shared > 1:
            raise UserError(f"trainer.ranks_per_gpu is {shared}, but this run is on the CPU. Leave it out.")
        # Without this, DeepSpeed chooses its accelerator by the packages that are installed.
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu"), "gloo"
    own = _has_gpus_of_its_own(gpus, ranks)
    if not own and ranks.local_world_size > gpus * shared:
        raise UserError(
            f"There are {ranks.local_world_size} ranks on this machine, but it has {gpus} GPU{'s' * (gpus > 1)}.\n"
            f"Start at most {gpus * shared}, or set trainer.device=cpu, or, only to check exactness, "
            f"trainer.ranks_per_gpu={-(-ranks.local_world_size // gpus)}."
        )
    device = torch.device("cuda", 0 if own else ranks.local_rank % gpus)
    torch.cuda.set_device(device)
    # NCCL refuses two ranks on one GPU.
    return device, GLOO_AND_NCCL if shared == 1 else "gloo"


def _has_gpus_of_its_own(gpus: int, ranks: Ranks) -> bool:
    """Whether a rank sees only its own GPUs, as SLURM's tasks do with --gpus-per-task.

    A launcher may start several ranks inside one task. They all have that task's number, and share its GPUs.
    """
    a_task = os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # "2", or with the model: "a100:2"
    return a_task == str(gpus) and os.environ.get("SLURM_LOCALID") == str(ranks.local_rank)


def settle(config: Config) -> None:
    """Makes kernels deterministic, and the same at every world size."""
    # cuBLAS reads this when it is first used. Without it, some of its kernels are not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(config.trainer.cpu_threads)
    torch.use_deterministic_algorithms(True)
    # The setting above also makes torch fill every torch.empty, which shows reads of uninitialised memory. That costs
    # time, so only the tests do it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # With benchmark=True cuDNN chooses kernels by their speed, so two ranks could choose differently.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # By default torch's convolutions use TF32, whose products have 10 bits, also for float32 tensors.
    torch.backends.cudnn.allow_tf32 = config.trainer.tf32
    torch.backends.cuda.matmul.allow_tf32 = config.trainer.tf32


@contextlib.contextmanager
def linear_kept() -> Iterator[None]:
    """Restores `F.linear` at the end. ZeRO stage 3 replaces it, and later runs of the process would have other bits."""
    linear = F.linear
    try:
        yield
    finally:
        F.linear = linear


@contextlib.contextmanager
def as_local_rank(device: torch.device) -> Iterator[None]:
    """A context in which LOCAL_RANK is the index of the device: DeepSpeed uses the GPU with this number.

    If ranks share a GPU, or see only their own, a rank's local rank is not the index of its GPU.
    """
    if device.type != "cuda":
        yield
        return
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


@functools.cache
def code_sha256() -> str:
    """SHA-256 of the trainer's own source files: it says which code made a result."""
    folder = Path(__file__).resolve().parents[1]
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def cpu_model() -> str:
    """The name of the processor, with its family and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    numbers = "/".join(fields.get(n, "?") for n in ("cpu family", "model"))
    return f"{fields.get('model name', platform.processor() or platform.machine())} ({numbers})"


# With these variables, math libraries choose other kernels, which give other bits.
_SETTINGS = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_DEBUG_CPU_TYPE",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def facts(device: torch.device, deepspeed_version: str) -> dict[str, str | int]:
    """What a run's bits depend on besides config and data. Two runs can have the same bits if these facts agree."""
    result: dict[str, str | int] = {
        "trainer": __version__,
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed_version,
        "device_type": device.type,
        "device_model": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
    }
    settings = [f"{name}={os.environ[name]}" for name in _SETTINGS if os.environ.get(name)]
    if settings:
        result["math_settings"] = " ".join(settings)
    if device.type == "cuda":
        result["device_model"] = torch.cuda.get_device_name(device)
        result["cpu_model"] = cpu_model()  # of rank 0, which draws the first weights
        result["cuda"] = str(torch.version.cuda)
        result["cudnn"] = str(torch.backends.cudnn.version())
        result["tf32"] = f"matmul={torch.backends.cuda.matmul.allow_tf32} cudnn={torch.backends.cudnn.allow_tf32}"
    return result
