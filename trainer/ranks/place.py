"""Which rank this process is, and of how many."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's global rank and world size, and the same within its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    def variables(self) -> dict[str, str]:
        """The variables that launchers set: a task, or a library, may read the environment."""
        values = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": self.local_rank}
        return {name: str(value) for name, value in values.items()}

    @staticmethod
    def from_environment(local_rank: int | None = None) -> Ranks:
        """From the variables of deepspeed, torchrun, mpirun or srun; one rank if there are none.

        Args:
            local_rank: the launcher's --local_rank flag, which only fills in for a missing LOCAL_RANK.

        Raises:
            UserError: the variables contradict one another, or do not tell enough.
        """
        world_size, rank = _read("WORLD_SIZE", 1), _read("RANK", 0)
        if "RANK" not in os.environ:
            found = _from_mpi_or_slurm()
            if found is not None:
                return found
            if world_size > 1:
                raise UserError(
                    f"WORLD_SIZE is {world_size}, but RANK is not set, so every process would be rank 0. Set both, or "
                    "neither."
                )
        local = _read("LOCAL_RANK", local_rank if local_rank is not None and local_rank >= 0 else 0)
        # torchrun sets LOCAL_WORLD_SIZE, DeepSpeed's launcher sets LOCAL_SIZE.
        return _checked(rank, world_size, local, _read("LOCAL_WORLD_SIZE", _read("LOCAL_SIZE", world_size)))


def _read(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise UserError(f"The environment variable {name} is {text!r}. It must be a whole number.")
    return int(text) if text else default


def _checked(rank: int, world_size: int, local: int, local_size: int) -> Ranks:
    if world_size < 1 or rank >= world_size or local >= local_size:
        raise UserError(
            f"The launcher's variables contradict one another: RANK={rank}, WORLD_SIZE={world_size}, "
            f"LOCAL_RANK={local}, ranks on this machine={local_size}. Start the run with one launcher."
        )
    return Ranks(rank, world_size, local, local_size)


# Rank, world size, and the same within the machine, as these launchers call them: Open MPI, MVAPICH, Intel MPI and
# MPICH. srun may have started their mpirun, so SLURM's variables come last. The names with STEP are set only inside
# srun. SLURM_PROCID and SLURM_NTASKS do not tell: a batch script has them as well, although it runs once.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def _from_mpi_or_slurm() -> Ranks | None:
    for names in _LAUNCHERS:
        if all(os.environ.get(name) for name in names):
            return _checked(*(_read(name, 0) for name in names))
    if _read("SLURM_STEP_NUM_TASKS", 1) > 1:
        world_size, local = _read("SLURM_STEP_NUM_TASKS", 1), _read("SLURM_LOCALID", 0)
        return _checked(_read("SLURM_PROCID", 0), world_size, local, _tasks_of_this_node(world_size))
    for rank, size, *local_names in _LAUNCHERS:
        if _read(size, 1) > 1:
            raise UserError(
                f"{rank} and {size} say that this is one of {os.environ[size]} processes, but "
                f"{' and '.join(local_names)} are not set, so it is unknown which of them run on this machine.\n"
                "Set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE for each, or use deepspeed or torchrun."
            )
    return None


def _tasks_of_this_node(world_size: int) -> int:
    """From SLURM's list of tasks per node, as in "4(x2),3"."""
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(repeats or 1)
    node = _read("SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else world_size
