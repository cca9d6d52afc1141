"""The watch over one run: signals, time, launchers, and other ranks, which a double of the heartbeat plays."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.errors import LostRankError, RanksDifferError
from trainer.ranks import stopping, watch
from trainer.ranks.collectives import meetings
from trainer.ranks.place import Ranks
from trainer.ranks.watch import Watch


class Heart:
    """What the other ranks do and say. Time passes a hundred times as fast as in a run."""

    def __init__(self) -> None:
        self.alone = False
        self.broken = False
        self.failed: tuple[int, int] | None = None
        self.lost: str | None = None
        self.silent_ranks: list[int] = []
        self.silent_since_s = math.inf  # for how long they have been silent
        self.entered: dict[int, int] = {}  # rank -> collectives
        self.said: list[Any] = []
        self.forgiven = 0
        self.unheard_s = 0.0  # for how long the store has not answered
        self.reports = 0

    @property
    def answered_at_s(self) -> float:
        return time.monotonic() - self.unheard_s

    def silent(self, silent_s: float) -> list[int]:
        return self.silent_ranks if silent_s <= self.silent_since_s else []

    def counts(self) -> dict[int, int]:
        return self.entered

    def where(self, rank: int) -> str:
        return "splits() (my_task.py, line 12)" if rank > 1 else "cached() (cache.py, line 9)"

    def forgive(self, now_s: float) -> None:
        self.forgiven += 1

    def say_failed(self, exit_code: int) -> None:
        self.said.append(exit_code)

    def say_lost(self, sentence: str) -> None:
        if self.broken:
            raise ConnectionError
        self.said.append(sentence)

    def first_to_report(self) -> bool:
        self.reports += 1
        return self.reports == 1


class Near:
    """The processes of this machine, as `Neighbours` sees them."""

    def stopped(self) -> list[int]:
        return self.stopped_ranks

    def __init__(self) -> None:
        self.dead: list[int] = []
        self.stopped_ranks: list[int] = []
        self.left = False
        self.told = self.spoke = False

    def running(self) -> list[int]:
        return []

    def speak(self) -> None:
        self.spoke = True

    def spoken(self) -> bool:
        return self.told

    def killed(self) -> list[int]:
        return self.dead

    def leave(self) -> None:
        self.left = True

    def close(self) -> None:
        pass


class Watched:
    """A rank of a run, its heart, its watch, and how its process has ended."""

    def __init__(self) -> None:
        self.heart = Heart()
        self.near = Near()
        self.codes: list[int] = []
        self.launchers_gone = False
        self.over = threading.Event()
        self.watches: list[Watch] = []

    def end(self, code: int) -> None:
        self.codes.append(code)
        self.over.wait(60)  # nothing else happens in a process that has ended

    def watch(self, rank: int = 1, world_size: int = 4, timeout_s: float = 0.5, **options: Any) -> Watch:
        made = Watch(Ranks(rank, world_size, rank, world_size), timeout_s, options.get("deadline_s"))
        self.watches.append(made)
        return made

    def ended(self) -> int:
        until(lambda: self.codes)
        return self.codes[0]


def until(condition: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    run = Watched()
    monkeypatch.setattr(watch, "Heartbeat", lambda ranks, closing: run.heart)
    monkeypatch.setattr(watch, "Neighbours", lambda ranks: run.near)
    monkeypatch.setattr(watch, "gather_objects", lambda value: [f"node{i}" for i in range(12)])
    monkeypatch.setattr(watch, "remembered_launchers", lambda: SimpleNamespace(gone=lambda: run.launchers_gone))
    monkeypatch.setattr(watch, "first_to_speak", lambda ranks: True)
    monkeypatch.setattr(watch, "os", SimpleNamespace(_exit=run.end))
    waiting = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 100))
    monkeypatch.setattr(watch, "time", waiting)
    monkeypatch.setattr(watch, "BEAT_S", 0.01)
    monkeypatch.setattr(watch, "_MOMENT_S", 0.05)
    monkeypatch.setattr(watch, "_LEAVING_S", 0.4)
    monkeypatch.setattr(watch, "_SILENT_S", 1.0)
    yield run
    run.over.set()
    for made in run.watches:
        made.close()


# A wish to stop


def test_a_signal_is_a_wish_to_stop_from_the_beginning_to_the_end(run: Watched) -> None:
    run.heart.alone = True
    before = signal.getsignal(signal.SIGTERM)
    made = run.watch()
    assert signal.getsignal(signal.SIGTERM) == before
    made.begin()
    assert made.stop_reason is None
    os.kill(os.getpid(), signal.SIGTERM)
    until(lambda: made.stop_reason == "SIGTERM")
    made.close()
    run.watches.clear()
    assert signal.getsignal(signal.SIGTERM) == before
    assert run.codes == []


def test_a_second_signal_ends_the_process_at_once(run: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "SAME_SIGNAL_S", 0.1)
    run.heart.alone = True
    made = run.watch()
    made.begin()
    os.kill(os.getpid(), signal.SIGUSR1)
    until(lambda: made.stop_reason == "SIGUSR1")
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.ended() == 128 + signal.SIGTERM


def test_a_second_signal_that_has_ended_another_rank_already(run: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks get it at about the same time, and none is called lost because of it."""
    monkeypatch.setattr(stopping, "SAME_SIGNAL_S", 0.1)
    monkeypatch.setattr(watch, "_MOMENT_S", 10.0)
    made = run.watch()
    made.begin()
    os.kill(os.getpid(), signal.SIGUSR1)
    until(lambda: made.stop_reason == "SIGUSR1")
    time.sleep(0.2)
    run.near.dead = [2]
    until(lambda: made._lost)
    os.kill(os.getpid(), signal.SIGTERM)
    assert run.ended() == 128 + signal.SIGTERM


