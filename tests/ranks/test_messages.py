"""What a rank says arrives as it was meant: its console, its errors, and requests in the other direction."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from trainer.errors import NonFiniteError, Stopped
from trainer.ranks import messages, speech
from trainer.ranks.messages import Line, WorkerError, call, failure
from trainer.ranks.stopping import EndedBySignal


@pytest.fixture
def line() -> Iterator[tuple[Line, Any, threading.Event]]:
    """A rank's line, the other end of it, and whether that is found to be gone."""
    ours, theirs = multiprocessing.Pipe()
    gone = threading.Event()
    yield Line(theirs, gone.set), ours, gone
    theirs.close()


def arrived(pipe: Any) -> list[Any]:
    found = []
    while pipe.poll():
        found.append(pipe.recv())
    return found


def test_events_go_one_way_and_reasons_to_stop_the_other(line: tuple[Line, Any, threading.Event]) -> None:
    rank, pipe, gone = line
    assert rank.tell("first") is None
    pipe.send("a callback has failed")
    while rank.received.empty():
        pass
    assert rank.tell("second") == "a callback has failed"
    assert rank.tell("third") is None
    assert arrived(pipe) == [("event", "first"), ("event", "second"), ("event", "third")]
    pipe.close()
    assert gone.wait(10)
    rank.send("event", "nobody hears it")


@pytest.mark.parametrize(
    ("kind", "first", "out", "err"),
    [
        ("shown", True, "a line\nhalf", "\r50%"),
        ("shown", False, "", "\r50%"),
        ("errors", True, "", "\r50%"),
        ("dropped", True, "", ""),
        ("inherited", True, "", ""),
    ],
)
def test_what_becomes_of_a_console(
    line: tuple[Line, Any, threading.Event], kind: messages.Console, first: bool, out: str, err: str
) -> None:
    rank, pipe, _ = line
    with messages.console(kind, rank, first, terminal=True):
        print("a line")
        print("half", end="")
        sys.stderr.write("\r50%")
        sys.stderr.flush()
        bars = sys.stderr.isatty()
        if not first:
            warnings.warn("as on rank 0", stacklevel=1)
    found = arrived(pipe)
    assert "".join(text for _, (name, text) in found if name == "stdout") == out
    assert "".join(text for _, (name, text) in found if name == "stderr") == err
    assert bars is (kind == "shown" and first)  # a progress bar is for rank 0, on a terminal


def test_what_is_shown_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    messages.show(("stdout", "a\n"))
    messages.show(("stderr", "b\n"))
    assert capsys.readouterr() == ("a\n", "b\n")
    closed = open("/dev/null", "w")  # noqa: SIM115
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    messages.show(("stdout", "the terminal is gone"))


class Local(Exception):
    pass


def ends(error: BaseException) -> Any:
    def function() -> None:
        raise error

    return call(function)


def brought(error: BaseException) -> Exception:
    """A rank's error as the process that started it gets it."""
    return failure(1, *pickle.loads(pickle.dumps(ends(error))))


def test_an_error_keeps_its_class_its_words_and_its_numbers() -> None:
    bad, stopped = NonFiniteError("nan"), Stopped("stopped after step 3")
    bad.good_steps, stopped.reason = 7, "SIGINT"
    found = brought(bad)
    assert isinstance(found, NonFiniteError) and (str(found), found.good_steps) == ("nan", 7)
    found = brought(stopped)
    assert isinstance(found, Stopped) and (str(found), found.reason) == ("stopped after step 3", "SIGINT")


def test_an_error_of_the_task_comes_with_its_traceback() -> None:
    found = brought(ZeroDivisionError("a slip"))
    assert isinstance(found, WorkerError) and isinstance(found.original, ZeroDivisionError)
    assert str(found).startswith("rank 1 failed:\nTraceback") and "ZeroDivisionError: a slip" in str(found)
    Local.__module__ = "user_task_of_the_rank"  # a module that this process has not loaded
    found = brought(Local("mine"))
    assert isinstance(found, WorkerError) and found.original is None and "Local: mine" in str(found)


@pytest.mark.parametrize(("end", "name"), [(KeyboardInterrupt(), "SIGINT"), (EndedBySignal(15), "SIGTERM")])
def test_a_rank_that_a_signal_has_ended(end: BaseException, name: str) -> None:
    found = brought(end)
    assert str(found) == f"rank 1 was ended by {name}" and messages.silence(found) == 4


def test_a_rank_speaks_over_its_line(
    line: tuple[Line, Any, threading.Event], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its watching thread would print before it ends the process."""
    rank, pipe, _ = line
    monkeypatch.setattr(speech, "speak", speech.print_error)
    speech.speak(NonFiniteError("nan"))
    assert capsys.readouterr().err == "\nerror: nan\n"
    messages.speak_over(rank)
    speech.speak(NonFiniteError("nan"))
    assert arrived(pipe)[0][0] == "error" and capsys.readouterr().err == ""


def test_without_its_starter_a_run_stops_as_on_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        messages.stop_this_process()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]
