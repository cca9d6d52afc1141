"""Predicts times on more ranks than there are: pure arithmetic on measured times.

A step on W ranks takes the sum of three times:

- the micro-batches of the rank that has most of them;
- what every rank does once: the optimizer and the rest;
- the exchange: the latency of its messages, which grows with log2 W, and the bytes that a rank receives over the
  bandwidth.

The numbers of messages and bytes follow from the plan and the summation tree. The model leaves out two things: ranks
that wait for one another, and cores or links that they share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..exact.exchange import is_direct
from ..exact.tree import cover


@dataclass(frozen=True)
class Measured:
    """One rank's step, in seconds.

    Attributes:
        micro_batch_s: one micro-batch: load, forward, backward, addition.
        once_s: what a step takes besides its micro-batches.
        latency_s: of a message between two ranks.
        bytes_per_s: that a rank receives.
        micro_batches: M, of a global batch.
        floats: of the gradient.
        record_floats: what each micro-batch carries besides its gradient.
    """

    micro_batch_s: float
    once_s: float
    latency_s: float
    bytes_per_s: float
    micro_batches: int
    floats: int
    record_floats: int = 2


def exchange(M: int, W: int, floats: int, record_floats: int = 2) -> tuple[int, int]:
    """(collectives, bytes that the busiest rank receives) of the exact sum of M micro-batches over W ranks.

    As in `exact.exchange`: in one collective, or in two, where each rank first adds a shard of the gradient.
    """
    if W == 1:
        return 0, 0
    counts = [len(cover(M, W, rank)) for rank in range(W)]
    most, records = max(counts), -(-M // W) * record_floats
    # An all-gather moves equal pieces, so each one counts as the longest. A float has 4 bytes.
    if is_direct(M, W, floats):
        return 1, (W - 1) * (most * floats + records) * 4
    shard = -(-floats // W)
    others = sum(counts) - min(counts)
    return 2, (others * shard + (W - 1) * (shard + records)) * 4


def step_time_s(m: Measured, W: int) -> float:
    """Predicted seconds of a step on W ranks of their own. Exact by construction at W = 1."""
    collectives, received = exchange(m.micro_batches, W, m.floats, m.record_floats)
    own = -(-m.micro_batches // W)  # of the ranks that have most
    messages = collectives * math.ceil(math.log2(W)) if W > 1 else 0
    return own * m.micro_batch_s + m.once_s + messages * m.latency_s + received / m.bytes_per_s


def speed_up(m: Measured, W: int) -> float:
    """Predicted time of a step on one rank over that on W."""
    return step_time_s(m, 1) / step_time_s(m, W)


@dataclass(frozen=True)
class SearchTimes:
    """Seconds until a number of trials of equal length have ended, on the same W devices.

    Attributes:
        strong: one after the other, each on all W devices.
        at_once: W at a time, each on one device.
        mixed: the best of groups of `group` devices, W / group trials at a time.
    """

    trials: int
    strong: float
    at_once: float
    mixed: float
    group: int


def search_times(trial_s: float, speed_ups: dict[int, float], W: int, trials: int) -> SearchTimes:
    """How long a search of `trials` runs takes on W devices.

    It assumes trials that do not need one another's results. This favours W trials at once, because a search that
    learns from each trial gains from having them one after the other.

    Args:
        trial_s: one run on one device.
        speed_ups: number of ranks -> speed-up of a run: for 1, W, and the divisors of W that are possible.
        W: devices.
        trials: how many.
    """
    times = {k: math.ceil(trials / (W // k)) * trial_s / s for k, s in speed_ups.items() if W % k == 0}
    group = min(times, key=lambda k: (times[k], k))  # of equally fast groups the smallest
    return SearchTimes(trials, times[W], times[1], times[group], group)
