"""How ranks meet in a store, hear of one that has failed or was killed, and connect to one another."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from ..errors import BY_EXIT_CODE, LostRankError, TrainerError, UserError
from .launchers import began
from .place import Ranks
from .stopping import heed

# Every so often a rank looks whether all ranks have come.
_LOOK_S = 0.1
# Ranks come within seconds of one another, or within minutes if machines start late. After this time, and after twice,
# four times ... as long, a rank that has come says for whom it waits.
_TELL_S = 120.0
# If a rank has failed, rank 0 waits up to this long before it leaves. It holds the store in which the others read of
# the failure, and they may still be loading torch.
_TELLING_S = 30.0


def for_all(failed: BaseException | None, ranks: Ranks) -> TrainerError | None:
    """A rank's error as the other ranks raise it."""
    if failed is None or isinstance(failed, TrainerError):
        return failed
    return TrainerError(f"rank {ranks.rank} has failed: {type(failed).__name__}")


def raise_own(failed: BaseException | None) -> None:
    """Raises a rank's own error if it is not for the user; its traceback is printed here."""
    if failed is not None and not isinstance(failed, TrainerError):
        raise failed


class Waiting:
    """The time that a rank waits for others before they have met."""

    def __init__(self, timeout: timedelta) -> None:
        self._began_s, self._timeout_s, self._told = time.monotonic(), timeout.total_seconds(), 0

    @property
    def over(self) -> bool:
        """Whether it has waited too long."""
        return time.monotonic() - self._began_s > self._timeout_s

    @property
    def due(self) -> bool:
        """Whether it is time to say so."""
        return time.monotonic() - self._began_s > _TELL_S * 2**self._told

    def tell(self, who: str) -> None:
        """Says for whom it waits."""
        self._told += 1
        waited_s = time.monotonic() - self._began_s
        print(
            f"\nnote: for {waited_s:.0f} s the other ranks have been waiting for {who}: still starting, or hanging "
            f"while loading the task. They wait for up to {self._timeout_s:g} s.",
            file=sys.stderr,
            flush=True,
        )


def _missing(store: Any, ranks: Ranks) -> str:
    """The ranks that have not come to a store, for messages."""
    missing = [str(rank) for rank in range(ranks.world_size) if not store.check([f"rank/{rank}"])]
    return f"rank{'s' * (len(missing) > 1)} {', '.join(missing[:8])}{', ...' * (len(missing) > 8)}"


def _meet(store: Any, ranks: Ranks, timeout: timedelta, failed: BaseException | None) -> None:
    """Waits in the store until all ranks have come, or one has failed. Collective: every rank.

    Raises:
        TrainerError: on every rank: one has failed, there are two of one number, or not all have come in time.
    """
    if store.add(f"rank/{ranks.rank}", 1) > 1:
        failed = UserError(
            f"Two processes say that they are rank {ranks.rank}: ranks of an earlier start are still waiting at this "
            "address.\nEnd them, or choose another MASTER_PORT."
        )
    said = for_all(failed, ranks)
    if said is not None:
        _say_failed(store, ranks, said)
    store.add("came", 1)
    waiting = Waiting(timeout)
    while not store.check(["failed"]):
        heed()
        came = store.add("came", 0)
        if came >= ranks.world_size:
            return
        if waiting.over:
            limit, who = f"{timeout.total_seconds():g} s", _missing(store, ranks)
            raise UserError(f"Only {came} of {ranks.world_size} ranks came within {limit}. Missing: {who}.")
        if ranks.first and waiting.due:
            waiting.tell(_missing(store, ranks))
        time.sleep(_LOOK_S)
    _leave(store, ranks, failed)


def _say_failed(store: Any, ranks: Ranks, said: TrainerError) -> None:
    """Leaves an error in the store. The first one counts, so that all raise the same."""
    store.compare_set("failed", "", json.dumps([ranks.rank, said.exit_code, str(said)]))


