"""A rank's part of the gradient sum: the tree's bits, whatever the gradients look like and wherever they lie."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.exact.test_tree import SHAPES, random_gradients, reference_sum, same_bits
from trainer.exact.gradient_sum import ALIGNMENT, GradientSum, _view_like, norm_of, round_up
from trainer.exact.packs.pack_sum import PackSum
from trainer.exact.tree import buffers_needed, cover


def made(
    leaves: Sequence[int], shapes: Sequence[tuple[int, ...]] = SHAPES, rank: int = 0, world_size: int = 1, head: int = 0
) -> GradientSum:
    parameters = [torch.zeros(shape) for shape in shapes]
    return GradientSum(parameters, leaves=leaves, rank=rank, world_size=world_size, head_size=head)


def added(total: GradientSum, gradients: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """The sum by parameter after a step; alone, a rank has all of it."""
    for j in total.start(len(gradients)):
        total.add(j, gradients[j])
    total.finish()
    return total.gradient_views


def check_sum(views: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]) -> None:
    assert len(views) == len(gradients[0])
    for i, view in enumerate(views):
        assert view.shape == gradients[0][i].shape
        assert same_bits(view, reference_sum([leaf[i] for leaf in gradients]))


def test_steps_of_several_sizes_share_their_buffers() -> None:
    """As an epoch with a smaller last batch has them; nothing of the step before is left."""
    total = made([7, 16, 3])
    for seed, M in enumerate((16, 7, 3, 16)):
        gradients = random_gradients(M, seed)
        check_sum(added(total, gradients), gradients)


@pytest.mark.parametrize(("M", "W"), [(13, 3), (5, 2), (8, 4), (2, 3)])
def test_a_rank_is_left_with_the_nodes_of_its_block(M: int, W: int) -> None:
    gradients = random_gradients(M, 3)
    for rank in range(W):
        total = made([M], rank=rank, world_size=W)
        for j in total.start(M):
            total.add(j, gradients[j])
        total.finish()
        for node, (level, index) in zip(total.nodes, cover(M, W, rank)):
            # A node of the tree is the tree over its own leaves.
            leaves = gradients[index << level : min((index + 1) << level, M)]
            start = 0
            for i, shape in enumerate(SHAPES):
                size = math.prod(shape)
                piece = node[start : start + size].view(shape)
                assert same_bits(piece, reference_sum([leaf[i] for leaf in leaves]))
                start = round_up(start + size, ALIGNMENT)


def test_gradients_given_to_add_are_not_changed() -> None:
    gradients = random_gradients(6, 0)
    before = [[g.clone() for g in leaf] for leaf in gradients]
    added(made([6]), gradients)
    assert all(same_bits(a, b) for one, other in zip(gradients, before) for a, b in zip(one, other))


# Where things lie


def test_the_gradient_is_as_long_at_every_world_size() -> None:
    """Its norm is a reduction, whose order of additions may depend on the length."""
    assert len({made([40], world_size=W).gradient.numel() for W in (1, 2, 3, 7, 27, 32)}) == 1


@pytest.mark.parametrize("W", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 15, 16, 17])
def test_every_tensor_starts_where_a_fresh_one_would(W: int, count: int) -> None:
    """At a multiple of 64 bytes from the storage's start; and a node divides into one such shard a rank."""
    total = made([11], [(3,), (16,), (5, 5)] + [(1,)] * count, world_size=W, head=13)
    begin = total.storage.data_ptr()
    parts = [total.head, total.nodes, *total.nodes, *total.gradient_views, total.gradient]
    assert all((part.data_ptr() - begin) % 64 == 0 for part in parts)
    assert total.numel == 16 + 16 + 32 + 16 * count
    assert total.size % (16 * W) == 0
    # Behind the gradient is one count a parameter, and less padding than one more such row.
    assert total.numel + 3 + count <= total.size < total.numel + 3 + count + 16 * W


