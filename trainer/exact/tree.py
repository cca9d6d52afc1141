"""The tree: in which order the micro-batches of a global batch are added, whichever rank computes them.

Floating-point addition is not associative: another order gives other bits. So the order must be fixed. Ours is
a binary tree over the M micro-batches: neighbours are added in pairs, level by level. At the end of a level, a node
without a neighbour moves up unchanged. A rank first makes all additions that need only its own block of micro-batches.
It then holds the few nodes of the tree that cover the block: exactly one if M and the number of ranks are powers of
two. The ranks exchange these nodes, and make the remaining additions of the same tree.

For example five micro-batches on two ranks: rank 0 adds 0 and 1, rank 1 adds 2 and 3 and keeps 4. They exchange these
three nodes, and two additions remain:

    (((0 + 1) + (2 + 3)) + 4)
      rank 0    rank 1    rank 1

This file only plans, with whole numbers. `gradient_sum` adds a rank's own micro-batches, `exchange` the ranks' nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import rank_block

Node = tuple[int, int]  # (level, index): covers the leaves [index 2^level, (index + 1) 2^level), cut off at M


@dataclass(frozen=True)
class Merge:
    """Adding the node in `source` to the node in `target`, in place; positions in a list of nodes."""

    target: int
    source: int


def _settle(stack: list[tuple[Node, int]], leaves: int, merges: list[Merge]) -> None:
    """Merges or lifts the top of a stack of (node, position) as often as the nodes on the stack allow.

    This works like carrying in a binary counter: two nodes of one level become one node of the next level.
    """
    while True:
        (level, index), position = stack[-1]
        last = (leaves - 1) >> level  # index of the last node of this level
        if last == 0:  # the root
            return
        # A right-hand node (odd index) is added to its left neighbour, if that one is on the stack, too.
        if index % 2 == 1 and len(stack) > 1 and stack[-2][0] == (level, index - 1):
            target = stack[-2][1]
            merges.append(Merge(target, position))
            del stack[-2:]
            stack.append(((level + 1, index // 2), target))
        # A left-hand node at the end of its level has no right neighbour: it moves up unchanged.
        elif index % 2 == 0 and index == last:
            stack[-1] = ((level + 1, index // 2), position)
        else:
            return


@cache
def local_program(leaves: int, begin: int, stop: int) -> tuple[tuple[tuple[Merge, ...], ...], tuple[Node, ...]]:
    """How a rank adds its block of leaves. Planned once, and followed in every step.

    Args:
        leaves: M, micro-batches of the global batch.
        begin, stop: the rank's block of them.

    Returns:
        For each leaf, the merges that follow its arrival, and the nodes that are left at positions 0, 1, ...
        Positions are those of a stack of buffers: a new leaf takes the first free one, so its first merge
        is always with the position below.
    """
    stack: list[tuple[Node, int]] = []
    program = []
    for leaf in range(begin, stop):
        merges: list[Merge] = []
        stack.append(((0, leaf), len(stack)))
        _settle(stack, leaves, merges)
        program.append(tuple(merges))
    return tuple(program), tuple(node for node, _ in stack)


class Level(NamedTuple):
    """Additions inside a pack: leaves first, first + stride, ... (`number`) each take that `distance` behind them."""

    first: int
    stride: int
    distance: int
    number: int


class PackProgram(NamedTuple):
    """How a pack of neighbouring leaves is added.

    Attributes:
        levels: additions inside the pack; a node lies where its first leaf lay.
        nodes: the leaves at which nodes are left, in order.
        sizes: how many leaves each of these covers.
        merges: additions to and among the rank's buffers: the pack's nodes lie in the first free ones.
        moves: (to, from): buffers that have to be moved together afterwards.
        top: buffers in use then.
    """

    levels: tuple[Level, ...]
    nodes: tuple[int, ...]
    sizes: tuple[int, ...]
    merges: tuple[Merge, ...]
    moves: tuple[tuple[int, int], ...]
    top: int


@cache
def pack_program(leaves: int, begin: int, first: int, stop: int) -> PackProgram:
    """How a rank adds the leaves first ... stop - 1 at once, after those from `begin` on.

    The additions are those of `local_program`, in another order: a node is the sum of its two halves either way.

    Args:
        leaves: M.
        begin: where the rank's block begins.
        first, stop: the pack's leaves.
    """
    levels = []
    for level in range((stop - first).bit_length()):
        half, stride = 1 << level, 2 << level
        start = -(-first // stride) * stride
        count = 0
        # A node is complete if all its leaves are here; the last of a level may be cut off at M.
        while start + count * stride + half < stop and min(start + (count + 1) * stride, leaves) <= stop:
            count += 1
        if count:
            levels.append(Level(start - first, stride, half, count))
    own = local_program(leaves, first, stop)[1]
    starts = [index << level for level, index in own]
    ends = [min((index + 1) << level, leaves) for level, index in own]
    stack = [(node, position) for position, node in enumerate(local_program(leaves, begin, first)[1])]
    top = len(stack)
    merges: list[Merge] = []
    for k, node in enumerate(own):
        stack.append((node, top + k))
        _settle(stack, leaves, merges)
    moves = tuple((to, position) for to, (_, position) in enumerate(stack) if to != position)
    return PackProgram(
        tuple(levels),
        tuple(start - first for start in starts),
        tuple(end - start for start, end in zip(starts, ends)),
        tuple(merges),
        moves,
        len(stack),
    )


@cache
def cover(leaves: int, world_size: int, rank: int) -> tuple[Node, ...]:
    """The nodes of the tree that a rank holds after adding its own block."""
    block = rank_block(leaves, world_size, rank)
    return local_program(leaves, block.start, block.stop)[1]


@cache
def exchange_program(leaves: int, world_size: int) -> tuple[tuple[Merge, ...], ...]:
    """The additions over all ranks' nodes, in rounds; the additions of one round are independent of one another.

    Nodes are numbered by rank, then position. The root of the tree ends at node 0.
    """
    stack: list[tuple[Node, int]] = []
    merges: list[Merge] = []
    position = 0
    for rank in range(world_size):
        for node in cover(leaves, world_size, rank):
            stack.append((node, position))
            _settle(stack, leaves, merges)
            position += 1
    assert len(stack) == 1 and stack[0][1] == 0, stack  # all leaves are in the root, in node 0's buffer
    # A merge belongs to the first round in which both of its nodes are complete. A round can then be made in one
    # operation, and no order of the additions within it could change a bit.
    ready: dict[int, int] = {}
    rounds: list[list[Merge]] = []
    for merge in merges:
        turn = max(ready.get(merge.target, 0), ready.get(merge.source, 0))
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(merge)
        ready[merge.target] = turn + 1
    return tuple(tuple(r) for r in rounds)


def buffers_needed(leaves: int, world_size: int, rank: int) -> int:
    """Buffers that this rank needs: for its own additions, and for as many nodes as any rank sends.

    An all-gather takes pieces of one size, so every rank sends as many buffers as the one with the most nodes.
    """
    block = rank_block(leaves, world_size, rank)
    depth = peak = 0  # buffers in use, now and at most
    for merges in local_program(leaves, block.start, block.stop)[0]:
        depth += 1 - len(merges)
        peak = max(peak, depth)
    return max(peak, *(len(cover(leaves, world_size, r)) for r in range(world_size)))


def run_rounds(rounds: Sequence[Sequence[Merge]], rows: Sequence[Tensor]) -> None:
    """Makes the additions of an exchange program in place; rows[i] is node i."""
    for merges in rounds:
        if len(merges) == 1:
            rows[merges[0].target].add_(rows[merges[0].source])
        else:
            torch._foreach_add_([rows[m.target] for m in merges], [rows[m.source] for m in merges])
