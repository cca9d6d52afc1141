"""How ranks meet in a store and connect, and what becomes of one that fails, does not come or is killed meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from trainer.errors import LostRankError, UserError
from trainer.ranks import meeting
from trainer.ranks.place import Ranks
from trainer.ranks.rendezvous import start
from trainer.ranks.stopping import EndedBySignal, raised
from trainer.ranks.workers import run_ranks


def test_two_processes_of_one_rank_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of an earlier start has waited at the address of the next one."""
    monkeypatch.setattr(meeting, "_TELLING_S", 0.0)
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.add("rank/1", 1)
    for place in (Ranks(1, 3, 0, 1), Ranks(0, 3, 0, 1)):
        with pytest.raises(UserError, match="Two processes say that they are rank 1: ranks of an earlier start"):
            meeting._meet(store, place, timedelta(seconds=30), None)


def test_ranks_that_do_not_come_are_counted() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.add("rank/2", 1)
    store.add("came", 1)
    with pytest.raises(UserError, match=r"Only 2 of 3 ranks came within 0\.2 s\. Missing: rank 1\.$"):
        meeting._meet(store, Ranks(0, 3, 0, 1), timedelta(seconds=0.2), None)


def wait_on(wait: Callable[[], object]) -> None:
    """A signal has been caught where one waits for the others."""
    with raised(True):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        wait()


def test_a_signal_that_someone_has_caught_ends_the_waiting() -> None:
    """Seen once in a thousand faults: rank 0 got its SIGTERM while it imported something, and waited on."""
    store, never = dist.HashStore(), threading.Event()  # type: ignore[attr-defined]
    with pytest.raises(EndedBySignal):
        wait_on(lambda: meeting._meet(store, Ranks(0, 2, 0, 1), timedelta(seconds=20), None))
    with pytest.raises(EndedBySignal):
        wait_on(lambda: meeting.in_a_thread(lambda: never.wait(20.0)))
    never.set()
    meeting._say_failed(store, Ranks(1, 2, 1, 2), UserError("no data"))
    with pytest.raises(EndedBySignal):  # rank 1 does not come to read it
        wait_on(lambda: meeting._leave(store, Ranks(0, 2, 0, 1)))


def end_while_connecting(ranks: Ranks, victim: int, folder: str) -> None:
    """As `start`, but one rank is killed when all have met, before it connects to the others."""
    if ranks.rank == victim:
        dist.init_process_group = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    try:
        start(ranks, "gloo", 60.0)
    finally:
        (Path(folder) / str(ranks.rank)).write_text(str(time.monotonic()))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_while_the_others_connect_is_named(tmp_path: Path, victim: int) -> None:
    """Torch would wait for it for as long as ranks may wait at all."""
    began_s = time.monotonic()
    with pytest.raises(LostRankError, match=rf"^Rank {victim} ended without a message while the ranks connected"):
        run_ranks(end_while_connecting, 3, victim, str(tmp_path))
    left = [float(file.read_text()) - began_s for file in tmp_path.iterdir()]
    assert len(left) == 2 and max(left) < 20.0, left


def test_a_rank_that_only_others_can_see_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process numbers of another machine or container mean nothing here."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(meeting, "_where", lambda: "elsewhere")
    meeting._Processes(store, Ranks(1, 2, 0, 1))
    monkeypatch.setattr(meeting, "_where", lambda: "here")
    processes = meeting._Processes(store, Ranks(0, 2, 0, 1))
    processes.read(store)
    assert list(processes._known) == [0] and processes.gone() == []


def test_a_signal_ends_a_rank_that_waits_for_others_inside_torch() -> None:
    """A launcher that ends the ranks does so by a signal, and rank 0 has something to remove."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began_s, waits = time.monotonic(), dist.HashStore()  # type: ignore[attr-defined]
    with pytest.raises(EndedBySignal), raised(True):
        meeting.in_a_thread(lambda: waits.wait(["never"], timedelta(seconds=10)))
    assert time.monotonic() - began_s < 5.0


def test_the_error_of_a_connection_is_the_callers() -> None:
    with pytest.raises(ZeroDivisionError):
        meeting.in_a_thread(lambda: 1 / 0)