def test_storage_is_the_head_and_then_the_nodes() -> None:
    total = made([13], world_size=3, rank=1, head=20)
    assert len(total.head) == 32
    assert total.nodes.shape == (buffers_needed(13, 3, 1), total.size)
    assert len(total.storage) == 32 + total.nodes.numel()
    total.head.fill_(1.0)
    total.nodes[0].fill_(2.0)
    assert total.storage[: 32 + total.size].tolist() == [1.0] * 32 + [2.0] * total.size


def test_as_many_buffers_as_the_largest_step_needs() -> None:
    assert len(made([1, 16, 3]).nodes) == len(made([16]).nodes) > len(made([1]).nodes)


def test_what_lies_between_parameters_stays_zero() -> None:
    """Else the norm of the gradient would see it."""
    total = made([5], [(3,), (20,)])
    added(total, [[torch.ones(3), torch.ones(20)] for _ in range(5)])
    assert total.gradient.tolist() == [5.0] * 3 + [0.0] * 13 + [5.0] * 20 + [0.0] * 12


def test_a_model_of_a_single_parameter() -> None:
    gradients = random_gradients(3, 0, [(5,)])
    check_sum(added(made([3], [(5,)]), gradients), gradients)


def test_the_gradient_lives_in_one_place() -> None:
    """The optimizer is given the views once; every step writes to the same memory."""
    total = made([3, 5])
    views, flat = total.gradient_views, total.gradient
    for M in (5, 3):
        gradients = random_gradients(M, M)
        added(total, gradients)
        check_sum(views, gradients)
        assert flat.data_ptr() == total.gradient.data_ptr()
        assert all(v.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for v in views)


# Gradients that are not there


def test_a_gradient_that_is_not_there_counts_as_zeros() -> None:
    total = made([7], [(2,), (3,)])
    gradients = [[torch.full((2,), 2.0**j), torch.ones(3) if j in (1, 4) else None] for j in range(7)]
    present = []
    for j in total.start(7):
        present.append(total.add(j, gradients[j]))
    assert [view.tolist() for view in total.gradient_views] == [[127.0] * 2, [2.0] * 3]
    assert [leaf[1].tolist() for leaf in present] == [[1.0 * (j in (1, 4))] * 3 for j in range(7)]
    assert [leaf[0].tolist() for leaf in present] == [[2.0**j] * 2 for j in range(7)]


@pytest.mark.parametrize("M", [1, 2, 3, 5, 8])
def test_a_parameter_is_unused_if_no_micro_batch_of_the_step_used_it(M: int) -> None:
    """Whichever one it was; and what was so in the step before does not matter."""
    total = made([M], [(2,), (2,), (2,)])
    ones = torch.ones(2)
    for used in [*range(M), None, *range(M)]:
        added(total, [[ones, ones if j == used else None, None] for j in range(M)])
        assert total.unused().tolist() == [False, used is None, True]


# Gradients that share memory


@pytest.mark.parametrize("M", [1, 2, 3, 5, 8])
def test_gradients_that_share_memory(M: int) -> None:
    """Autograd hands out the same tensor for two parameters (of x + y, say), or an expanded one (of a sum)."""
    generator = torch.Generator().manual_seed(M)
    gradients = []
    for j in range(M):
        shared = torch.randn(4, 3, generator=generator) * 10.0**j
        row = torch.randn(3, generator=generator)
        gradients.append([shared, shared, row.expand(4, 3)] if j % 2 else [row.expand(4, 3), shared, shared.t().t()])
    copies = [[g.clone() for g in leaf] for leaf in gradients]
    check_sum(added(made([M], [(4, 3)] * 3), gradients), copies)


