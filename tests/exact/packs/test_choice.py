"""Which size of packs is taken."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.packs import choice as by_the_clock
from trainer.exact.packs.choice import Choice

CPU = torch.device("cpu")


def test_the_fastest_size_is_chosen_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(by_the_clock.time, "perf_counter", lambda: now[0])
    seconds = {1: 8.0, 2: 5.0, 4: 3.0, 8: 2.5, 16: 4.0}
    choice, asked = Choice(CPU), []
    for _ in range(30):
        size = choice.begin(16, 128, None, set())
        asked.append(size)
        now[0] += seconds[size]
        choice.end(tried=False)
    assert asked[:12] == [1] * 3 + [16] * 3 + [8] * 3 + [4] * 3, "from the largest down, as long as it gets faster"
    assert asked[12:18] == [8, 4] * 3, "the two fastest once more"
    assert set(asked[18:]) == {8}
    assert choice.begin(16, 128, 2, set()) == 2, "memory allows no more"


def test_a_step_without_micro_batches_is_not_measured() -> None:
    choice = Choice(CPU)
    assert choice.begin(0, 0.0, None, set()) == 1
    choice.end(tried=False)
    for _ in range(Choice.STEPS):
        assert choice.begin(4, 32, None, set()) == 1
        choice.end(tried=False)
    assert choice.begin(4, 32, None, set()) == 4, "only the first was not measured"


def test_refused_sizes_are_left_out_of_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(by_the_clock.time, "perf_counter", lambda: now[0])
    choice, asked = Choice(CPU), []
    for _ in range(13):
        asked.append(choice.begin(8, 64, None, {2, 4}))
        now[0] += 8.0 / asked[-1]
        choice.end(tried=False)
    assert set(asked) == {1, 8}
    assert choice.best == 8
