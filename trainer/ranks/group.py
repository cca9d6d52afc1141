"""The ranks that this process has started: it reads their messages, passes signals on to them, and ends them."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ..errors import LostRankError, TrainerError
from . import messages, stopping
from .messages import Died, WorkerError

# After a rank has failed, the others have this time to end by themselves.
_GRACE_S = 10.0
# After a SIGTERM they have this time.
_LEAVING_S = 2.0


class Group:
    """The processes of one start, and their results.

    Args:
        timeout_s: after this time, the ranks that are left are ended.

    Attributes:
        results, failures: what ranks have returned and raised so far, by rank.
    """

    def __init__(self, timeout_s: float) -> None:
        self.results: dict[int, Any] = {}
        self.failures: dict[int, Exception] = {}
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._signals: list[tuple[int, float]] = []  # (number, time.monotonic() when it came)
        self._timeout_s, self._deadline_s = timeout_s, time.monotonic() + timeout_s
        self._came: queue.SimpleQueue[tuple[int, str, Any]] = queue.SimpleQueue()

    def add(self, process: Any, pipe: multiprocessing.connection.Connection) -> None:
        """Adds the next rank, whose process has been started."""
        self._processes.append(process)
        self._pipes.append(pipe)

    def _read(self) -> None:
        """Reads messages as they come. Otherwise a rank would wait until this process has handled earlier ones."""
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while ranks:
            for pipe in multiprocessing.connection.wait(list(ranks)):
                assert isinstance(pipe, multiprocessing.connection.Connection)
                try:
                    self._came.put((ranks[pipe], *pipe.recv()))
                except Exception:  # its other end is closed, or the rank has died inside a message
                    self._came.put((ranks.pop(pipe), "gone", None))

    def wait(self, hear: Callable[[Any], str | None]) -> None:
        """Waits until every rank has a result or a failure, or the time is over.

        Args:
            hear: called with each event. What it returns is sent to the rank, unless it is None.
        """
        threading.Thread(target=self._read, name="ranks", daemon=True).start()
        while len(self.results) + len(self.failures) < len(self._processes):
            left_s = self._deadline_s - time.monotonic()
            if left_s <= 0:
                return
            try:
                rank, kind, value = self._came.get(timeout=min(left_s, 1.0))  # a signal may bring the deadline nearer
            except queue.Empty:
                continue
            if kind == "console":
                messages.show(value)
            elif rank in self.results or rank in self.failures:
                continue
            elif kind == "event":
                reason = hear(value)
                if reason is not None:
                    with contextlib.suppress(OSError):
                        self._pipes[rank].send(reason)
            elif kind == "result":
                self.results[rank] = value
            else:
                self.failures[rank] = self._died(rank) if kind == "gone" else messages.failure(rank, kind, value)
                self._deadline_s = min(self._deadline_s, time.monotonic() + _GRACE_S)

    def _died(self, rank: int) -> Died:
        process = self._processes[rank]
        process.join(1.0)
        if process.exitcode is not None and process.exitcode < 0:
            return Died(f"rank {rank} was killed by {signal.Signals(-process.exitcode).name}")
        return Died(f"rank {rank} died without a message")

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """A handler of signals: passes each one on to the ranks. A second one means "at once", as for one rank."""
        now_s = time.monotonic()
        if self._signals and now_s - self._signals[0][1] > stopping.SAME_SIGNAL_S:
            self._deadline_s = min(self._deadline_s, now_s + stopping.SAME_SIGNAL_S)
        self._signals.append((number, now_s))
        for process in self._processes:
            with contextlib.suppress(OSError):  # it has ended
                os.kill(process.pid, number)

    def end(self, *, gently: bool = False) -> None:
        """Ends the processes that are left. If all have brought a result, it only waits: they end by themselves.

        Args:
            gently: send SIGTERM first. A run that has not begun then removes its output folder.
        """
        if len(self.results) < len(self._processes):
            left = [process for process in self._processes if process.is_alive()]
            for process in left if gently else []:
                process.terminate()
            until_s = time.monotonic() + _LEAVING_S
            for process in left if gently else []:
                process.join(max(0.0, until_s - time.monotonic()))
            for process in left:
                process.kill()
        for process in self._processes:
            process.join()

    def error(self) -> BaseException | None:
        """The one error of all ranks that a person should see; None if each has a result."""
        known = sorted(self.failures, key=lambda rank: (messages.silence(self.failures[rank]), rank))
        first = self.failures[known[0]] if known else None
        missing = sorted(set(range(len(self._processes))) - set(self.results) - set(self.failures))
        if first is None and not missing:
            return None
        # A signal ends a rank that does not handle signals yet. This rank has no error of its own, and the others
        # report it as lost. The signal is the cause, so it is what the person sees.
        if self._signals and (not isinstance(first, TrainerError) or isinstance(first, LostRankError)):
            number = self._signals[0][0]
            return KeyboardInterrupt() if number == signal.SIGINT else stopping.EndedBySignal(number)
        return first or WorkerError(f"ranks {missing} did not end within {self._timeout_s:g} s")


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None] | None) -> Iterator[None]:
    """Signals call the handler in this context. Only the main thread can have one: a rule of Python."""
    before: dict[signal.Signals, Any] = {}
    if handler is not None and threading.current_thread() is threading.main_thread():
        # Under nohup SIGHUP is ignored: the run must survive its terminal.
        wanted = [n for n in stopping.SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
