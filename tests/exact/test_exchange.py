"""The gradient sum of one rank, and the exchange between ranks: the bits of the tree's definition."""

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
from trainer.exact.gradient_sum import ALIGNMENT, GradientSum, _view_like, norm_of
from trainer.exact.record import OwnRecords, RecordLayout, Records

# The sum of one rank, and the exchange


class WholeSum:
    """A rank's sum, its records and the exchange, put together as `exact.step.ExactStep` does."""

    def __init__(
        self,
        shapes_of: Sequence[Tensor],
        *,
        leaves: Sequence[int] | set[int],
        statistics_size: int,
        norms: bool = False,
        rank: int,
        world_size: int,
    ) -> None:
        layout, most = RecordLayout(statistics_size, norms), most_local(leaves, world_size)
        place: dict[str, Any] = {"leaves": leaves, "rank": rank, "world_size": world_size}
        self.sum = GradientSum(shapes_of, head_size=most * layout.size, **place)
        self.own = OwnRecords(self.sum.head[: most * layout.size].view(most, layout.size), layout)
        self._exchange, self._norms, self._leaves = Exchange(self.sum, layout, **place), norms, 0

    def start(self, leaves: int) -> range:
        self._leaves = leaves
        self.own.start()
        return self.sum.start(leaves)

    def add(self, gradients: Sequence[Tensor | None], loss: Tensor) -> None:
        added = self.sum.add(gradients)
        self.own.add(loss, norm_of(added) if self._norms else None)

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
        tree.own.statistics.copy_(statistics)
        tree.add(gradients[j], loss)
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


def test_gradients_given_to_add_are_not_changed() -> None:
    gradients = random_gradients(6, 0)
    before = [[g.clone() for g in leaf] for leaf in gradients]
    one_step(make_tree(1, 0, [6]), gradients)
    assert all(same_bits(a, b) for one, other in zip(gradients, before) for a, b in zip(one, other))


def test_the_gradient_is_as_long_at_every_world_size() -> None:
    """Its norm is a reduction, whose order of additions may depend on the length."""
    assert len({make_tree(W, 0, [40]).sum.gradient.numel() for W in (1, 2, 3, 7, 27, 32)}) == 1


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


def test_statistics_may_be_left_out() -> None:
    tree = WholeSum([torch.zeros(2)], leaves=[2], statistics_size=0, rank=0, world_size=1)
    for j in tree.start(2):
        tree.add([torch.ones(2)], torch.tensor(float(j), requires_grad=True))
    records = tree.reduce()
    assert records.losses.tolist() == [0.0, 1.0]
    assert records.statistics.shape == (2, 0)
    assert records.norms is None
    assert not records.losses.requires_grad


def test_norms_stand_beside_statistics_and_flags() -> None:
    """Of each micro-batch's gradient, in order; one that a micro-batch did not use counts as 0."""
    tree = WholeSum(
        [torch.zeros(3, 2), torch.zeros(4)], leaves=[5], statistics_size=2, norms=True, rank=0, world_size=1
    )
    # Norms of 5e-30: in float32 their squares are 0.
    gradients = [(torch.full((3, 2), 3e-30 * j), torch.full((4,), 1.0 + j) if j % 2 else None) for j in range(1, 6)]
    for step in range(2):
        if step:
            tree.own.raise_flag()
        for j in tree.start(5):
            tree.own.statistics.fill_(10.0 + j)
            tree.add(gradients[j], torch.tensor(float(j)))
        records = tree.reduce()
        assert records.losses.tolist() == list(range(5))
        assert records.statistics.tolist() == [[10.0 + j, 10.0 + j] for j in range(5)]
        assert records.flags.tolist() == [float(step)] * 5
        expected = [sum(float((g.double() ** 2).sum()) for g in leaf if g is not None) ** 0.5 for leaf in gradients]
        assert records.norms is not None
        assert records.norms.tolist() == pytest.approx(expected, rel=1e-6)


def test_reduce_needs_the_whole_block() -> None:
    tree = make_tree(1, 0, [3])
    tree.start(3)
    tree.add(random_gradients(1, 0)[0], torch.zeros(()))
    with pytest.raises(AssertionError):
        tree.reduce()


