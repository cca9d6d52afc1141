"""The gradient tree: the same bits at every world size, against a reference written another way."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.exact.plan import rank_block
from trainer.exact.tree import buffers_needed, cover, exchange_program, local_program, run_rounds

# Without a deadline: on a busy machine any example can take long.
checked = settings(deadline=None, max_examples=150)

SHAPES = [(3, 5), (1,), (2, 2, 2), (17,)]


def reference_sum(leaves: Sequence[Tensor]) -> Tensor:
    """The root of the tree by its definition: neighbours in pairs, level by level, an odd one out moves up."""
    if len(leaves) == 1:
        return leaves[0]
    pairs = [left + right for left, right in zip(leaves[::2], leaves[1::2])]
    odd_one_out = [leaves[-1]] if len(leaves) % 2 else []
    return reference_sum(pairs + odd_one_out)


def random_leaves(count: int, seed: int, numel: int = 33) -> list[Tensor]:
    """Gradients over many magnitudes, so that another order gives other bits."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(3 * torch.randn(count, numel, generator=generator))
    return list(size * torch.randn(count, numel, generator=generator))


def random_gradients(count: int, seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[list[Tensor]]:
    numels = [math.prod(shape) for shape in shapes]
    flat = random_leaves(count, seed, sum(numels))
    return [[piece.view(shape) for piece, shape in zip(leaf.split(numels), shapes)] for leaf in flat]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than torch.equal: the sign of zero counts."""
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


worlds = st.integers(1, 70).flatmap(lambda m: st.tuples(st.just(m), st.integers(1, m)))
# A tail batch may have fewer micro-batches than there are ranks.
any_worlds = st.tuples(st.integers(1, 70), st.integers(1, 24))


# The programs


def run_local_program(leaves: Sequence[Tensor], begin: int, stop: int) -> tuple[list[Tensor], int]:
    """What a rank is left with after its block, and the most buffers it needed."""
    program, nodes = local_program(len(leaves), begin, stop)
    assert len(program) == stop - begin
    stack: list[Tensor] = []
    most = 0
    for leaf, merges in zip(leaves[begin:stop], program):
        stack.append(leaf.clone())
        most = max(most, len(stack) - bool(merges))  # a leaf that is merged at once needs no buffer
        for merge in merges:
            # A counter: the top is added to what lies under it.
            assert (merge.target, merge.source) == (len(stack) - 2, len(stack) - 1)
            stack[merge.target] = stack[merge.target] + stack[merge.source]
            stack.pop()
    assert len(stack) == len(nodes)
    return stack, most


@checked
@given(world=any_worlds, seed=st.integers(0, 1000))
@example((1, 1), 0)
@example((64, 8), 0)
@example((64, 7), 0)
@example((5, 24), 0)
def test_every_world_size_gives_the_bits_of_the_tree(world: tuple[int, int], seed: int) -> None:
    M, W = world
    leaves = random_leaves(M, seed)
    rows: list[Tensor] = []
    for rank in range(W):
        block = rank_block(M, W, rank)
        rows += run_local_program(leaves, block.start, block.stop)[0]
    run_rounds(exchange_program(M, W), rows)
    assert same_bits(rows[0], reference_sum(leaves))


@pytest.mark.parametrize("M", [4, 8, 30, 70])
def test_the_data_above_tells_orders_apart(M: int) -> None:
    """If a running sum gave the same bits, the tests here would prove nothing."""
    leaves = random_leaves(M, 1)
    assert not same_bits(functools.reduce(torch.add, leaves), reference_sum(leaves))


@checked
@given(world=worlds)
def test_nodes_cover_a_block_exactly(world: tuple[int, int]) -> None:
    M, W = world
    for rank in range(W):
        block = rank_block(M, W, rank)
        leaves = []
        for level, index in cover(M, W, rank):
            leaves += range(index << level, min((index + 1) << level, M))
        assert leaves == list(block)


@checked
@given(levels=st.integers(0, 8), world_levels=st.integers(0, 8))
def test_powers_of_two_leave_one_node_a_rank(levels: int, world_levels: int) -> None:
    M, W = 1 << levels, 1 << min(levels, world_levels)
    depth = levels - min(levels, world_levels)
    assert [cover(M, W, rank) for rank in range(W)] == [((depth, rank),) for rank in range(W)]
    # A rank's part needs no more buffers than a counter has bits, and the exchange has log2 W rounds.
    assert len(exchange_program(M, W)) == W.bit_length() - 1


@checked
@given(world=any_worlds, seed=st.integers(0, 10))
def test_few_buffers_are_alive(world: tuple[int, int], seed: int) -> None:
    """At most log2 M + 1 for a block that starts on the left; one that starts anywhere has two such edges."""
    M, W = world
    leaves = random_leaves(M, seed, 1)
    assert run_local_program(leaves, 0, M)[1] <= M.bit_length()
    for rank in range(W):
        block = rank_block(M, W, rank)
        assert run_local_program(leaves, block.start, block.stop)[1] <= 2 * M.bit_length()


@checked
@given(world=any_worlds)
def test_as_many_buffers_as_are_used(world: tuple[int, int]) -> None:
    """By the rank's own counter, or for the nodes of the rank that sends most."""
    M, W = world
    leaves = random_leaves(M, 0, 1)
    blocks = [rank_block(M, W, rank) for rank in range(W)]
    sent = max(len(cover(M, W, rank)) for rank in range(W))
    for rank, block in enumerate(blocks):
        assert buffers_needed(M, W, rank) == max(sent, run_local_program(leaves, block.start, block.stop)[1])


@checked
@given(world=any_worlds)
def test_rounds_hold_independent_additions(world: tuple[int, int]) -> None:
    """Within a round no node is used twice, so its additions can be made in any order, or at once."""
    rounds = exchange_program(*world)
    gone: set[int] = set()
    for merges in rounds:
        used = [position for merge in merges for position in (merge.target, merge.source)]
        assert len(set(used)) == len(used)
        assert not gone & set(used)  # what has been added to another node is not read again
        gone |= {merge.source for merge in merges}
    nodes = sum(len(cover(*world, rank)) for rank in range(world[1]))
    assert gone == set(range(1, nodes))
    assert not rounds or len(rounds[-1]) == 1


def test_programs_by_hand() -> None:
    """Five leaves: ((0 + 1) + (2 + 3)) + 4."""
    program, nodes = local_program(5, 0, 5)
    assert [[(m.target, m.source) for m in merges] for merges in program] == [
        [],
        [(0, 1)],
        [],
        [(1, 2), (0, 1)],
        [(0, 1)],
    ]
    assert nodes == ((3, 0),)
    # On two ranks: leaves 0, 1 are a node; 2, 3 are one; 4 moves up and waits.
    assert cover(5, 2, 0) == ((1, 0),)
    assert cover(5, 2, 1) == ((1, 1), (2, 1))


@checked
@given(M=st.integers(1, 70), seed=st.integers(0, 1000))
def test_the_sum_is_a_sum(M: int, seed: int) -> None:
    """Close to float64's; the error of a tree grows with its depth (Higham 1993), not with M."""
    leaves = random_leaves(M, seed)
    stack, _ = run_local_program(leaves, 0, M)
    exact = torch.stack(leaves).double().sum(0)
    absolute = torch.stack(leaves).double().abs().sum(0)
    depth = max(1, math.ceil(math.log2(M)))
    assert ((stack[0].double() - exact).abs() <= 1.1 * depth * 2.0**-24 * absolute).all()
