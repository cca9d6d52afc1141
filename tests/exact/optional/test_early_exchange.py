"""The exchange in buckets: the bits of the exchange in one piece, whenever a bucket is sent."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.exact.test_exchange import ThreadedCollectives, check_step, record_of
from tests.exact.test_tree import SHAPES, random_gradients
from trainer.exact import exchange
from trainer.exact.exchange import most_local
from trainer.exact.gradient_sum import GradientSum
from trainer.exact.optional import early_exchange
from trainer.exact.optional.early_exchange import EarlyExchange
from trainer.exact.packs.pack_sum import PackSum
from trainer.exact.record import OwnRecords, RecordLayout


class Rank:
    """A rank's sum and its exchange, as `exact.step.ExactStep` puts them together."""

    def __init__(self, W: int, rank: int, leaves: set[int], bucket_bytes: int) -> None:
        layout, most = RecordLayout(3), most_local(leaves, W)
        place: dict[str, Any] = {"leaves": leaves, "rank": rank, "world_size": W}
        self.sum = GradientSum([torch.zeros(shape) for shape in SHAPES], head_size=most * layout.size, **place)
        self.own = OwnRecords(self.sum.head[: most * layout.size].view(most, layout.size), layout)
        self.exchange = EarlyExchange(self.sum, layout, bucket_bytes=bucket_bytes, **place)
        self.draw = random.Random(rank)

    def step(self, gradients: Sequence[Sequence[torch.Tensor]], gives_up: bool = False) -> Any:
        M = len(gradients)
        block = self.sum.start(M)
        self.exchange.begin(M)
        for j in block:
            loss, statistics = record_of(j)
            self.own.statistics(j - block.start).copy_(statistics)
            self.own.add(j - block.start, loss, None)
        todo = list(block)
        size = self.draw.randint(1, max(1, len(block)))  # of the last part; what is before it comes one by one
        while len(todo) > size:
            self.sum.add(todo[0], gradients[todo.pop(0)])
        if gives_up and todo:  # after a part of its gradients, as when memory runs out
            self._add(todo, gradients, complete=False)
            while len(todo) > 1:
                self.sum.add(todo[0], gradients[todo.pop(0)])
        if todo:
            self._add(todo, gradients)
        records = self.exchange(M)
        rows = torch.cat([records.losses[:, None], records.statistics], dim=1)
        return [view.clone() for view in self.sum.gradient_views], self.sum.gradient.clone(), rows

    def _add(self, part: list[int], gradients: Sequence[Sequence[torch.Tensor]], complete: bool = True) -> None:
        added = PackSum(self.sum, len(gradients), part, False, None, self.exchange)
        places = list(reversed(range(len(SHAPES))))
        if self.draw.random() < 0.3:
            self.draw.shuffle(places)
        for place in places if complete else places[: self.draw.randint(1, len(SHAPES) - 1)]:
            added.take(place, torch.stack([gradients[j][place] for j in part]), None)
        if complete:
            added.close()


class Done:
    """A collective that has ended, whether or not it was asked."""

    def __init__(self) -> None:
        self._asked = random.random() < 0.5

    def is_completed(self) -> bool:
        return self._asked

    def wait(self) -> None:
        pass


class LateCollectives(ThreadedCollectives):
    """Collectives that ranks begin when they can: each is numbered, and made when the first rank waits for it.

    Here they meet at once, which is the strictest order: every rank has to begin the same ones in the same order.
    """

    def begin_gather(self, out: torch.Tensor, piece: torch.Tensor, tag: int = 0) -> list[Any]:
        self.all_gather_flat(out, piece)
        return [Done()]

    def begin_all_to_all(self, out: torch.Tensor, sent: torch.Tensor, *sizes: list[int]) -> list[Any]:
        self.all_to_all_single(out, sent, *sizes)
        return []


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["by shards", "directly"])
@pytest.mark.parametrize("W", [2, 3, 5, 8])
@pytest.mark.parametrize("bucket_bytes", [4, 100, 1 << 20])
def test_all_ranks_get_the_bits_of_one(monkeypatch: pytest.MonkeyPatch, W: int, limit: int, bucket_bytes: int) -> None:
    """Several steps on the same buffers, with ranks that have no micro-batch, or give a pack up half-way."""
    collectives = LateCollectives(W)
    monkeypatch.setattr(exchange, "DIRECT_LIMIT_BYTES", limit)
    monkeypatch.setattr(early_exchange, "begin_gather", collectives.begin_gather)
    monkeypatch.setattr(early_exchange, "begin_all_to_all", collectives.begin_all_to_all)
    monkeypatch.setattr(EarlyExchange, "send", in_order(EarlyExchange.send))
    counts = [16, 16, W, W + 1, 13, 1, 2, 16]
    steps = [random_gradients(M, seed) for seed, M in enumerate(counts)]

    def rank_main(number: int) -> list[Any]:
        rank = Rank(W, number, set(counts), bucket_bytes)
        assert (len(rank.exchange.buckets) == 1) == (bucket_bytes == 1 << 20)
        return [rank.step(gradients, gives_up=step in (1, 4)) for step, gradients in enumerate(steps)]

    for results in collectives.run(rank_main):
        for result, gradients in zip(results, steps):
            check_step(result, gradients)
    assert ("all_to_all" in collectives.calls) == (limit == 0 and W > 2)


def in_order(send: Any) -> Any:
    """Both collectives of a bucket before those of the next: these threads know no others."""

    def sent(self: EarlyExchange, nodes: Any) -> None:
        send(self, nodes)
        if self._failure is not None:
            raise self._failure
        if self._under_way[-1].gathered is None:
            self._go_on(self._under_way[-1])

    return sent


def test_a_rank_that_is_gone_is_noticed_by_the_step_and_not_by_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def gone(*_: Any, **__: Any) -> Any:
        begun.append(1)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(early_exchange, "begin_gather", gone)
    rank = Rank(2, 0, {2}, 4)
    gradients = random_gradients(2, 0)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        rank.step(gradients)
    assert len(begun) == 1  # nothing more is sent
    assert rank.sum.left == 0  # the backward was not disturbed


def test_a_bucket_has_at_least_so_many_bytes() -> None:
    """Parameters of 64 bytes, in buckets of 132: two would be too few, so each bucket has three."""
    total = GradientSum([torch.zeros(16)] * 7, leaves={2}, rank=0, world_size=2, head_size=4)
    exchange = EarlyExchange(total, RecordLayout(1), leaves={2}, rank=0, world_size=2, bucket_bytes=132)
    assert [len(bucket.parameters) for bucket in exchange.buckets] == [3, 3, 1]


def test_on_a_gpu_the_step_waits_for_the_stream_of_the_exchange_before_it_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the optimizer might read a gradient before it has been added."""
    happened: list[str] = []

    class Stream:
        device = torch.device("cpu")

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            happened.append(f"{self.name} waits for {other.name}")

    def begin_gather(out: torch.Tensor, piece: torch.Tensor, tag: int = 0) -> list[Any]:
        happened.append("sent")
        out.view(2, -1).copy_(piece.expand(2, -1))
        return []

    def put(self: EarlyExchange, message: Any) -> None:
        happened.append("read")

    step_stream = Stream("step")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(early_exchange, "begin_gather", begin_gather)
    monkeypatch.setattr(EarlyExchange, "_put", put)
    rank = Rank(2, 0, {2}, 1 << 20)
    rank.exchange._stream = Stream("exchange")  # type: ignore[assignment]
    rank.step(random_gradients(2, 0))
    assert happened == ["exchange waits for step", "sent", "step waits for exchange", "read"]
