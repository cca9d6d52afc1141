"""A clock that only moves when told to."""

from __future__ import annotations

import pytest


class FakeClock:
    """Seconds that pass only in `sleep`. It starts where a real one does: far from 0."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
