"""Ranks that this process has started: signals are passed on, and the one error is raised that says most."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import LostRankError, Stopped, TrainerError
from trainer.ranks import stopping
from trainer.ranks.group import Group, handled_by
from trainer.ranks.messages import Died
from trainer.ranks.place import Ranks
from trainer.ranks.stopping import EndedBySignal
from trainer.ranks.workers import run_ranks


class Process:
    """A process that has ended, or still lives."""

    pid, exitcode = 0, None

    def join(self, timeout_s: float | None = None) -> None: ...


def group_of(failures: dict[int, Exception], results: dict[int, Any], number: int | None = None) -> Group:
    made = Group(600.0)
    for _ in range(2):
        made.add(Process(), None)  # type: ignore[arg-type]
    made.failures.update(failures)
    made.results.update(results)
    if number is not None:
        made._signals.append((number, 0.0))
    return made


@pytest.mark.parametrize(
    ("failures", "number", "kind"),
    [
        ({0: Died("killed"), 1: Died("killed")}, signal.SIGINT, KeyboardInterrupt),
        ({0: Died("killed"), 1: LostRankError("rank 0")}, signal.SIGTERM, EndedBySignal),
        ({0: Stopped("after step 3"), 1: Stopped("after step 3")}, signal.SIGINT, Stopped),
        ({0: TrainerError("the disk is full"), 1: Died("killed")}, signal.SIGINT, TrainerError),
        ({0: Died("killed"), 1: LostRankError("rank 0")}, None, LostRankError),
        ({}, signal.SIGINT, KeyboardInterrupt),  # none has ended in time
    ],
)
def test_what_a_signal_has_ended_is_no_fault_of_the_ranks(
    failures: dict[int, Exception], number: int | None, kind: type[BaseException]
) -> None:
    assert type(group_of(failures, {}, number).error()) is kind


def test_a_run_that_ends_in_spite_of_a_signal_has_its_result() -> None:
    assert group_of({}, {0: 1, 1: 2}, signal.SIGINT).error() is None


def test_a_second_signal_ends_those_that_do_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAME_SIGNAL_S", 0.05)
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    ranks = group_of({}, {})
    ranks.pass_on(signal.SIGINT, None)
    ranks.pass_on(signal.SIGINT, None)  # the same one, from the terminal and from a launcher
    assert ranks._deadline_s > time.monotonic() + 100
    time.sleep(0.1)
    ranks.pass_on(signal.SIGINT, None)
    assert ranks._deadline_s < time.monotonic() + 1
    assert sent == [(0, signal.SIGINT)] * 6


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    came: list[int] = []
    with handled_by(lambda number, frame: came.append(number)):
        signal.raise_signal(signal.SIGUSR1)
    assert came == [signal.SIGUSR1]
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def says_and_ends(ranks: Ranks, folder: str, tell: Any) -> str:
    """Tells two events; rank 1 goes on until it is stopped."""
    print(f"from rank {ranks.rank}")
    first = tell((ranks.rank, "first"))
    while ranks.rank == 1:
        time.sleep(0.05)
        reason = tell((ranks.rank, "again"))
        if reason is not None:
            Path(folder, "left").touch()
            return str(reason)
    return str(first)


def test_events_are_heard_here_and_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[Any] = []

    def hear(event: Any) -> str | None:
        heard.append(event)
        return "enough" if heard.count((1, "again")) == 2 else None

    assert run_ranks(says_and_ends, 2, str(tmp_path), hear=hear, quiet=False) == ["None", "enough"]
    assert (0, "first") in heard and (1, "first") in heard and (tmp_path / "left").exists()
    assert capsys.readouterr() == ("from rank 0\n", "")


def test_a_rank_that_was_killed_is_named_with_the_signal() -> None:
    with pytest.raises(Died, match=r"^rank 0 was killed by SIGKILL$"):
        run_ranks(kill_self, 1)


def kill_self(ranks: Ranks) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
