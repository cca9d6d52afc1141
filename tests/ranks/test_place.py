"""Who a process is, from the variables of launchers."""

from __future__ import annotations

import pytest

from trainer.errors import UserError
from trainer.ranks import place as places
from trainer.ranks.place import Ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
NAMES += tuple(name for names in places._LAUNCHERS for name in names)
NAMES += ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")


def place(monkeypatch: pytest.MonkeyPatch, local_rank: int | None = None, **variables: str) -> Ranks:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Ranks.from_environment(local_rank)


def test_what_launchers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(monkeypatch) == Ranks(0, 1, 0, 1)
    torchrun = place(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4")
    assert torchrun == Ranks(5, 8, 1, 4) and not torchrun.first
    assert place(monkeypatch, RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_SIZE="4") == Ranks(
        5, 8, 1, 4
    )  # DeepSpeed
    assert place(monkeypatch, 2, RANK="2", WORLD_SIZE="4") == Ranks(2, 4, 2, 4)  # its flag fills in
    assert place(monkeypatch, 3, RANK="2", WORLD_SIZE="4", LOCAL_RANK="2") == Ranks(2, 4, 2, 4)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "two"}, "RANK is 'two'. It must be a whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "contradict one another: RANK=4, WORLD_SIZE=4"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set, so every process would be rank 0"),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, "one of 4 processes, but MPI_LOCALRANKID and MPI_LOCALNRANKS are not set"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2"),
    ],
)
def test_variables_that_contradict_one_another(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        place(monkeypatch, **variables)


def mpi(prefix: str, *values: str) -> dict[str, str]:
    return dict(zip((f"{prefix}{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")), values, strict=True))


def step(tasks: str, rank: str, local: str, per_node: str, node: str) -> dict[str, str]:
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID")
    return dict(zip(names, (tasks, rank, local, per_node, node), strict=True))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (mpi("OMPI_COMM_WORLD_", "5", "8", "1", "4"), Ranks(5, 8, 1, 4)),
        (mpi("MV2_COMM_WORLD_", "5", "8", "1", "4"), Ranks(5, 8, 1, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, Ranks(1, 2, 1, 2)),
        (step("11", "5", "1", "4(x2),3", "1"), Ranks(5, 11, 1, 4)),
        (step("11", "10", "2", "4(x2),3", "2"), Ranks(10, 11, 2, 3)),
        # mpirun that was itself started by srun, one process of it a node
        (mpi("OMPI_COMM_WORLD_", "5", "8", "1", "4") | step("2", "1", "0", "1(x2)", "1"), Ranks(5, 8, 1, 4)),
        # a launcher inside either
        ({"RANK": "2", "WORLD_SIZE": "4"} | step("2", "1", "0", "1(x2)", "1"), Ranks(2, 4, 0, 4)),
        # srun --mpi=pmi2
        (step("4", "3", "3", "4", "0") | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Ranks(3, 4, 3, 4)),
        # a batch script of a job with four tasks runs once
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Ranks(0, 1, 0, 1)),
        (step("1", "0", "0", "1", "0"), Ranks(0, 1, 0, 1)),
    ],
)
def test_mpirun_and_srun(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Ranks) -> None:
    """Without this, each of their processes would be a run of its own."""
    found = place(monkeypatch, **variables)
    assert found == expected
    assert found.variables()["RANK"] == str(expected.rank)
