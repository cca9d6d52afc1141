"""The short form of tests/faults/run.py: a few faults of most kinds, each run compared with the undisturbed one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Server, Workload, workloads
from tests.faults.run import live, reference

LIVES = {
    "kill": ["SIGKILL of a rank", "bit-flipped checkpoint"],
    "write": ["SIGKILL inside a checkpoint write", "SIGTERM, SIGINT, SIGUSR1 to a rank", "truncated checkpoint"],
    "hang": ["a rank that hangs"],
    "signals": ["a second signal", "the same to all ranks", "SIGHUP, SIGXCPU to a rank"],
    "task": ["sys.exit in a task", "a child that outlives the run", "foreign files and checkpoints"],
    "folder": ["fewer steps", "another seed", "two runs in one folder"],
    "meeting": ["stale rendezvous"],
    "bits": ["bits flipped in the gradients of a rank"],
    "disk": ["disk full", "output folder gone", "SIGSTOP for a moment"],
}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, list[Workload], Path]]:
    place = tmp_path_factory.mktemp("faults")
    with Server() as server:
        choices = workloads(place)[:2]
        for workload in choices:
            reference(workload, server, place / "undisturbed", world_sizes=(2,))
        yield server, choices, place


LONG = ("disk", "meeting", "folder", "signals")


@pytest.mark.parametrize("life", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in LIVES])
def test_a_fault_leaves_no_trace(started: tuple[Server, list[Workload], Path], life: str) -> None:
    server, choices, place = started
    number = list(LIVES).index(life)
    for fault in live(number, LIVES[life], 0, choices[number % 2], server, place):
        assert fault.broken is None, fault
        assert fault.differs is None, fault
