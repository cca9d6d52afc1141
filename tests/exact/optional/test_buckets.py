"""The gradient in buckets: every float in one of them, and sums that are finished bucket by bucket."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.exact.test_tree import same_bits
from trainer.exact.gradient_sum import GradientSum
from trainer.exact.optional.buckets import Bucket, LastPart, in_buckets


def made(sizes: Sequence[int], W: int = 1, rank: int = 0, M: int = 8) -> GradientSum:
    return GradientSum([torch.zeros(size) for size in sizes], leaves=[M], rank=rank, world_size=W, head_size=3)


@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=9), floats=st.integers(1, 300), W=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_every_float_is_in_one_bucket_whatever_the_number_of_ranks(sizes: list[int], floats: int, W: int) -> None:
    buckets = in_buckets(made(sizes), floats)
    assert buckets == in_buckets(made(sizes, W), floats)
    total = made(sizes, W)
    assert [place for b in reversed(buckets) for place in b.parameters] == list(range(len(sizes)))
    assert [b.last for b in buckets] == [False] * (len(buckets) - 1) + [True]
    covered = sorted(i for b in buckets for start, stop in b.segments for i in range(start, stop))
    assert covered == list(range(total.numel + len(sizes)))
    assert all(b.size >= floats for b in buckets[:-1])
    for bucket in buckets:
        for place in bucket.parameters:
            start = total.starts[place]
            assert any(a <= start and start + sizes[place] <= b for a, b in bucket.segments)


class Sent:
    """A sender that keeps what it is given."""

    def __init__(self, buckets: list[Bucket]) -> None:
        self.buckets, self.sent, self.found = buckets, 0, []  # type: ignore[var-annotated]

    def send(self, nodes: Sequence[Tensor]) -> None:
        self.found.append([torch.cat([n[a:b] for a, b in self.buckets[self.sent].segments]) for n in nodes])
        self.sent += 1


def test_buckets_are_sent_in_order_and_when_they_are_complete() -> None:
    """The middle one is complete first, and waits for the one of the last parameters."""
    total = made([16, 16, 16, 16], M=3)
    total.start(3)
    leaves = [[torch.full((16,), float(10 * j + i)) for i in range(4)] for j in range(3)]
    total.add(0, leaves[0])
    total.add(1, leaves[1])
    place = total.growing.free(1)[0]
    sender = Sent(in_buckets(total, 16))
    last = LastPart(total, [((0, 2), place)], sender)
    _, views, missing = total.buffer(place)
    missing.zero_()
    happened = []
    for i in (2, 3, 0, 1):
        views[i].copy_(leaves[2][i])
        complete = last.arrived(i)
        if complete:
            last.send()
        happened.append((complete, sender.sent))
    assert happened == [(False, 0), (True, 2), (False, 2), (True, 3)]
    assert len(total.growing.places) == 1  # not changed yet: what computes may be given up
    before = total.growing
    last.close()
    assert total.growing is not before
    total.note_added(1)
    (node,) = total.whole_nodes()
    for number, bucket in enumerate(sender.buckets[:-1]):
        ((start, stop),) = bucket.segments
        assert same_bits(sender.found[number][0], node[start:stop])
    for i in range(4):
        assert node[16 * i] == (leaves[0][i] + leaves[1][i] + leaves[2][i])[0]
