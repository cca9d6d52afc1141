"""Requests to stop: a signal, the wall-time budget, or a launcher that has ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

# SIGHUP: the terminal or the ssh connection is gone. SIGXCPU: the limit of processor time is near.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
# A rank may get a signal twice: from the terminal or the scheduler, and from its launcher. Within this time the second
# one counts as the same signal. Later it means "stop at once".
SAME_SIGNAL_S = 2.0


class StopWish:
    """Whether this rank has been asked to stop, and why.

    Args:
        deadline_s: time.monotonic() at which the run stops by itself; None for never.
    """

    def __init__(self, deadline_s: float | None) -> None:
        self._deadline_s = deadline_s
        self._asked: str | None = None
        self._signalled_at_s: float | None = None

    @property
    def reason(self) -> str | None:
        """Why this rank has to stop; None if it does not."""
        if self._asked is None and self._deadline_s is not None and time.monotonic() >= self._deadline_s:
            return "the wall-time budget (trainer.max_wall_time_s) is used up"
        return self._asked

    def ask(self, reason: str) -> None:
        """Requests a stop. The first reason counts."""
        if self._asked is None:
            self._asked = reason

    def signalled(self, name: str) -> bool:
        """Notes a signal. Returns whether it is a second one, which ends the process at once.

        The first signal counts as the first even if the run is already stopping for another reason: the budget is used
        up, or the launcher is gone.
        """
        self.ask(name)
        if self._signalled_at_s is None:
            self._signalled_at_s = time.monotonic()
        return time.monotonic() - self._signalled_at_s > SAME_SIGNAL_S


class EndedBySignal(BaseException):
    """A signal came before the run handles signals itself. So it ends the run at once, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler of SIGINT for the time of the imports: ends the process at once, as there is nothing to clean up yet.

    A KeyboardInterrupt inside an import can turn into an ImportError. Only rank 0 prints the message.
    """
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopped from the keyboard before the first step\n")
    os._exit(130)


def end_at_once_no_more() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# The signal that has ended the run before its first step, until the run has ended.
_ended_by: int | None = None


@contextlib.contextmanager
def raised(wanted: bool) -> Iterator[None]:
    """Signals that would end the process at once raise EndedBySignal or, as usual, KeyboardInterrupt.

    So what the process has made is removed.

    Args:
        wanted: for a process that has something to remove. Others heed Ctrl-C alone, which comes to all ranks. While
            C++ code waits for other ranks, Python's handlers have to wait, too.
    """
    global _ended_by
    end_at_once_no_more()
    process, before = os.getpid(), dict[signal.Signals, Any]()

    def end(number: int, frame: FrameType | None) -> None:
        global _ended_by
        if os.getpid() == process:
            _ended_by = number
            heed()
        signal.signal(number, before[signal.Signals(number)])  # a child, which has inherited this handler
        os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        # Under nohup, SIGHUP is ignored, and others may have handlers.
        usual, heeded = (signal.SIG_DFL, signal.default_int_handler), SIGNALS if wanted else (signal.SIGINT,)
        before = {number: signal.getsignal(number) for number in heeded if signal.getsignal(number) in usual}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        _ended_by = None
        for number, handler in before.items():
            signal.signal(number, handler)


def heed() -> None:
    """Raises once more what a signal has raised before the first step.

    Other code may have caught it: an `except:` without a type, an import, or C++ code that was called from Python.
    """
    if _ended_by == signal.SIGINT:
        raise KeyboardInterrupt
    if _ended_by is not None:
        raise EndedBySignal(_ended_by)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Does nothing. Without a Python handler the signal would end the process; the watching thread handles it."""


class SignalPipe:
    """Signals as bytes in a pipe. A thread can read them even while the main thread waits inside a collective."""

    def __init__(self) -> None:
        self._handlers: dict[signal.Signals, Any] = {}
        self._old_wakeup = -1
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)

    def install(self, handler: Callable[[int, FrameType | None], None] = _ignore) -> None:
        """From now on, signals no longer end the process. It works only in the main thread: a rule of Python.

        Args:
            handler: called in the main thread with each signal that comes.
        """
        if threading.current_thread() is threading.main_thread():
            # Python writes the number of each signal into this pipe at once.
            self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            # Under nohup SIGHUP is ignored: the run must survive its terminal.
            wanted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, handler) for number in wanted}

    def read(self, wait_s: float, also: Sequence[int] = ()) -> list[signal.Signals]:
        """The signals that have arrived. Waits up to `wait_s` seconds for the first.

        Args:
            wait_s: how long.
            also: more descriptors. If one becomes readable, the wait ends, too.
        """
        poll = select.poll()
        for descriptor in (self._read_end, *also):
            poll.register(descriptor, select.POLLIN)
        ready = [descriptor for descriptor, _ in poll.poll(1e3 * wait_s)]
        numbers = os.read(self._read_end, 64) if self._read_end in ready else b""
        return [signal.Signals(number) for number in numbers if number in SIGNALS]

    def restore(self) -> None:
        """Signals have their usual effect again, and a thread that waits in `read` returns."""
        if self._handlers:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        os.write(self._write_end, b"\0")

    def close(self) -> None:
        """Closes the pipe. No thread may read from it any more."""
        os.close(self._read_end)
        os.close(self._write_end)