def _leave(
    store: Any, ranks: Ranks, failed: BaseException | None = None, gone: Callable[[], list[int]] = lambda: []
) -> NoReturn:
    """Raises the error that is in the store. Rank 0 first waits until the others have read it.

    Args:
        store: holds the error.
        ranks: this rank, and how many.
        failed: this rank's own error.
        gone: gives the ranks that have ended, and will never read it.
    """
    rank, code, message = json.loads(store.get("failed"))
    store.add("left", 1)
    deadline_s = time.monotonic() + _TELLING_S
    while ranks.first and store.add("left", 0) < ranks.world_size - len(gone()) and time.monotonic() < deadline_s:
        heed()
        time.sleep(_LOOK_S)
    raise_own(failed)
    error = BY_EXIT_CODE.get(code, TrainerError)(message, agreed=True)
    if rank != ranks.rank and message.startswith(f"rank {rank} has failed: "):
        error.speaks = False  # that rank prints its traceback
    raise error


def join(store: Any, ranks: Ranks, backend: str, timeout: timedelta, failed: BaseException | None) -> None:
    """Meets the other ranks in a store, and connects to them. Collective: every rank.

    Args:
        store: to which all ranks are connected.
        ranks: this rank, and how many.
        backend: of the process group.
        timeout: how long ranks wait for one another.
        failed: this rank's error, which all raise then.

    Raises:
        TrainerError: on every rank: one has failed, does not come, or was killed meanwhile.
    """
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    processes = _Processes(store, ranks)
    _meet(store, ranks, timeout, failed)
    # A connection of its own: the thread below keeps the other one busy.
    side = store
    if isinstance(store, TCPStore):
        side = TCPStore(store.host, store.port, None, False, timeout, wait_for_workers=False)
    processes.read(side)

    def connect() -> None:
        group = PrefixStore("group", store)
        dist.init_process_group(backend, store=group, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
        dist.barrier()  # no rank has left before all are connected, so one that is gone was killed

    def look() -> None:
        gone = processes.gone()
        if gone:
            # A rank that notices the loss of rank 0 leaves at once. It is gone as well, but it was not killed.
            gone = [0] if 0 in gone else gone
            which = f"Rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
            lost = LostRankError(
                f"{which} ended without a message while the ranks connected, before the first step. It was killed, "
                "perhaps because memory ran out. The system's log may say why."
            )
            if 0 in gone:  # its store is gone as well, so this rank cannot tell the others
                raise lost
            _say_failed(side, ranks, lost)
        if side.check(["failed"]):
            _leave(side, ranks, gone=processes.gone)

    try:
        in_a_thread(connect, look)
    except RuntimeError:  # torch's: a connection is broken. The reason may show a moment later
        for _ in range(10):
            if processes.gone():
                look()
            time.sleep(_LOOK_S)
        raise


class _Processes:
    """The processes of the ranks on this machine. They show whether a rank is killed before the watch begins.

    Args:
        store: takes this rank's process.
        ranks: this rank, and how many.
    """

    def __init__(self, store: Any, ranks: Ranks) -> None:
        self._ranks, self._known = ranks, dict[int, tuple[int, str]]()
        store.set(f"process/{ranks.rank}", json.dumps([_where(), os.getpid(), began(os.getpid())]))

    def read(self, store: Any) -> None:
        """Notes the processes that can be seen from here. Call it when all ranks have come."""
        for rank in range(self._ranks.world_size):
            where, process, began_then = json.loads(store.get(f"process/{rank}"))
            if where and where == _where():
                self._known[rank] = (process, began_then)

    def gone(self) -> list[int]:
        """The ranks whose process is there no more."""
        return [rank for rank, (process, began_then) in self._known.items() if began(process) != began_then]


def _where() -> str:
    """A name for this machine and this container, within which process numbers are valid; "" if it is unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def in_a_thread(connect: Callable[[], object], look: Callable[[], None] = lambda: None) -> None:
    """Calls a function that waits inside torch's C++ code for other ranks, in a thread of its own.

    Python runs signal handlers in the main thread, but not while that thread is inside C++ code. So the main thread
    waits in Python.

    Args:
        connect: the function.
        look: called now and then while it waits; its error ends the waiting, and leaves the thread behind.
    """
    ended, failures = threading.Event(), list[BaseException]()

    def call() -> None:
        try:
            connect()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=call, name="rendezvous", daemon=True).start()
    while not ended.wait(_LOOK_S):
        heed()
        look()
    if failures:
        raise failures[0]
