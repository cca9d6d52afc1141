"""Predicted times against numbers worked out by hand."""

from __future__ import annotations

import pytest

from trainer.study.prediction import Measured, exchange, search_times, speed_up, step_time_s

# 8 micro-batches of 10 ms, 2 ms once a step, 1 ms latency, 1 GB/s, 100,000 floats.
M = Measured(0.010, 0.002, 0.001, 1e9, micro_batches=8, floats=100_000)


def test_exchange() -> None:
    assert exchange(8, 1, 1000) == (0, 0)
    # Two ranks, each with one node of the tree: its 1,000 floats, and 4 records of 2.
    assert exchange(8, 2, 1000) == (1, (1000 + 8) * 4)
    # Three ranks: blocks of 3, 3 and 2 leaves are 2, 2 and 1 nodes: a rank receives two others' of 2.
    assert exchange(8, 3, 1000) == (1, 2 * (2 * 1000 + 3 * 2) * 4)
    # Beyond the limit, in shards: 4 ranks of one node each; 3 others' quarter, then 3 quarters of the sum.
    assert exchange(8, 4, 10**7) == (2, (3 * 2_500_000 + 3 * (2_500_000 + 4)) * 4)


def test_step_times() -> None:
    assert step_time_s(M, 1) == pytest.approx(0.082)
    # 4 micro-batches, once, one message, 400,032 bytes... of 100,000 floats and 4 records of 2
    assert step_time_s(M, 2) == pytest.approx(0.040 + 0.002 + 0.001 + (100_000 + 8) * 4 / 1e9)
    # The busiest of 3 ranks has 3 micro-batches.
    assert step_time_s(M, 3) == pytest.approx(0.030 + 0.002 + 2 * 0.001 + 2 * (200_000 + 6) * 4 / 1e9)
    assert speed_up(M, 1) == 1.0
    assert 1.5 < speed_up(M, 2) < 2.0


def test_more_ranks_than_it_is_worth() -> None:
    slow = Measured(0.0001, 0.002, 0.005, 1e9, micro_batches=8, floats=100_000)
    assert speed_up(slow, 8) < 1.0


def test_search_times() -> None:
    """Trials of 60 s; 4 devices; strong scaling gives 1.8 on two of them and 3 on four."""
    speed_ups = {1: 1.0, 2: 1.8, 4: 3.0, 3: 2.5}
    one = search_times(60.0, speed_ups, 4, 1)
    assert (one.strong, one.at_once, one.mixed, one.group) == (20.0, 60.0, 20.0, 4)
    # Two: one after the other 40 s, at once 60, two pairs 33.3.
    two = search_times(60.0, speed_ups, 4, 2)
    assert (two.strong, two.at_once) == (40.0, 60.0)
    assert (two.mixed, two.group) == (pytest.approx(60 / 1.8), 2)
    many = search_times(60.0, speed_ups, 4, 100)
    assert (many.strong, many.at_once, many.mixed, many.group) == (2000.0, 1500.0, 1500.0, 1)
