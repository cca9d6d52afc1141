"""The heartbeat: who is silent, who is behind, and what ranks say, against a store in this process."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from trainer.ranks import heartbeat
from trainer.ranks.heartbeat import Heartbeat, _within
from trainer.ranks.place import Ranks


class Store:
    """What a TCPStore does, in a dictionary; `gone` raises."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False

    def _here(self) -> None:
        if self.gone:
            raise ConnectionError

    def set(self, name: str, value: str) -> None:
        self._here()
        self.values[name] = value.encode()

    def get(self, name: str) -> bytes:
        self._here()
        return self.values[name]

    def check(self, names: list[str]) -> bool:
        self._here()
        return all(name in self.values for name in names)

    def multi_get(self, names: list[str]) -> list[bytes]:
        self._here()
        return [self.values.get(name, b'[0, 0, ""]') for name in names]

    def compare_set(self, name: str, expected: str, value: str) -> None:
        self._here()
        self.values.setdefault(name, value.encode())

    def add(self, name: str, amount: int) -> int:
        self._here()
        total = int(self.values.get(name, b"0")) + amount
        self.values[name] = str(total).encode()
        return total


@pytest.fixture
def beating(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(store, rank 1 of 3, which listens every few milliseconds)."""
    store, closing = Store(), threading.Event()
    monkeypatch.setattr(heartbeat, "side_store", lambda timeout_s: store)
    monkeypatch.setattr(heartbeat, "gather_objects", lambda value: [value])
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    yield store, Heartbeat(Ranks(1, 3, 1, 3), closing)
    closing.set()


def beat(store: Store, rank: int, count: int, meetings: int) -> None:
    store.set(f"beat/{rank}", json.dumps([count, meetings, f"in {rank}"]))


def until(condition: Any) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_alone_there_is_nobody_to_hear() -> None:
    assert Heartbeat(Ranks(0, 1, 0, 1), threading.Event()).alone


def test_a_rank_that_falls_silent(beating: Any) -> None:
    store, heart = beating
    beat(store, 0, 1, 0)
    beat(store, 2, 1, 0)
    until(lambda: len(heart._heard) == 3)

    def only_rank_2_is_silent() -> bool:
        beat(store, 0, time.monotonic_ns(), 0)
        return heart.silent(0.3) == [2]

    until(only_rank_2_is_silent)
    heart.forgive(time.monotonic())
    assert heart.silent(0.3) == []


def test_the_ranks_that_the_others_wait_for(beating: Any) -> None:
    store, heart = beating
    beat(store, 0, 1, 7)
    beat(store, 2, 1, 6)
    until(lambda: heart.counts().get(2) == 6)
    assert heart.counts()[0] == 7
    assert heart.where(2) == "in 2"
    until(lambda: __file__ in heart.where(1))  # this rank: here


def test_a_rank_that_comes_from_collective_to_collective_is_not_looked_for(
    beating: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading another thread's stack has crashed Python."""
    _, heart = beating

    class Counting:
        """Another number each time."""

        @property
        def count(self) -> int:
            return time.monotonic_ns()

    monkeypatch.setattr(heartbeat, "meetings", Counting())
    until(lambda: len(heart._heard) == 3 and heart.where(1) == "")
    looked: list[int] = []
    monkeypatch.setattr(heartbeat, "whereabouts", lambda: looked.append(1) or "here")
    beats = heart._count
    until(lambda: heart._count > beats + 5)
    assert not looked


def test_what_another_rank_says(beating: Any) -> None:
    store, heart = beating
    assert heart.failed is None and heart.lost is None
    store.set("failed", json.dumps([1, 2]))  # this rank itself
    until(lambda: "failed" in heart._said)
    assert heart.failed is None
    store.set("failed", json.dumps([2, 4]))
    until(lambda: heart.failed == (2, 4))
    heart.say_lost("rank 0 is gone")
    heart.say_lost("another sentence")  # the first counts
    until(lambda: heart.lost == "rank 0 is gone")
    assert heart.first_to_report() and not heart.first_to_report()


def test_a_store_that_is_gone(beating: Any) -> None:
    store, heart = beating
    store.gone = True
    until(lambda: heart.broken)
    heart.say_failed(1)  # nobody hears it, and nothing is raised
    with pytest.raises(ConnectionError):
        heart.say_lost("rank 0 is gone")


def test_an_answer_that_does_not_come_in_time() -> None:
    assert _within(5.0, lambda: 3) == 3
    with pytest.raises(TimeoutError):
        _within(0.05, lambda: time.sleep(1.0))
    with pytest.raises(ZeroDivisionError):
        _within(5.0, lambda: 1 // 0)
