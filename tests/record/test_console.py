"""What a person sees: lines, a progress bar, tables; and what DeepSpeed says, kept in its file."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.record import console as console_module
from trainer.record.console import DeepSpeedLog, ProgressBar, say, table

# Lines


def test_a_run_goes_on_when_nobody_listens_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `python trainer/main.py ... | head -1`."""
    read_end, write_end = os.pipe()
    with open(write_end, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        say("one", "two")
        assert os.read(read_end, 100) == b"one\ntwo\n"  # at once
        os.close(read_end)
        say("three")
        say("four")


# DeepSpeed's log


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    """Where DeepSpeed's logger writes to, by a handler that DeepSpeed attaches on import."""
    console, logger = io.StringIO(), logging.getLogger("DeepSpeed")
    before = logger.level, logger.propagate, logger.handlers
    logger.setLevel(logging.WARNING)
    logger.propagate, logger.handlers = False, [logging.StreamHandler(console)]
    yield console
    logger.setLevel(before[0])
    logger.propagate, logger.handlers = before[1:]


def test_deepspeed_speaks_in_its_file_and_not_on_the_console(
    tmp_path: Path, console: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, log = logging.getLogger("DeepSpeed"), DeepSpeedLog(keep=True)
    log.install()
    try:
        logger.warning("before there is a file")
        with log.capture():
            print("printed by DeepSpeed")
            print("printed as an error", file=sys.stderr)
        print("ours")
        path = tmp_path / "logs" / "deepspeed.log"
        log.open(path)
        logger.info("told since it was asked")
        said = path.read_text()  # readable while the run goes on
    finally:
        log.close()
    for words in ("WARNING", "before there is a file", "printed by DeepSpeed", "printed as an error", "told since"):
        assert words in said
    assert capsys.readouterr() == ("ours\n", "")
    assert console.getvalue() == ""
    logger.warning("after the run")
    assert console.getvalue() == "after the run\n"
    assert path.read_text() == said


def test_a_full_disk_under_the_log_alone_ends_no_run(tmp_path: Path, console: io.StringIO) -> None:
    logger, log = logging.getLogger("DeepSpeed"), DeepSpeedLog(keep=True)
    log.install()
    (tmp_path / "deepspeed.log").symlink_to("/dev/full")
    log.open(tmp_path / "deepspeed.log")
    for _ in range(3):
        logger.warning("no room for this")
    log.close()
    assert console.getvalue() == ""


def test_other_ranks_keep_nothing(console: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    logger, log = logging.getLogger("DeepSpeed"), DeepSpeedLog(keep=False)
    log.install()
    with log.capture():
        print("printed by DeepSpeed")
        logger.warning("a warning")
        assert logger.level == logging.WARNING  # DeepSpeed is not asked for more
    log.close()
    assert capsys.readouterr() == ("", "")
    assert console.getvalue() == ""


def test_an_error_ends_the_capture(console: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    log = DeepSpeedLog(keep=True)
    with pytest.raises(ZeroDivisionError), log.capture():
        raise ZeroDivisionError
    print("heard")
    assert capsys.readouterr().out == "heard\n"


# Progress


def record(step: int, **values: float) -> dict[str, float]:
    values = {"train/loss": 0.5, "train/learning_rate": 0.001, "throughput/samples_per_s": 1234.5} | values
    return {"step": step, "epoch": 2} | values


def test_a_line_every_tenth_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(1000, visible=True)
    for step in range(10, 1001, 10):
        bar.logged(record(step))
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].replace(",", "")) for line in lines] == list(range(10, 1000, 100))
    assert lines[0] == "step 10 of 1,000  epoch 2  loss 0.5000  learning rate 0.001  1,234 samples/s"


def test_evaluations_are_as_rare(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of windows and of evaluations do not keep one another away."""
    bar = ProgressBar(100, visible=True)
    for step in range(1, 101):
        bar.logged(record(step))
        bar.evaluated(step, "validation", {"loss": 0.25, "accuracy": 0.9})
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if "validation" in line]
    assert len(lines) == 20 and len(shown) == 10
    assert shown[0] == "step 1 of 100  validation: loss 0.2500  accuracy 0.9000"


def test_a_short_run_shows_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar(3, visible=True)
    for step in (1, 2, 3):
        bar.logged(record(step))
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_only_one_rank_shows_anything(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        bar = ProgressBar(10, visible=False)
        bar.begin()
        bar.logged(record(10))
        bar.evaluated(10, "test", {"loss": 1.0})
        bar.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on: it begins where the run does, and after all that is said before."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    bar = ProgressBar(100, visible=True, done=40)
    assert capsys.readouterr() == ("", "")
    bar.begin()
    assert "40/100" in capsys.readouterr().err
    bar.logged(record(70))
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "70/100" in err and "loss 0.5000, 1,234 samples/s" in err


@pytest.mark.parametrize(
    ("columns", "beside"),
    [
        (60, "loss 0.5000"),
        (80, "loss 0.5000, validation accuracy 0.9000"),
        (120, "loss 0.5000, validation accuracy 0.9000, 1,234 samples/s, validation loss 1.0000"),
    ],
)
def test_validation_stands_beside_the_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int, beside: str
) -> None:
    """What does not fit is left out; nothing is cut."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 30))
    for colour in (True, False):
        monkeypatch.setenv("NO_COLOR", "" if colour else "1")
        monkeypatch.setenv("TERM", "xterm")
        bar = ProgressBar(1000, visible=True)
        bar.begin()
        bar.logged(record(700))
        bar.evaluated(700, "validation", {"loss": 1.0, "accuracy": 0.9})
        bar.close()
        err = capsys.readouterr().err
        assert ("\x1b[" in err) == colour  # NO_COLOR is obeyed
        last = re.sub(r"\x1b\[\d*m", "", err).rstrip("\n").rsplit("\r", 1)[1]
        assert len(last) == columns - 1 or len(last) == columns
        assert last.endswith(f", {beside}]") and " 700/1000 [" in last


def test_what_is_said_stands_above_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # one terminal, in order
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    bar = ProgressBar(100, visible=True)
    bar.begin()
    capsys.readouterr()
    say("note: a pack was too large")
    bar.close()
    before, _, after = capsys.readouterr().err.partition("note: a pack was too large\n")
    assert before.endswith("\r") and "0/100" in after


def test_a_slow_evaluation_shows_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow model it takes minutes, in which nothing else is printed."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(console_module, "_FLICKER_S", 0.0)
    tick = ProgressBar(100, visible=True).evaluating("test")
    for done in range(1, 5):
        tick(done, 4)
    assert "test:" in capsys.readouterr().err

    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    now_s = 0.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now_s)
    for visible in (True, False):
        tick = ProgressBar(100, visible=visible).evaluating("test")
        for done in range(1, 11):
            now_s += 10.0
            tick(done, 10)
        said = capsys.readouterr().out.splitlines()
        assert said == [f"test: {done} of 10 micro-batches of this rank" for done in (4, 8)] * visible


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an ssh connection is cut, every write fails."""

    class Gone(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    bar = ProgressBar(100, visible=True)
    bar.begin()
    bar.logged(record(70))
    bar.evaluating("test")(1, 1)
    bar.close()


# Tables


def test_a_table_with_a_header_aligns_numbers_to_the_right() -> None:
    assert table([("1", "yes"), ("100", "no")], ("ranks", "possible")) == (
        "ranks  possible\n"
        "-----  --------\n"
        "1           yes\n"
        "100          no"
    )  # fmt: skip


def test_a_table_without_a_header() -> None:
    assert table([("parameters", "a"), ("data", "bcd")]) == "parameters  a\ndata        bcd"
