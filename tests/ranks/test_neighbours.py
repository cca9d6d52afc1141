"""Which processes of this machine are watched, and which of their ends are a loss."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.ranks import neighbours
from trainer.ranks.neighbours import Neighbours
from trainer.ranks.place import Ranks
from trainer.ranks.workers import WorkerError, run_ranks

# Another rank: it makes its file in memory, and does what it is told. A child of its own outlives it.
RANK = """
import os, sys, time
file = os.memfd_create("rank-1"); os.write(file, b"\\0\\0")
if os.fork() == 0:
    os.close(1); time.sleep(2); os._exit(0)
print(file, flush=True)
for line in sys.stdin:
    if line == "leave\\n":
        os.pwrite(file, b"\\1", 0)
    if line == "speak\\n":
        os.pwrite(file, b"\\1", 1)
    if line == "end\\n":
        os._exit(1)
    print(line, flush=True)
"""


class Other:
    """Rank 1 of 2, and what rank 0 sees of it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stdout is not None
        self.file = int(self.process.stdout.readline())
        self.said = (self.process.pid, self.file, "rank-1")

    def told(self, word: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdout.readline()


@pytest.fixture
def other() -> Iterator[Other]:
    rank = Other()
    yield rank
    rank.process.kill()
    rank.process.communicate()


def seen(monkeypatch: pytest.MonkeyPatch, *said: tuple[int, int | None, str]) -> Neighbours:
    """The neighbours of rank 0; the other ranks have said this."""
    monkeypatch.setattr(neighbours, "gather_objects", lambda own: [own, *said])
    return Neighbours(Ranks(0, 1 + len(said), 0, 1))


def ends(descriptors: list[int]) -> bool:
    """Whether a watched process ends soon: its descriptor becomes readable."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(10_000))


def test_a_killed_process_shows_although_its_child_lives_on(monkeypatch: pytest.MonkeyPatch, other: Other) -> None:
    near = seen(monkeypatch, other.said)
    running = near.running()
    assert len(running) == 1 and near.killed() == []
    other.process.kill()
    assert ends(running)
    assert near.killed() == [1] and near.running() == []  # nothing to wait for any more
    near.close()
    assert near.killed() == []


def test_a_process_that_says_that_it_leaves_was_not_killed(monkeypatch: pytest.MonkeyPatch, other: Other) -> None:
    """Whatever its exit code: it has an error of its own, or another rank's, and they say so elsewhere."""
    near = seen(monkeypatch, other.said)
    other.told("leave")
    running = near.running()
    assert len(running) == 1
    other.told("end")
    assert ends(running)
    assert near.killed() == [] and near.running() == []
    near.close()


def test_a_stopped_process_was_not_killed(monkeypatch: pytest.MonkeyPatch, other: Other) -> None:
    near = seen(monkeypatch, other.said)
    other.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    assert len(near.running()) == 1 and near.killed() == [] and near.stopped() == [1]
    other.process.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    assert near.stopped() == []
    near.close()
    assert near.stopped() == []


@pytest.mark.parametrize("whose", ["another process's number", "no process's", "no file", "an old Python"])
def test_a_process_that_cannot_be_seen_is_not_watched(
    monkeypatch: pytest.MonkeyPatch, other: Other, whose: str
) -> None:
    """As on another machine, and in another container, which counts its processes anew."""
    process, file, name = other.said
    said: Any = {
        "another process's number": (os.getppid(), file, name),
        "no process's": (2**22 + 1, file, name),
        "no file": (process, None, name),
        "an old Python": other.said,
    }[whose]
    if whose == "an old Python":
        monkeypatch.delattr(neighbours.os, "pidfd_open")
    near = seen(monkeypatch, said, said)
    other.process.kill()
    other.process.wait()
    assert near.running() == [] and near.killed() == []
    near.close()
    links = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not [link for link in links if "pidfd" in link.name or link.name.startswith("memfd:rank-")]


def stuck(ranks: Ranks, folder: Path) -> None:
    """Rank 1 is killed in the first step, while the others are in a call that ends never, and is no collective."""
    from trainer.ranks import speech
    from trainer.ranks.rendezvous import start
    from trainer.ranks.watch import Watch

    speech.speak = speech.print_error  # as under a launcher
    start(ranks, "gloo", 60.0)
    watch = Watch(ranks, 600.0, None)
    watch.begin()
    sys.stderr = (folder / str(ranks.rank)).open("w")
    if ranks.rank == 1:
        time.sleep(0.5)
        print(time.time(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60.0)


def test_a_killed_rank_is_named_soon_whatever_the_others_do(tmp_path: Path) -> None:
    """As over NCCL, where nobody notices a broken connection."""
    with pytest.raises(WorkerError, match="died without a message"):
        run_ranks(stuck, 3, tmp_path, timeout_s=40.0)
    (speaker,) = [file for file in (tmp_path / "0", tmp_path / "2") if file.read_text()]  # one of them says it
    assert speaker.read_text().startswith("\nerror: Rank 1 on ")
    assert speaker.stat().st_mtime - float((tmp_path / "1").read_text()) < 4.0  # 1.5 s, if the machine is not busy


def test_what_a_rank_has_reported_is_known_after_its_end(monkeypatch: pytest.MonkeyPatch, other: Other) -> None:
    near = seen(monkeypatch, other.said)
    running = near.running()
    assert not near.spoken()
    other.told("speak")
    other.told("end")
    assert ends(running)
    assert near.spoken()
    assert near.killed() == [1]  # it has not said that it leaves
    near.close()
