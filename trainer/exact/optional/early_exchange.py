"""The exchange in buckets, under the backward: what is complete is sent while the rest is still computed.

The bits are those of `exchange.Exchange`. The nodes of a bucket are copied into memory of their own and sent from
there. Received nodes stay in memory of their own, too, until the step asks for the sum. So this rank can go on adding,
and can even do a part of its work again, while messages are under way.

On the CPU, gloo's own threads move the bytes. On a GPU, collectives and the additions between them run on a stream
beside that of the backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ranks.collectives import begin_all_to_all, begin_gather, wait_for
from ..exchange import Exchange, is_direct
from ..gradient_sum import GradientSum
from ..record import RecordLayout, Records
from ..tree import cover, exchange_program, run_rounds
from .buckets import Bucket, in_buckets


@dataclass
class _Message:
    """A bucket under way.

    Attributes:
        bucket: what is sent.
        number: its place in the order of sending.
        direct: whether whole nodes are exchanged, rather than shards of them; see `exchange.is_direct`.
        gathered: (W, length) what all ranks have sent, in the end.
        rows: the nodes, or this rank's shard of each.
        works: collectives that have begun.
    """

    bucket: Bucket
    number: int
    direct: bool
    gathered: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    works: list[Any] = field(default_factory=list)


class EarlyExchange(Exchange):
    """As `Exchange`, in buckets that may be sent before the rank's sum is complete.

    In a step, call `begin(M)`, then `send` for each bucket that is complete early (there may be none). Then call the
    exchange itself, which sends the rest. Every rank sends the same buckets in the same order, each when it can.

    Attributes:
        buckets: in the order of sending.
        sent: how many of them have been sent in this step.

    Args:
        gradient_sum, layout, leaves, rank, world_size: as for `Exchange`. Collectives run on the gradient's own device.
        bucket_bytes: the smallest size of a bucket.
    """

    def __init__(
        self,
        gradient_sum: GradientSum,
        layout: RecordLayout,
        *,
        leaves: Collection[int],
        rank: int,
        world_size: int,
        bucket_bytes: int,
    ) -> None:
        super().__init__(gradient_sum, layout, leaves=leaves, rank=rank, world_size=world_size)
        self.buckets = in_buckets(gradient_sum, max(1, bucket_bytes // 4))  # a float32 has 4 bytes
        self.sent, self._leaves = 0, 0
        self._under_way: list[_Message] = []
        self._failure: RuntimeError | None = None
        device = gradient_sum.storage.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, leaves: int) -> None:
        """A step of M micro-batches begins."""
        self.sent, self._leaves, self._under_way, self._failure = 0, leaves, [], None

    def send(self, nodes: Sequence[Tensor]) -> None:
        """Sends the next bucket. Does not wait for other ranks.

        Args:
            nodes: this rank's, in order, whole; those of the bucket are complete.
        """
        number, self.sent = self.sent, self.sent + 1
        if self._failure is not None:
            return
        try:
            # Only messages that have arrived: a wait here would hold up the backward.
            for message in self._under_way:
                if message.gathered is None and all(work.is_completed() for work in message.works):
                    self._go_on(message)
            self._under_way.append(self._start(number, nodes))
        except RuntimeError as error:
            # A rank is gone. Raised here, it would look like an error of the backward. So the step raises it.
            self._failure = error

    def __call__(self, leaves: int) -> Records:
        """As `Exchange`."""
        assert leaves == self._leaves
        nodes = self._sum.whole_nodes()
        while self.sent < len(self.buckets):
            self.send(nodes)
        if self._failure is not None:
            raise self._failure
        for message in self._under_way:
            if message.gathered is None:
                self._go_on(message)
        for message in self._under_way:
            wait_for(message.works)
        # The step's own stream must not read what the exchange's stream is still adding.
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for message in self._under_way:
            self._put(message)
        gathered = self._under_way[-1].gathered
        assert gathered is not None
        self._under_way = []
        return Records(self._in_order(gathered[:, : len(self._sum.head)], leaves), self._layout)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """A context: what is launched in it runs beside the backward, after everything that was launched before it."""
        if self._stream is None:
            yield
            return
        # The copies of the nodes were launched on the step's stream. They must be complete before they are sent.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def _start(self, number: int, nodes: Sequence[Tensor]) -> _Message:
        """Begins the first collective of a bucket. On a GPU it begins all of them: they wait for one another there."""
        bucket, W = self.buckets[number], self._world_size
        counts = [len(cover(self._leaves, W, r)) for r in range(W)]
        message = _Message(bucket, number, is_direct(self._leaves, W, bucket.size))
        head = self._sum.head if bucket.last else self._sum.head[:0]
        if message.direct:
            most = max(counts)
            piece = self._memory(f"sent {number}", len(head) + most * bucket.size)
            piece[: len(head)].copy_(head)
            self._fill(piece[len(head) :].view(most, bucket.size), bucket, nodes)
            with self._aside():
                message.gathered, message.works = self._begin_gather(message, piece)
            by_rank = message.gathered[:, len(head) :].view(W, most, bucket.size)
            message.rows = [by_rank[r, k] for r, count in enumerate(counts) for k in range(count)]
            return message
        shard, mine = -(-bucket.size // W), len(nodes)
        # (node, rank, shard) -> (rank, node, shard), as in `Exchange`. A bucket may not divide into W shards. So longer
        # memory is cut, and what lies behind the bucket in it has no meaning.
        whole = self._memory(f"whole {number}", mine * W * shard).view(mine, W * shard)
        self._fill(whole, bucket, nodes)
        sent = self._memory(f"sent {number}", mine * W * shard).view(W, mine, shard)
        sent.copy_(whole.view(mine, W, shard).transpose(0, 1))
        rows = self._memory(f"rows {number}", sum(counts) * shard).view(-1, shard)
        message.rows = list(rows.unbind())
        with self._aside():
            sizes = ([count * shard for count in counts], [mine * shard] * W)
            message.works = begin_all_to_all(rows.view(-1), sent.view(-1), *sizes)
            if self._stream is not None:
                self._add_shards(message)
        return message

    @staticmethod
    def _fill(memory: Tensor, bucket: Bucket, nodes: Sequence[Tensor]) -> None:
        """Copies a bucket of some nodes into the rows of `memory`."""
        for row, node in zip(memory, nodes):
            place = 0
            for start, stop in bucket.segments:
                row[place : place + stop - start].copy_(node[start:stop])
                place += stop - start

    def _go_on(self, message: _Message) -> None:
        """Begins the second collective of a bucket, once the first has ended."""
        wait_for(message.works)
        self._add_shards(message)

    def _add_shards(self, message: _Message) -> None:
        run_rounds(exchange_program(self._leaves, self._world_size), message.rows)
        head = self._sum.head if message.bucket.last else self._sum.head[:0]
        owned = self._memory(f"owned {message.number}", len(head) + len(message.rows[0]))
        owned[: len(head)].copy_(head)
        owned[len(head) :].copy_(message.rows[0])
        message.gathered, message.works = self._begin_gather(message, owned)

    def _begin_gather(self, message: _Message, piece: Tensor) -> tuple[Tensor, list[Any]]:
        """(length,) of each rank -> (W, length), and what is to be waited for."""
        W = self._world_size
        # Several may be under way, so each bucket has a tag. 0 is left to collectives that are not in buckets.
        gathered = self._memory(f"gathered {message.number}", W * piece.numel())
        return gathered.view(W, -1), begin_gather(gathered, piece, tag=1 + message.number)

    def _put(self, message: _Message) -> None:
        """Writes the root of a bucket to where the optimizer reads it."""
        assert message.gathered is not None
        root, rows = self._sum.nodes[0], message.rows
        if not message.direct:
            head = len(self._sum.head) if message.bucket.last else 0
            rows = [message.gathered[:, head:].reshape(-1)]
        rounds = exchange_program(self._leaves, self._world_size) if message.direct else ()
        run_rounds(rounds[:-1], rows)
        place = 0
        for start, stop in message.bucket.segments:
            here = slice(place, place + stop - start)
            if rounds:
                (last,) = rounds[-1]
                torch.add(rows[last.target][here], rows[last.source][here], out=root[start:stop])
            else:
                root[start:stop].copy_(rows[0][here])
            place += stop - start
