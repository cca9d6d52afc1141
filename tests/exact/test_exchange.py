"""The exchange between ranks: the bits of the tree's definition, and everybody's records in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.exact.test_tree import SHAPES, random_gradients, reference_sum, same_bits
from trainer.exact import exchange
from trainer.exact.exchange import Exchange, is_direct, most_local
from trainer.exact.gradient_sum import ALIGNMENT, GradientSum
from trainer.exact.record import OwnRecords, RecordLayout, Records

# One rank


class WholeSum:
    """A rank's sum, its records and the exchange, put together as `exact.step.ExactStep` does."""

    def __init__(
        self,
        shapes_of: Sequence[Tensor],
        *,
        leaves: Sequence[int] | set[int],
        statistics_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        layout, most = RecordLayout(statistics_size), most_local(leaves, world_size)
        place: dict[str, Any] = {"leaves": leaves, "rank": rank, "world_size": world_size}
        self.sum = GradientSum(shapes_of, head_size=most * layout.size, **place)
        self.own = OwnRecords(self.sum.head[: most * layout.size].view(most, layout.size), layout)
        self._exchange, self._leaves = Exchange(self.sum, layout, **place), 0

    def start(self, leaves: int) -> range:
        self._leaves, self._block = leaves, self.sum.start(leaves)
        return self._block

    def add(self, j: int, gradients: Sequence[Tensor | None], loss: Tensor, statistics: Tensor) -> None:
        self.sum.add(j, gradients)
        self.own.statistics(j - self._block.start).copy_(statistics)
        self.own.add(j - self._block.start, loss, None)

    def reduce(self) -> Records:
        return self._exchange(self._leaves)


def make_tree(W: int, rank: int, leaves: Sequence[int] | set[int], shapes: Sequence[Any] = SHAPES) -> WholeSum:
    parameters = [torch.zeros(shape) for shape in shapes]
    return WholeSum(parameters, leaves=leaves, statistics_size=3, rank=rank, world_size=W)


def record_of(j: int) -> tuple[Tensor, Tensor]:
    """Micro-batch j's loss and statistics, recognisable."""
    return torch.tensor(100.0 + j), torch.tensor([j, -j, j / 2.0])


def one_step(tree: WholeSum, gradients: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Tensor, Tensor]:
    """(gradient by parameter, flat gradient, records) after a step, as copies."""
    for j in tree.start(len(gradients)):
        loss, statistics = record_of(j)
        tree.add(j, gradients[j], loss, statistics)
    records = tree.reduce()
    rows = torch.cat([records.losses[:, None], records.statistics], dim=1)
    return [view.clone() for view in tree.sum.gradient_views], tree.sum.gradient.clone(), rows


def check_step(
    result: tuple[list[Tensor], Tensor, Tensor], gradients: Sequence[Sequence[Tensor]], shapes: Any = SHAPES
) -> None:
    views, flat, records = result
    for i, view in enumerate(views):
        assert view.shape == gradients[0][i].shape
        assert same_bits(view, reference_sum([leaf[i] for leaf in gradients]))
    # Every parameter starts where a fresh allocation would; the padding stays 0, or a norm would see it.
    padded = []
    for leaf in views:
        padded += [leaf.flatten(), torch.zeros(-leaf.numel() % ALIGNMENT)]
    wanted = torch.cat(padded)
    assert same_bits(flat[: len(wanted)], wanted)
    assert not flat[len(wanted) :].any()
    expected = [torch.cat([loss.view(1), statistics]) for loss, statistics in map(record_of, range(len(gradients)))]
    assert torch.equal(records, torch.stack(expected))


@given(counts=st.lists(st.integers(1, 70), min_size=1, max_size=4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_one_rank(counts: list[int], seed: int) -> None:
    """Steps of several sizes on the same buffers, as an epoch with a smaller last batch has them."""
    tree = make_tree(1, 0, set(counts))
    for step, M in enumerate(counts):
        assert tree.start(M) == range(M)
        gradients = random_gradients(M, seed + step)
        check_step(one_step(tree, gradients), gradients)


def test_the_gradient_lives_in_one_place() -> None:
    """The engine is given the views once; every step writes to the same memory."""
    tree = make_tree(1, 0, [3, 5])
    views, flat = tree.sum.gradient_views, tree.sum.gradient
    for M in (5, 3):
        gradients = random_gradients(M, M)
        one_step(tree, gradients)
        assert all(same_bits(v, reference_sum([leaf[i] for leaf in gradients])) for i, v in enumerate(views))
        assert flat.data_ptr() == tree.sum.gradient.data_ptr()
        assert all(v.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for v in views)


def test_reduce_needs_the_whole_block() -> None:
    tree = make_tree(1, 0, [3])
    tree.start(3)
    tree.add(0, random_gradients(1, 0)[0], torch.zeros(()), torch.zeros(3))
    with pytest.raises(AssertionError):
        tree.reduce()


# The exchange between ranks, each a thread; tests/distributed has it over gloo


class ThreadedCollectives:
    """The two collectives of exchange.py between threads of this process: they only move bytes."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.sent: list[Any] = [None] * world_size
        self.calls: list[str] = []
        self.own = threading.local()

    def exchange(self, name: str, value: Any) -> list[Any]:
        self.sent[self.own.rank] = value
        if self.own.rank == 0:
            self.calls.append(name)
        self.barrier.wait()
        everyone = list(self.sent)
        self.barrier.wait()
        return everyone

    def all_gather_flat(self, out: Tensor, piece: Tensor) -> None:
        out.copy_(torch.cat(self.exchange("all_gather", piece.clone())))

    def all_to_all_single(self, out: Tensor, sent: Tensor, out_sizes: list[int], in_sizes: list[int]) -> None:
        assert (sum(out_sizes), sum(in_sizes)) == (out.numel(), sent.numel())
        pieces = [rows[self.own.rank] for rows in self.exchange("all_to_all", sent.clone().split(in_sizes))]
        assert [len(piece) for piece in pieces] == out_sizes
        out.copy_(torch.cat(pieces))

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """`function(rank)` on every rank; results by rank."""
        results: dict[int, Any] = {}
        errors: list[BaseException] = []

        def main(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = function(rank)
            except BaseException as error:
                self.barrier.abort()
                errors.append(error)

        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(self.barrier.parties)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [results[rank] for rank in range(len(threads))]


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["by shards", "directly"])
@pytest.mark.parametrize("W", [2, 3, 4, 5, 8])
def test_all_ranks_get_the_bits_of_one(monkeypatch: pytest.MonkeyPatch, W: int, limit: int) -> None:
    """Several steps on the same buffers: full batches, uneven ones, and a tail smaller than the world."""
    collectives = ThreadedCollectives(W)
    monkeypatch.setattr(exchange, "DIRECT_LIMIT_BYTES", limit)
    monkeypatch.setattr(exchange, "all_gather_flat", collectives.all_gather_flat)
    monkeypatch.setattr(exchange.dist, "all_to_all_single", collectives.all_to_all_single)
    counts = [16, 16, W, W + 1, 13, 1, 2, 16]
    steps = [random_gradients(M, seed) for seed, M in enumerate(counts)]

    def rank_main(rank: int) -> list[Any]:
        tree = make_tree(W, rank, set(counts))
        return [one_step(tree, gradients) for gradients in steps]

    for results in collectives.run(rank_main):
        for result, gradients in zip(results, steps):
            check_step(result, gradients)
    # Two ranks always exchange directly; else the limit decides.
    assert ("all_to_all" in collectives.calls) == (limit == 0 and W > 2)


def test_which_exchange_follows_from_the_bytes_received() -> None:
    limit = exchange.DIRECT_LIMIT_BYTES // 4  # floats
    assert is_direct(4, 4, limit // 4) and not is_direct(4, 4, limit // 4 + 1)
    assert is_direct(4, 2, 100 * limit)  # two ranks: the same volume, in one collective
    assert not is_direct(11, 3, limit // 3)  # a rank with three nodes sends three times as much
    assert not is_direct(11, 3, limit // 7) and is_direct(11, 3, limit // 9)  # the rank with the most nodes counts


def test_messages_lie_where_collectives_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo does not carry tensors of a GPU, so there they go over the CPU; here the other device is "meta"."""

    class Sent(Exception):
        pass

    def gather(out: Tensor, piece: Tensor) -> None:
        raise Sent(out.device.type, piece.device.type)

    monkeypatch.setattr(exchange, "all_gather_flat", gather)
    layout = RecordLayout(0)
    for staging, wanted in ((None, "cpu"), (torch.device("meta"), "meta")):
        total = GradientSum([torch.zeros(3)], leaves=[2], rank=0, world_size=2, head_size=layout.size)
        ranks = Exchange(total, layout, leaves=[2], rank=0, world_size=2, staging=staging)
        for j in total.start(2):
            total.add(j, [torch.ones(3)])
        with pytest.raises(Sent) as sent:
            ranks(2)
        assert sent.value.args == (wanted, wanted)


def test_the_most_micro_batches_of_a_rank() -> None:
    assert [most_local([13, 7], W) for W in (1, 2, 3, 13, 20)] == [13, 7, 5, 1, 1]
