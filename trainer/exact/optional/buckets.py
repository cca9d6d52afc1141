"""The gradient in buckets: a rank finishes its own sum bucket by bucket, while its last backward still runs.

A backward goes through a model from its end to its beginning. So the gradients of the last parameters are complete
first. When those of the last micro-batch are there, the additions above them in the tree are made for this bucket
alone, and the bucket can be sent. Addition is elementwise, so it changes no bit where the gradient is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..gradient_sum import GradientSum
from ..tree import Node


class Bucket(NamedTuple):
    """A part of a node.

    Attributes:
        parameters: the places of the parameters of which it holds the gradients.
        segments: where these lie in a node, in floats: (start, stop) each.
        last: whether it is sent last. What is complete only at the end travels with it.
    """

    parameters: range
    segments: tuple[tuple[int, int], ...]
    last: bool

    @property
    def size(self) -> int:
        """Floats of the bucket."""
        return sum(stop - start for start, stop in self.segments)


def in_buckets(total: GradientSum, floats: int) -> list[Bucket]:
    """Cuts a gradient into buckets of at least `floats` floats, in the order in which they are sent.

    The number of ranks has no effect on where it is cut. The last bucket holds the first parameters, which may be fewer
    floats, and the counts of missing gradients.
    """
    starts, end = total.starts, total.numel
    found: list[Bucket] = []
    stop = len(starts)
    for place in reversed(range(1, len(starts))):
        if end - starts[place] >= floats:
            found.append(Bucket(range(place, stop), ((starts[place], end),), False))
            stop, end = place, starts[place]
    counts = (total.numel, total.numel + len(starts))
    return [*found, Bucket(range(stop), ((0, end), counts), True)]


class Sender(Protocol):
    """Sends buckets, see `early_exchange.EarlyExchange`."""

    sent: int

    @property
    def buckets(self) -> Sequence[Bucket]:
        """In the order of sending."""
        ...

    def send(self, nodes: Sequence[Tensor]) -> None:
        """Sends the next bucket of this rank's nodes, in order."""
        ...


class LastPart:
    """The last additions of a rank in a step, bucket by bucket. Each bucket is sent as soon as it is complete.

    Until `close`, the rank's sum is changed only in buckets that have been sent. So the gradients may be given up and
    computed again.

    Args:
        total: the rank's sum.
        arrivals: the nodes that come last, and the buffers in which they will lie.
        sender: sends buckets.
    """

    def __init__(self, total: GradientSum, arrivals: Sequence[tuple[Node, int]], sender: Sender) -> None:
        self._total, self._sender, self._plan = total, sender, total.growing.copy()
        # Planned on a copy of `growing`: if the pack is given up, the plan is thrown away and nothing has changed.
        self._merges = [merge for node, place in arrivals for merge in self._plan.arrive(node, place)]
        self._bucket_of = [number for number, b in enumerate(sender.buckets) for _ in b.parameters]
        self._bucket_of.reverse()  # buckets go from the last parameter to the first
        self._waiting = [len(bucket.parameters) for bucket in sender.buckets]

    def arrived(self, place: int) -> bool:
        """A parameter's gradients have come. Returns whether a bucket is complete that can be sent now."""
        self._waiting[self._bucket_of[place]] -= 1
        return self._complete()

    def _complete(self) -> bool:
        number = self._sender.sent
        return not self._sender.buckets[number].last and self._waiting[number] == 0

    def send(self) -> None:
        """Sends what is complete. The gradients are in their buffers."""
        # Only in order, on every rank: a bucket that is complete before its turn waits for the ones before it.
        while self._complete():
            ((start, stop),) = self._sender.buckets[self._sender.sent].segments
            self._add(start, stop)
            self._sender.send([self._total.buffer(self._plan.places[node])[0] for node in self._plan.nodes()])

    def close(self) -> None:
        """Adds what has not been sent. All gradients are in their buffers."""
        sent = self._sender.sent
        # Buckets go from the end of a node to its beginning, so what has not been sent lies before the last one sent.
        self._add(0, self._sender.buckets[sent - 1].segments[0][0] if sent else self._total.numel)
        self._add(self._total.numel, self._total.size)
        self._total.growing = self._plan

    def _add(self, start: int, stop: int) -> None:
        buffer = self._total.buffer
        for merge in self._merges:
            buffer(merge.target)[0][start:stop].add_(buffer(merge.source)[0][start:stop])
