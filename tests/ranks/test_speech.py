"""One message for a person, whichever ranks have found the error, and a process that stays until it is read."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from trainer.errors import LostRankError, RanksDifferError, Stopped, TrainerError, UserError
from trainer.ranks import speech
from trainer.ranks.place import Ranks
from trainer.ranks.speech import first_to_speak, report

ALONE = Ranks(0, 1, 0, 1)


def rank(number: int) -> Ranks:
    return Ranks(number, 4, number, 4)


@pytest.fixture(autouse=True)
def _a_launch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MASTER_PORT", uuid.uuid4().hex)
    monkeypatch.setattr(speech, "_claim", None)
    yield
    if speech._claim is not None:
        speech._claim.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds for which a process waits, instead of the waiting."""
    waits: list[float] = []
    monkeypatch.setattr(speech.time, "sleep", waits.append)
    return waits


# Who speaks first. A claim belongs to a process, so this process can play all ranks of a launch.


def test_the_first_rank_of_a_machine_speaks_whichever_it_is() -> None:
    assert first_to_speak(rank(2))
    assert not first_to_speak(rank(0)) and not first_to_speak(rank(3))


def test_the_claim_ends_with_the_process() -> None:
    assert first_to_speak(rank(2))
    assert speech._claim is not None
    speech._claim.close()  # as the end of the process does
    assert first_to_speak(rank(1))


def test_two_launches_do_not_silence_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_speak(rank(0))
    kept = speech._claim
    monkeypatch.setenv("MASTER_PORT", uuid.uuid4().hex)
    assert first_to_speak(rank(0))
    assert kept is not None
    kept.close()


def test_one_rank_alone_always_speaks() -> None:
    assert first_to_speak(ALONE) and first_to_speak(ALONE)


# What is printed


def test_an_error_that_every_rank_finds_is_printed_once(capsys: pytest.CaptureFixture[str], waits: list[float]) -> None:
    for number in (2, 0, 1, 3):
        report(UserError("no such file"), rank(number))
    assert capsys.readouterr().err == "\nerror: no such file\n"


def test_an_error_that_was_agreed_on_is_printed_by_rank_0(
    capsys: pytest.CaptureFixture[str], waits: list[float]
) -> None:
    for number in (2, 1, 3):
        report(RanksDifferError("rank 1 differs", agreed=True), rank(number))
    assert capsys.readouterr().err == ""
    assert waits and min(waits) > 0  # a launcher would end rank 0 before it has spoken
    waits.clear()
    report(RanksDifferError("rank 1 differs", agreed=True), rank(0))
    assert capsys.readouterr().err == "\nerror: rank 1 differs\n"
    assert waits == []


def test_the_rank_that_speaks_outlives_the_others(waits: list[float]) -> None:
    """A launcher ends all ranks as soon as one has ended: the others shall come to the same end first."""
    report(UserError("no such file"), rank(1))
    report(UserError("no such file"), rank(2))
    assert len(waits) == 1 and waits[0] > 0


def test_who_speaks_may_be_settled_already(capsys: pytest.CaptureFixture[str], waits: list[float]) -> None:
    for number, speaks in ((0, False), (3, True)):
        error = TrainerError("rank 3 ran out of memory")
        error.speaks = speaks
        report(error, rank(number))
        assert capsys.readouterr().err == ("\nerror: rank 3 ran out of memory\n" if speaks else "")


def test_a_loss_keeps_the_speaker_and_the_store_longest(waits: list[float]) -> None:
    """Rank 0 holds the store at which the others learn of it."""
    for number, speaks in ((3, True), (0, False), (2, False)):
        error = LostRankError("rank 1 is gone")
        error.speaks = speaks
        report(error, rank(number))
    assert len(waits) == 2
    assert waits[0] == waits[1] > 3.0


def test_a_stop_is_no_error(capsys: pytest.CaptureFixture[str], waits: list[float]) -> None:
    report(Stopped("stopped after step 7", agreed=True), rank(0))
    assert capsys.readouterr().err == "\nstopped after step 7\n"


def test_one_rank_alone_waits_for_nobody(capsys: pytest.CaptureFixture[str], waits: list[float]) -> None:
    report(UserError("no such file"), ALONE)
    assert capsys.readouterr().err == "\nerror: no such file\n"
    assert waits == []