def test_the_budget_of_time(run: Watched) -> None:
    run.heart.alone = True
    assert "max_wall_time_s" in str(run.watch(deadline_s=time.monotonic() - 1).stop_reason)
    assert run.watch(deadline_s=time.monotonic() + 1000).stop_reason is None


def test_a_launcher_that_is_gone(run: Watched) -> None:
    made = run.watch()
    assert made.stop_reason is None
    run.launchers_gone = True
    until(lambda: made.stop_reason == "the launcher is gone")


# Ranks that are lost


@pytest.mark.parametrize(("begun", "when"), [(False, "before the first step"), (True, "in step 8")])
def test_a_rank_that_is_silent_is_named_and_the_process_ends(
    run: Watched, capsys: pytest.CaptureFixture[str], begun: bool, when: str
) -> None:
    made = run.watch(timeout_s=0.5)
    if begun:
        made.begin()
        made.step = 7
        made.way_on = lambda: "Start it from step 5."
    run.heart.silent_ranks = [2]
    assert run.ended() == LostRankError.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"\nerror: Rank 2 on node2 did not answer for 0.2 s, {when}: killed, hanging, or cut off")
    way_on = "Start it from step 5." if begun else "Start the run again."  # the run knows of checkpoints, not the watch
    assert said.endswith(f" from the network.\nThe other ranks leave. {way_on}\n")
    assert run.heart.said == [said.removeprefix("\nerror: ").removesuffix("\n")]  # the other ranks learn of it
    assert run.near.left  # and do not take this one for killed