def test_gradients_of_autograd_that_share_memory() -> None:
    x, y, w = (torch.randn(5, requires_grad=True) for _ in range(3))
    total = GradientSum([x, y, w], leaves=[3], rank=0, world_size=1, head_size=0)
    for j in total.start(3):
        gradients = torch.autograd.grad(((x + y) * (j + 1.5)).sum() + w.sum(), [x, y, w])
        assert gradients[0].data_ptr() == gradients[1].data_ptr()
        assert 0 in gradients[2].stride()
        total.add(j, gradients)
    assert [view.tolist() for view in total.gradient_views] == [[1.5 + 2.5 + 3.5] * 5, [7.5] * 5, [3.0] * 5]


def test_the_norm_of_a_micro_batch_is_over_all_its_gradients() -> None:
    assert float(norm_of([torch.full((2, 2), 3.0), torch.tensor([8.0])])) == 10.0
    # Of 5e-30: in float32 its square is 0.
    assert float(norm_of([torch.tensor([3e-30]), torch.tensor([4e-30, 0.0])])) == pytest.approx(5e-30, rel=1e-6)


@pytest.mark.parametrize(("value", "wanted"), [(0, 0), (1, 16), (15, 16), (16, 16), (17, 32), (33, 48)])
def test_rounding_up(value: int, wanted: int) -> None:
    assert round_up(value, 16) == wanted


# Memory formats


@pytest.mark.parametrize(
    "parameter",
    [
        torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.zeros(4, 1, 3, 3).to(memory_format=torch.channels_last),
        torch.zeros(2, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d),
        torch.zeros(5, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.empty_strided((3, 1, 5), (1, 77, 3)),  # the stride of a single row is any number
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
    total = GradientSum(parameters, leaves=[11], rank=0, world_size=1, head_size=0)
    gradients = [
        [g.contiguous(memory_format=format_of_gradients) if g.ndim == 4 else g for g in leaf]
        for leaf in random_gradients(11, 0, [(4, 3, 3, 3), (7,)])
    ]
    check_sum(added(total, gradients), gradients)
    assert total.gradient_views[0].is_contiguous(memory_format=torch.channels_last)


# Any order, one by one or in packs


@pytest.mark.parametrize(("M", "W"), [(1, 1), (2, 1), (5, 1), (8, 1), (13, 1), (13, 3), (32, 1), (31, 2), (24, 5)])
def test_a_block_may_be_added_in_any_order(M: int, W: int) -> None:
    """And in packs of micro-batches from anywhere: the bits and the counts are those of the tree."""
    gradients: list[list[Tensor | None]] = [list(leaf) for leaf in random_gradients(M, 3)]
    for j in range(0, M, 3):
        gradients[j][1] = None
    for seed in range(8):
        draw = random.Random(seed)
        for rank in range(W):
            wanted, total = made([M], rank=rank, world_size=W), made([M], rank=rank, world_size=W)
            block = list(wanted.start(M))
            for j in block:
                wanted.add(j, gradients[j])
            wanted.finish()
            total.start(M)
            draw.shuffle(block)
            while block:
                part = sorted(block[: draw.choice([1, 1, 2, 3, 4, 7])])
                block = block[len(part) :]
                if len(part) == 1:
                    total.add(part[0], gradients[part[0]])
                else:
                    _add_pack(total, M, part, [gradients[j] for j in part])
            total.finish()
            for node, other, _ in zip(wanted.nodes, total.nodes, cover(M, W, rank)):
                assert same_bits(node, other)


def _add_pack(total: GradientSum, M: int, part: list[int], gradients: list[list[Tensor | None]]) -> None:
    given_up = PackSum(total, M, part, norms=False, audited=None)
    given_up.take(0, torch.ones(len(part), *SHAPES[0]), None)  # changes nothing
    sink = PackSum(total, M, part, norms=False, audited=None)
    for place, shape in enumerate(SHAPES):
        rows = [g[place] for g in gradients]
        present = [row is not None for row in rows]
        if any(present):
            filled = torch.stack([torch.ones(shape) if row is None else row for row in rows])
            sink.take(place, filled, None if all(present) else present)
    sink.close()
