"""What a rank says to the process that started it: its console, events of its run, and how it ended."""

from __future__ import annotations

import contextlib
import io
import multiprocessing.connection
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..errors import BY_EXIT_CODE, TrainerError
from . import speech
from .stopping import EndedBySignal

# What becomes of a rank's output. "inherited": it goes where the output of the starting process goes. "dropped": stdout
# is dropped, stderr is inherited. "shown": the starting process prints all of rank 0, and stderr of the others.
# "errors": it prints only stderr.
Console = Literal["inherited", "dropped", "shown", "errors"]


class WorkerError(Exception):
    """A rank ended with something other than a TrainerError; the message holds its traceback.

    Attributes:
        original: the rank's own exception; None if it cannot be brought into this process.
    """

    original: BaseException | None = None


class Died(WorkerError):
    """A rank has ended without a message."""


class Line:
    """A rank's line to the process that started it. Any thread may use it.

    Args:
        pipe: to that process.
        lost: called when that process is gone, in a thread of its own.
    """

    def __init__(self, pipe: multiprocessing.connection.Connection, lost: Callable[[], None]) -> None:
        self._pipe, self._lost, self._lock = pipe, lost, threading.Lock()
        self.received: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                self.received.put(self._pipe.recv())
        except (EOFError, OSError):
            self._lost()

    def send(self, kind: str, value: Any) -> None:
        """Sends a message. If the other process is gone, the message is dropped."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send((kind, value))

    def close(self) -> None:
        """Says that no more messages come."""
        with self._lock:
            self._pipe.close()

    def tell(self, value: Any) -> str | None:
        """Sends an event. Returns why the run has to stop, if the other process has asked for that."""
        self.send("event", value)
        try:
            reason: str = self.received.get_nowait()
        except queue.Empty:
            return None
        return reason


def stop_this_process() -> None:
    """Stops the run in this process as on SIGTERM, with a checkpoint. Called if its starting process is gone."""
    os.kill(os.getpid(), signal.SIGTERM)


class _Stream(io.TextIOBase):
    """A stream of a rank. The process that started the rank prints what is written to it."""

    encoding = "utf-8"

    def __init__(self, line: Line, name: str, terminal: bool, descriptor: int) -> None:
        self._line, self._name, self._terminal, self._descriptor = line, name, terminal, descriptor
        self._written = ""

    def write(self, text: str) -> int:
        self._written += text
        if self._written.endswith("\n"):  # print() writes it by itself
            self.flush()
        return len(text)

    def flush(self) -> None:
        written, self._written = self._written, ""
        if written:
            self._line.send("console", (self._name, written))

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._terminal

    def fileno(self) -> int:
        """The number of the terminal, which the rank has inherited: a progress bar asks it for its width."""
        return self._descriptor


@contextlib.contextmanager
def console(kind: Console, line: Line, first: bool, terminal: bool) -> Iterator[None]:
    """Where a rank prints in this context.

    Args:
        kind: what becomes of it.
        line: to the process that shows it.
        first: whether this is rank 0.
        terminal: whether the errors of that process go to a terminal.
    """
    if kind == "inherited":
        yield
        return
    out = _Stream(line, "stdout", terminal and os.isatty(1), 1) if kind == "shown" and first else io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.callback(out.flush)
        if kind != "dropped":
            errors = _Stream(line, "stderr", terminal and first and kind == "shown", 2)
            stack.enter_context(contextlib.redirect_stderr(errors))
            stack.callback(errors.flush)
            stack.enter_context(warnings.catch_warnings())
            if not first:
                warnings.simplefilter("ignore")  # rank 0 shows the same ones
        yield


def show(message: tuple[str, str]) -> None:
    """Prints what a rank has printed, in the process that started it."""
    name, text = message
    with contextlib.suppress(OSError, ValueError):  # the terminal is gone
        stream = sys.stdout if name == "stdout" else sys.stderr
        stream.write(text)
        stream.flush()


def speak_over(line: Line) -> None:
    """From now on, the errors that this rank would print go to the process that started it."""
    speech.speak = lambda error: line.send("error", _packed(error))


def call(function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """Calls a function. Returns a message: its result, or its error."""
    try:
        return "result", function(*arguments)
    except TrainerError as error:
        return "error", _packed(error)
    except (KeyboardInterrupt, EndedBySignal) as end:
        return "ended", int(getattr(end, "signal", signal.SIGINT))
    except BaseException as error:
        return "traceback", (traceback.format_exc(), _pickled(error))


def _packed(error: TrainerError) -> tuple[int, str, dict[str, Any]]:
    return error.exit_code, str(error), vars(error)


def _pickled(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # of some classes, what can be written cannot be read
    except Exception:
        return None
    return data


def failure(rank: int, kind: str, value: Any) -> Exception:
    """The error that a rank's message stands for: "error", "ended" or "traceback"."""
    if kind == "error":
        code, text, attributes = value
        known = BY_EXIT_CODE.get(code, TrainerError)(text, agreed=True)
        vars(known).update(attributes | {"agreed": True})
        return known
    if kind == "ended":
        return Died(f"rank {rank} was ended by {signal.Signals(value).name}")
    text, data = value
    slip = WorkerError(f"rank {rank} failed:\n{text}")
    with contextlib.suppress(Exception):  # its class may be one that only the rank has loaded
        slip.original = None if data is None else pickle.loads(data)
    return slip


def silence(error: Exception) -> int:
    """How little an error says about the cause: 0 for the most. The error with the lowest value is shown."""
    if isinstance(error, TrainerError):
        # True: it reports for all. None: its own error. False: it left because of another rank, whose error says more.
        return {True: 0, None: 1, False: 3}[error.speaks]
    return 4 if isinstance(error, Died) else 2  # a traceback may be of a connection that another rank has broken