def test_a_killed_rank_of_this_machine_is_named_at_once(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever this rank's own thread does meanwhile: it may be stuck in a call that ends never."""
    made = run.watch(timeout_s=600.0)
    made.begin()
    run.near.dead = [2]
    began_s = time.monotonic()
    assert run.ended() == LostRankError.exit_code
    assert time.monotonic() - began_s < 5.0
    said = capsys.readouterr().err
    assert said.startswith("\nerror: Rank 2 on node2 ended without a message, in step 1: killed (as by the system")
    assert run.near.left


def test_a_rank_that_fails_itself_accuses_nobody(
    run: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As rank 0 that gets a SIGTERM before the first step, which has killed all others."""
    monkeypatch.setattr(watch, "_MOMENT_S", 0.2)
    made = run.watch(0)
    run.near.dead = [1, 2, 3]
    until(lambda: made._lost)
    made.tell_failure(SystemExit(143))
    time.sleep(0.4)
    assert run.codes == [] and capsys.readouterr().err == ""


def test_of_many_lost_ranks_eight_are_named(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    run.watch(0, 12)
    run.heart.silent_ranks = list(range(1, 11))
    run.ended()
    said = capsys.readouterr().err
    assert "Ranks 1 on node1, 2 on node2, " in said and "8 on node8 and 2 more did not answer" in said


@pytest.mark.parametrize("how", ["broken", "no answer"])
def test_a_store_that_is_gone_means_rank_0(run: Watched, capsys: pytest.CaptureFixture[str], how: str) -> None:
    """Nobody can be told then: a rank of this machine speaks."""
    run.watch()
    if how == "broken":
        run.heart.broken = True
    else:
        run.heart.unheard_s = 100.0
    assert run.ended() == LostRankError.exit_code
    assert "Rank 0 on node0 cannot be reached" in capsys.readouterr().err


def test_a_rank_for_which_the_others_wait(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    """It still beats. What counts is how long this rank has waited in the same collective."""
    made = run.watch(timeout_s=0.5)
    made.begin()
    run.heart.entered = {0: meetings.count + 1, 3: meetings.count}
    time.sleep(0.4)  # this rank computes: it waits for nobody
    assert run.codes == []
    with meetings:
        run.ended()
    said = capsys.readouterr().err
    assert "Rank 3 on node3 did not come to the exchange within 0.2 s, in step 1" in said
    assert "\nLast seen: rank 3 on node3 in splits() (my_task.py, line 12).\nThe other ranks leave." in said


def test_a_late_rank_is_not_named_beside_one_that_is_stopped(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine with too much to do, others have not come to the exchange, either. They still answer."""
    made = run.watch(timeout_s=5.0)
    made.begin()
    run.heart.silent_ranks, run.heart.silent_since_s = [3], 1.5
    run.heart.entered = {2: meetings.count, 3: meetings.count}
    with meetings:
        run.ended()
    assert "Rank 3 on node3 did not come to the exchange" in capsys.readouterr().err


def test_a_stopped_process_of_this_machine_is_named_although_another_one_is_behind_it(
    run: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    made = run.watch(timeout_s=5.0)
    made.begin()
    run.near.stopped_ranks = [2]
    run.heart.entered = {2: meetings.count + 1, 3: meetings.count}
    with meetings:
        run.ended()
    said = capsys.readouterr().err
    assert "Rank 2 on node2 did not come to the exchange" in said and "its process is stopped (SIGSTOP" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_before_the_first_step_ranks_may_work_for_long(
    run: Watched, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """One tokenises, the others wait. Rank 0 says so, after the time that a hang takes in training, then less often."""
    run.watch(rank, timeout_s=0.2)
    run.heart.entered = {0: 2, 1: 2, 2: 1, 3: 1}
    with meetings:
        time.sleep(1.1)
    assert run.codes == []
    said = capsys.readouterr().err
    if rank == 1:
        assert said == ""
        return
    assert said.count("note:") in (2, 3)
    assert (
        "the other ranks have been waiting for ranks 2 on node2, 3 on node3 in splits() (my_task.py, line 12)." in said
    )
    assert "They wait for up to 1799.6 s." in said
    run.heart.entered = dict.fromkeys(range(4), 2)  # on one machine, they wait in the cache
    until(lambda: "note" in (text := capsys.readouterr().err) and print(text) is None)
    said = capsys.readouterr().out
    assert (
        "the ranks have been preparing the first step: ranks 0 on node0, 1 on node1 in cached() (cache.py, line 9); "
        in said
    )


def test_ranks_that_come_together_now_and_then_are_not_told_of(
    run: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    run.watch(0, timeout_s=0.3)
    for count in range(20):
        run.heart.entered = {0: count + 1, 1: count}
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_rank_that_hangs_before_the_first_step_is_given_up_at_last(
    run: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "COLLECTIVE_TIMEOUT_S", 0.9)
    run.watch(timeout_s=0.2)
    run.heart.entered = {0: meetings.count + 1, 2: meetings.count}
    with meetings:
        run.ended()
    said = capsys.readouterr().err
    assert "Rank 2 on node2 did not come to the others within 0.5 s, before the first step" in said
    assert "Last seen: rank 2 on node2 in splits() (my_task.py, line 12)." in said


def test_a_rank_for_which_the_others_devices_wait(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    """On a GPU, ranks leave a collective at once, and go on until a launch blocks, one further than the other."""
    made = run.watch(timeout_s=0.5)
    made.begin()
    for _ in range(3):
        with meetings:
            pass
    run.heart.entered = {0: 2, 2: 1, 3: 0}
    run.ended()  # while this rank is in no collective
    said = capsys.readouterr().err
    assert "error: Rank 3 on node3 did not come to the exchange within 0.2 s, in step 1" in said
    assert "\nLast seen: rank 3 on node3 in splits() (my_task.py, line 12).\nThe other ranks leave." in said


@pytest.mark.parametrize("entered", [3, 4], ids=["as far", "further"])
def test_a_slow_step_for_which_nobody_waits_is_no_hang(run: Watched, entered: int) -> None:
    """All ranks have come as far as this one, and compute. Or they wait for this one, who does not accuse itself."""
    made = run.watch(timeout_s=0.5)
    made.begin()
    for _ in range(3):
        with meetings:
            pass
    run.heart.entered = dict.fromkeys((0, 2, 3), entered)
    time.sleep(0.5)
    assert run.codes == []


def test_who_has_heard_rank_0_does_not_wait_for_others_to_hear_it(run: Watched) -> None:
    """In a broadcast only rank 0 sends. A rank may come to it late, while others work on."""
    made = run.watch(timeout_s=0.5)
    made.begin()
    with meetings.from_first():
        pass
    run.heart.entered = {0: 1, 3: 0}
    time.sleep(0.5)
    assert run.codes == []
    with meetings:  # here it is waited for
        run.ended()


def test_a_rank_that_waits_for_rank_0_to_speak(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    made = run.watch(timeout_s=0.5)
    made.begin()
    run.heart.entered = {0: 0, 3: 1}
    with meetings.from_first():
        run.ended()
    assert "error: Rank 0 on node0 did not come to the exchange" in capsys.readouterr().err


def test_short_collectives_add_up_to_no_hang(run: Watched) -> None:
    """What is heard of other ranks is always a little old."""
    made = run.watch(timeout_s=0.5)
    made.begin()
    for count in range(10):
        run.heart.entered = {0: count + 1, 3: count}
        with meetings:
            time.sleep(0.05)
    assert run.codes == []


def test_counts_begin_with_the_run(run: Watched) -> None:
    """Ranks of a pool may have met more or less often before, and nobody waits for one because of that."""
    with meetings:
        pass
    made = run.watch(timeout_s=0.5)
    made.begin()
    run.heart.entered = {0: 0, 3: 0}
    time.sleep(0.5)
    assert run.codes == []


def test_only_one_rank_says_it(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    run.heart.reports = 1  # another one was first
    run.watch()
    run.heart.silent_ranks = [2]
    assert run.ended() == LostRankError.exit_code
    assert capsys.readouterr().err == ""


def test_a_rank_that_comes_late_does_not_say_it_again(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    """On a busy machine, the rank that said it may be gone by then, and with it its claim to report."""
    run.near.told = True
    run.watch()
    run.heart.silent_ranks = [2]
    assert run.ended() == LostRankError.exit_code
    assert capsys.readouterr().err == ""
    assert not run.near.spoke


def test_a_loss_that_another_rank_tells_of(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    run.watch()
    run.heart.lost = "Rank 2 is gone"
    assert run.ended() == LostRankError.exit_code
    assert capsys.readouterr().err == ""


def test_another_ranks_error_ends_this_one_with_its_exit_code(run: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    run.watch()
    run.heart.failed = (2, 4)
    assert run.ended() == 4
    assert capsys.readouterr().err == ""


def test_a_run_that_ends_by_itself_in_time_is_not_ended(run: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOMENT_S", 30.0)
    made = run.watch()
    run.heart.failed = (2, 4)
    time.sleep(0.1)
    made.close()
    run.watches.clear()
    assert run.codes == []


def test_a_process_that_was_stopped_blames_nobody(
    run: Watched, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After SIGSTOP, all others seem to have been silent. If they are gone, they have said why."""
    read, sleeps = watch.SignalPipe.read, [0.3]

    def slow_once(*arguments: Any) -> Any:
        time.sleep(sleeps.pop() if sleeps else 0.0)
        return read(*arguments)

    monkeypatch.setattr(watch.SignalPipe, "read", slow_once)
    monkeypatch.setattr(watch, "_SILENT_S", 0.2)
    run.watch(timeout_s=30.0)
    until(lambda: run.heart.forgiven)
    run.heart.silent_ranks = [2]
    assert run.ended() == LostRankError.exit_code
    assert capsys.readouterr().err == ""


# Why a collective failed


def test_a_failed_collective_is_another_ranks_error(run: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_MOMENT_S", 30.0)
    made = run.watch()
    run.heart.failed = (2, 3)
    error = made.explain(RuntimeError("connection closed by peer"))
    assert error is not None
    assert (error.exit_code, error.speaks, error.agreed) == (3, False, True)  # rank 2 reports it


@pytest.mark.parametrize("known", ["it is silent", "it was killed", "another rank says so"])
def test_a_failed_collective_is_a_lost_rank(run: Watched, monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    monkeypatch.setattr(watch, "_MOMENT_S", 30.0)
    made = run.watch()
    if known == "it is silent":
        run.heart.silent_ranks = [2]
    elif known == "it was killed":
        run.near.dead = [2]
    else:
        monkeypatch.setattr(made, "_look_after_ranks", lambda: None)
        run.heart.lost = "Rank 2 on node2 is gone"
    error = made.explain(RuntimeError("connection closed by peer"))
    assert isinstance(error, LostRankError)
    assert str(error).startswith("Rank 2 on node2 ")
    assert error.speaks


def test_a_failed_collective_with_everyone_there_is_no_explanation(
    run: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_SILENT_S", 0.1)
    assert run.watch().explain(RuntimeError("a slip")) is None
    run.heart.alone = True
    assert run.watch(0, 1).explain(RuntimeError("a slip")) is None


@pytest.mark.parametrize(("error", "code"), [(RanksDifferError("x"), 4), (ZeroDivisionError(), 1)])
def test_this_ranks_own_error_is_told_to_the_others(run: Watched, error: Exception, code: int) -> None:
    run.watch(2).tell_failure(error)
    run.watch(0).tell_failure(error)
    assert run.heart.said == [code, code]
    run.heart.alone = True
    run.watch(0, 1).tell_failure(error)
    assert len(run.heart.said) == 2
