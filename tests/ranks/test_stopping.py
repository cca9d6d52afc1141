"""A wish to stop: what counts, and when a signal means "at once"."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from trainer.ranks import stopping
from trainer.ranks.stopping import EndedBySignal, SignalPipe, StopWish, heed, raised


class Clock:
    """time.time and time.monotonic, which stand still until they are moved."""

    now_s = 1000.0

    def time(self) -> float:
        return self.now_s

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    return clock


def test_nobody_has_asked(clock: Clock) -> None:
    wish = StopWish(None)
    assert wish.reason is None


def test_the_first_reason_counts(clock: Clock) -> None:
    wish = StopWish(None)
    wish.ask("SIGTERM")
    wish.ask("the launcher is gone")
    assert wish.reason == "SIGTERM"


def test_a_signal_that_comes_twice_at_once_is_one(clock: Clock) -> None:
    """A launcher passes on what the terminal has sent to all."""
    wish = StopWish(None)
    assert not wish.signalled("SIGINT")
    clock.now_s += 1.9
    assert not wish.signalled("SIGINT")
    clock.now_s += 0.2
    assert wish.signalled("SIGINT")


def test_a_clock_that_is_set_changes_no_budget(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    wish = StopWish(1010.0)
    monkeypatch.setattr(clock, "time", lambda: 1e9, raising=False)
    assert wish.reason is None
    monkeypatch.setattr(clock, "time", lambda: 0.0)
    clock.now_s = 1010.0
    assert wish.reason is not None


@pytest.mark.parametrize("number", [n for n in stopping.SIGNALS if n != signal.SIGINT])
def test_before_a_run_reacts_to_signals_they_end_it_as_ctrl_c_does(number: signal.Signals) -> None:
    """And only then: outside, and in children, they have their usual effect. SIGHUP stays ignored under nohup."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(EndedBySignal) as ended, raised(True):
            os.kill(os.getpid(), number)
        assert ended.value.signal == number
        assert signal.getsignal(number) == signal.SIG_DFL
        with raised(True):
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), number)
                os._exit(0)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
        with raised(False):
            assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with raised(True):
            os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)


def test_the_budget_is_no_signal(clock: Clock) -> None:
    """The scheduler's SIGTERM that follows is the first one, and does not end the run at once."""
    wish = StopWish(1010.0)
    assert wish.reason is None
    clock.now_s = 1010.0
    assert wish.reason == "the wall-time budget (trainer.max_wall_time_s) is used up"
    clock.now_s = 1100.0
    assert not wish.signalled("SIGTERM")
    assert wish.reason == "SIGTERM"


def test_a_launcher_that_is_gone_is_no_signal(clock: Clock) -> None:
    """The scheduler ends the launcher, and some seconds later the ranks."""
    wish = StopWish(1010.0)
    wish.ask("the launcher is gone")
    clock.now_s = 1100.0
    assert not wish.signalled("SIGTERM")
    assert wish.reason == "the launcher is gone"
    clock.now_s += 3.0
    assert wish.signalled("SIGTERM")


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_signals_are_read_and_then_harmless_no_more(number: signal.Signals) -> None:
    before = signal.signal(number, signal.default_int_handler)  # under nohup SIGHUP would be ignored
    pipe = SignalPipe()
    pipe.install()
    try:
        os.kill(os.getpid(), number)
        assert pipe.read(5.0) == [number]
        assert pipe.read(0.0) == []
    finally:
        pipe.restore()
        assert pipe.read(5.0) == []  # it was woken, by nothing that counts
        pipe.close()
        left = signal.signal(number, before)
    assert left == signal.default_int_handler


def test_under_nohup_a_run_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    pipe = SignalPipe()
    pipe.install()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert pipe.read(0.0) == []
    finally:
        pipe.restore()
        pipe.close()
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_before_a_run_is_one_line() -> None:
    """Whatever is being imported: some libraries turn a KeyboardInterrupt into an ImportError."""
    program = (
        "import os, signal; from trainer.ranks.stopping import end_at_once;"
        "signal.signal(signal.SIGINT, end_at_once)\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt: raise ImportError('numpy')"
    )
    for rank, said in (("0", "\nstopped from the keyboard before the first step\n"), ("1", "")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env=os.environ | {"RANK": rank},
            check=False,
        )
        assert (done.returncode, done.stderr) == (130, said)


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGTERM, EndedBySignal), (signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, EndedBySignal)],
)
def test_a_signal_that_someone_has_caught_is_raised_again(number: int, error: type[BaseException]) -> None:
    """DeepSpeed and tasks have an `except:` without a type."""

    def run() -> None:
        with raised(True):
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), number)
            heed()

    with pytest.raises(error):
        run()
    heed()  # the next run in this process knows nothing of it


def test_ctrl_c_is_heeded_by_ranks_that_have_nothing_to_remove() -> None:
    """Else this rank would say that rank 0 has failed, which was ended by the same Ctrl-C."""

    def run() -> None:
        with raised(False):
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGINT)
            heed()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGTERM) == before