@pytest.mark.parametrize("M", [1, 2, 3, 5, 8])
def test_gradients_that_share_memory(M: int) -> None:
    """Autograd hands out the same tensor for two parameters (of x + y, say), or an expanded one (of a sum)."""
    shapes = [(4, 3), (4, 3), (4, 3)]
    generator = torch.Generator().manual_seed(M)
    gradients = []
    for j in range(M):
        shared = torch.randn(4, 3, generator=generator) * 10.0**j
        row = torch.randn(3, generator=generator)
        gradients.append([shared, shared, row.expand(4, 3)] if j % 2 else [row.expand(4, 3), shared, shared.t().t()])
    copies = [[g.clone() for g in leaf] for leaf in gradients]
    result = one_step(make_tree(1, 0, [M], shapes), gradients)
    check_step(result, copies)


def test_gradients_of_autograd_that_share_memory() -> None:
    x, y, w = (torch.randn(5, requires_grad=True) for _ in range(3))
    tree = WholeSum([x, y, w], leaves=[3], statistics_size=0, rank=0, world_size=1)
    for j in tree.start(3):
        loss = ((x + y) * (j + 1.5)).sum() + w.sum()
        gradients = torch.autograd.grad(loss, [x, y, w])
        assert gradients[0].data_ptr() == gradients[1].data_ptr()
        assert 0 in gradients[2].stride()
        tree.add(gradients, loss)
    tree.reduce()
    assert [view.tolist() for view in tree.sum.gradient_views] == [[1.5 + 2.5 + 3.5] * 5, [7.5] * 5, [3.0] * 5]


# Memory formats


@pytest.mark.parametrize(
    "parameter",
    [
        torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.zeros(4, 1, 3, 3).to(memory_format=torch.channels_last),
        torch.zeros(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        torch.zeros(3, 7).t(),
        torch.zeros(5),
        torch.zeros(()),
        torch.zeros(0, 3),
    ],
    ids=lambda p: f"{tuple(p.shape)}-{p.stride()}",
)
def test_views_have_a_parameters_shape_and_strides(parameter: Tensor) -> None:
    """Optimizer kernels are fast, and fuse, where gradient and parameter lie alike."""
    flat = torch.zeros(4, 400)[2]  # a row: its storage offset is not 0
    view = _view_like(parameter, flat, 16)
    assert view.shape == parameter.shape
    strides = zip(parameter.shape, view.stride(), parameter.stride())
    assert all(ours == its for size, ours, its in strides if size != 1)  # of a single row it means nothing
    view.copy_(torch.arange(1.0, parameter.numel() + 1).view(parameter.shape))
    inside = flat[16 : 16 + parameter.numel()]
    assert sorted(inside.tolist()) == [float(i + 1) for i in range(parameter.numel())]
    assert flat.count_nonzero() == parameter.numel()


@pytest.mark.parametrize(
    "parameter", [torch.zeros(4, 6)[:, ::2], torch.zeros(3, 1).expand(3, 4), torch.zeros(6, 4)[:, :3]]
)
def test_views_of_a_parameter_with_gaps_are_contiguous(parameter: Tensor) -> None:
    """Its own strides would leave its piece of the buffer, or write one place twice."""
    flat = torch.zeros(100)
    view = _view_like(parameter, flat, 32)
    assert view.shape == parameter.shape
    assert view.is_contiguous()
    view.fill_(1.0)
    assert flat[32 : 32 + parameter.numel()].all()
    assert int(flat.sum()) == parameter.numel()


@pytest.mark.parametrize("format_of_gradients", [torch.channels_last, torch.contiguous_format])
def test_sum_of_a_channels_last_parameter(format_of_gradients: torch.memory_format) -> None:
    parameters = [torch.zeros(4, 3, 3, 3).to(memory_format=torch.channels_last), torch.zeros(7)]
    tree = WholeSum(parameters, leaves=[11], statistics_size=3, rank=0, world_size=1)
    gradients = [
        [g.contiguous(memory_format=format_of_gradients) if g.ndim == 4 else g for g in leaf]
        for leaf in random_gradients(11, 0, [(4, 3, 3, 3), (7,)])
    ]
    views, _, _ = one_step(tree, gradients)
    assert tree.sum.gradient_views[0].is_contiguous(memory_format=torch.channels_last)
    for i, view in enumerate(views):
        assert same_bits(view, reference_sum([leaf[i] for leaf in gradients]))


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
