"""What can end a run from outside: signals, time, a launcher that is gone, ranks that no longer answer.

One thread per rank, beside the step. A wish to stop is noted here and travels with the next gradient exchange, so
that all ranks stop after the same step. Every second a rank says in the store at which the ranks met where it
stands; one that falls silent, or holds all others up, is named, and the others leave.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from .distributed import Ranks, first_to_speak, gather_objects, meetings, side_store
from .errors import LostRankError, TrainerError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A launcher passes a signal on to ranks that have had it from the terminal or the scheduler already: within so
# long, it is the same one. Afterwards it means "at once".
_SAME_SIGNAL_S = 2.0
_BEAT_S = 1.0
# How long to wait for the store where there is another way.
_STORE_TIMEOUT_S = 2.0
# How long the run's own thread may take to notice what this one has noticed.
_MOMENT_S = 1.5
# From the moment that a rank is given up until all have left.
_LEAVING_S = 12.0
# With a broken connection as evidence, a rank that is silent for so long is gone.
_SILENT_S = 3.5 * _BEAT_S


def _within(limit_s: float, ask: Callable[[], Any]) -> Any:
    """What `ask` returns or raises; TimeoutError if it does not come back in time."""
    came: list[Any] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            came.append(ask())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if failures:
        raise failures[0]
    if not came:
        raise TimeoutError
    return came[0]


def _ignore(number: int, frame: FrameType | None) -> None:
    """Python must have a handler, or the signal would have its usual effect; the thread does the work."""


class Watch:
    """Watches over one run: over its ranks from their meeting on, over signals from `begin` on.

    Collective: every rank makes one.

    Args:
        ranks: this rank, and how many.
        hang_timeout_s: how long a rank may not answer.
        deadline_s: time.time() at which the run shall stop by itself; None for never.
    """

    def __init__(self, ranks: Ranks, hang_timeout_s: float, deadline_s: float | None) -> None:
        self._ranks, self._timeout_s, self._deadline_s = ranks, hang_timeout_s, deadline_s
        self._begun = False
        self._step = 0
        self._in_exchange = False
        self._reason: str | None = None
        self._asked_at_s = 0.0
        self._lost: str | None = None
        self._closing = threading.Event()
        self._launchers = _launchers() if _at_start is None else _at_start
        self._hosts = gather_objects(socket.gethostname())
        # Nothing is read from it in the run's own thread, so it may take as long as it likes to answer.
        self._store = side_store(86400.0)
        self._beats = [f"beat/{r}" for r in range(ranks.world_size)]
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._answered_at_s = time.monotonic()
        self._looked_at_s = time.monotonic()
        self._broken = False
        self._said: dict[str, str] = {}
        self._woke_at_s = -math.inf
        self._beat_count = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        if self._store is not None:
            self._beat()
            gather_objects(None)  # everyone's first beat is there
            threading.Thread(target=self._talk, name="beat", daemon=True).start()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # ---- what the run's own thread says and asks -------------------------------------------------------------

    def begin(self) -> None:
        """The run can be stopped from now on: signals no longer end the process, and steps are waited for."""
        if threading.current_thread() is threading.main_thread():
            # The number of every signal is written here at once, even while Python waits inside of a collective.
            self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            self._handlers = {number: signal.signal(number, _ignore) for number in _SIGNALS}
        self._begun = True

    def at(self, step: int, phase: str) -> None:
        """Notes where this rank stands: "compute" while it works on its own, "exchange" while it waits for others."""
        self._step = step
        if (phase == "exchange") != self._in_exchange:
            self._in_exchange = not self._in_exchange
            meetings.__enter__() if self._in_exchange else meetings.__exit__()

    @property
    def stop_reason(self) -> str | None:
        """Why this rank has been asked to stop; None if it has not."""
        if self._reason is None and self._deadline_s is not None and time.time() >= self._deadline_s:
            self._reason = "the wall-time budget (trainer.max_wall_time_s) is used up"
        return self._reason

    def tell_failure(self, error: BaseException) -> None:
        """Tells the other ranks that this one ends with an error that it reports itself."""
        if self._store is None:
            return
        code = error.exit_code if isinstance(error, TrainerError) else 1
        with contextlib.suppress(Exception):
            _within(_STORE_TIMEOUT_S, lambda: self._store.set("failed", json.dumps([self._ranks.rank, code])))
        if self._ranks.first:
            # Its process holds the store: the others must have read it there before this one ends.
            self._closing.wait(2 * _BEAT_S)

    def explain(self, error: BaseException) -> TrainerError | None:
        """Why a collective failed: another rank's error, which that rank reports, or a rank that is gone; else None."""
        if self._store is None:
            return None
        deadline_s = time.monotonic() + 3 * _SILENT_S
        while time.monotonic() < deadline_s:
            time.sleep(0.2)  # first: the thread may have something to read
            if time.monotonic() - self._looked_at_s > 2 * _BEAT_S:
                continue  # it has not looked since this process was stopped
            failed = self._failed_elsewhere()
            if failed is not None:
                return failed
            lost = self._lost or self._said.get("lost") or self._who_is_lost(_SILENT_S)
            if lost is not None:
                return self._lost_error(lost)
        return None

    def close(self) -> None:
        """Ends the watching; signals have their usual effect again."""
        self._closing.set()
        if self._handlers:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        os.write(self._write_end, b"\0")  # wakes the thread
        self._thread.join(timeout=10.0)
        os.close(self._read_end)
        os.close(self._write_end)

    # ---- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            self._read_signals(_BEAT_S)
            if self._closing.is_set():
                return
            if time.monotonic() - self._looked_at_s > _SILENT_S:
                self._wake()
            self._looked_at_s = time.monotonic()
            if self._reason is None and self._launchers != _launchers(self._launchers):
                self._ask("the launcher is gone")  # heard of in the first step, where it has not begun
            if self._store is None:
                continue
            failed = self._failed_elsewhere()
            if failed is None and "lost" in self._said:
                # Another rank says it. Those that leave break the connections on which the others wait, so at once;
                # rank 0, whose store this comes from, a little later.
                self._closing.wait(4 * _BEAT_S if self._ranks.first else 0.5)
                os._exit(LostRankError.exit_code)
            lost = None if failed else self._judge()
            if failed is None and lost is None:
                continue
            if lost is not None:
                self._lost = lost
            # The run's own thread may be stuck in a collective: give it a moment to find out for itself.
            if self._closing.wait(_MOMENT_S):
                return
            if failed is not None:
                os._exit(failed.exit_code)
            error = self._lost_error(str(lost))
            if error.speaks:
                print(f"\nerror: {error}", file=sys.stderr, flush=True)
            if error.speaks or self._ranks.first:
                # A launcher ends the others, who come to the same end, as soon as one has ended; and from rank 0's
                # store they learn of it.
                time.sleep(3.0)
            os._exit(error.exit_code)

    def _read_signals(self, wait_s: float) -> None:
        ready, _, _ = select.select([self._read_end], [], [], wait_s)
        for number in os.read(self._read_end, 64) if ready else b"":
            if number not in _SIGNALS:
                continue
            if self._reason is not None and time.monotonic() - self._asked_at_s > _SAME_SIGNAL_S:
                os._exit(128 + number)
            if self._reason is None:
                self._ask(signal.Signals(number).name)

    def _wake(self) -> None:
        """This process was stopped for a while (SIGSTOP, a suspended job): nobody else was silent."""
        self._woke_at_s = time.monotonic()
        self._heard = {rank: (beat, self._woke_at_s) for rank, (beat, _) in self._heard.items()}

    def _ask(self, reason: str) -> None:
        self._reason, self._asked_at_s = reason, time.monotonic()

    def _beat(self) -> None:
        self._beat_count += 1
        beat = json.dumps([self._beat_count, meetings.count])
        self._store.set(self._beats[self._ranks.rank], beat)

    def _talk(self) -> None:
        """The other thread: beats, and notes what the others say. Cut off, it waits for good: reads have no limit."""
        while not self._closing.is_set():
            try:
                self._beat()
                names = [name for name in ("failed", "lost") if self._store.check([name])]
                said = {name: self._store.get(name).decode() for name in names}
                beats = self._store.multi_get(self._beats)
            except Exception:
                self._broken = True
                return
            self._said, self._answered_at_s = said, time.monotonic()
            for rank, beat in enumerate(beats):
                if rank not in self._heard or self._heard[rank][0] != beat:
                    self._heard[rank] = (beat, self._answered_at_s)
            self._closing.wait(_BEAT_S)

    def _judge(self) -> str | None:
        """A sentence on ranks that are lost, or None."""
        limit_s = max(0.4 * self._timeout_s, self._timeout_s - _LEAVING_S)
        lost = self._who_is_lost(limit_s)
        if lost is not None:
            return lost
        # Everyone answers, but somebody holds all others up. (Before the first step, that may be work: rank 0 alone
        # builds a cache or compiles DeepSpeed's kernel.)
        if not self._begun:
            return None
        count, since_s = meetings.count, meetings.since_s
        if since_s is not None and time.monotonic() - max(since_s, self._woke_at_s) > limit_s:
            behind = [rank for rank, (beat, _) in sorted(self._heard.items()) if json.loads(beat)[1] < count]
            if behind:
                return self._sentence(behind, f"did not come to the exchange within {limit_s:g} s")
        return None

    def _who_is_lost(self, silent_s: float) -> str | None:
        if self._broken or time.monotonic() - max(self._answered_at_s, self._woke_at_s) > silent_s:
            return self._sentence([0], "cannot be reached")
        silent = [r for r, (_, heard_s) in list(self._heard.items()) if self._answered_at_s - heard_s > silent_s]
        silent = [r for r in silent if r != self._ranks.rank]
        if not silent:
            return None
        return self._sentence(silent, f"did not answer for {silent_s:g} s")

    def _sentence(self, ranks: list[int], what: str) -> str:
        names = [f"{r} on {self._hosts[r]}" for r in ranks[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        when = f"in step {self._step + 1}" if self._begun else "before the first step"
        return (
            f"Rank{'s' * (len(ranks) > 1)} {', '.join(names)}{more} {what}, {when}: killed, hanging, "
            "or cut off from the network.\nThe other ranks leave. To go on from the last checkpoint, start the run "
            "again with --resume auto and the same --output_dir, on any number of ranks."
        )

    def _failed_elsewhere(self) -> TrainerError | None:
        if "failed" not in self._said:
            return None
        rank, code = json.loads(self._said["failed"])
        if rank == self._ranks.rank:
            return None
        error = TrainerError(f"rank {rank} has failed", agreed=True)
        error.exit_code = int(code)
        error.speaks = False
        return error

    def _lost_error(self, sentence: str) -> LostRankError:
        """The error, which one rank says."""
        error = LostRankError(sentence)
        # A rank that was stopped finds the others gone: they have said why.
        asleep = time.monotonic() - self._woke_at_s < 2 * self._timeout_s
        try:
            if self._broken:
                raise ConnectionError
            # The others leave with this one, before they miss the ranks that have left already.
            _within(_STORE_TIMEOUT_S, lambda: self._store.compare_set("lost", "", sentence))
            speaks = not asleep and _within(_STORE_TIMEOUT_S, lambda: self._store.add("spoken", 1)) == 1
            if speaks:
                first_to_speak(self._ranks)  # so that nobody here does who finds the store gone
        except Exception:  # the store went down with its rank
            speaks = not asleep and first_to_speak(self._ranks)
        error.speaks = speaks
        return error


_at_start: list[tuple[int, int]] | None = None


def remember_launchers() -> None:
    """Notes who started this rank; called early, as one that ends before the first step shall be missed too."""
    global _at_start
    _at_start = _launchers()


def _launchers(known: list[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """(process, its parent) of the launcher that started this rank, and of DeepSpeed's runner above it.

    DeepSpeed's runner forgets its ranks on SIGTERM. A process whose parent is another than at the start has lost it.
    """
    if known is not None:
        return [(process, _parent(process)) for process, _ in known]
    chain: list[tuple[int, int]] = []
    process = os.getpid()
    while len(chain) < 2:
        parent = _parent(process)
        if not any(word in _command(parent) for word in (b"deepspeed", b"torchrun", b"torch.distributed.run")):
            break
        chain.append((process, parent))
        process = parent
    return chain


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
