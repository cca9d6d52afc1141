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

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
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


class Growing:
    """The nodes that are there while the tree is added, and the places where they lie.

    A node that arrives is merged with its neighbour if that one is there, and so on upwards. This works like a carry in
    a binary counter. Nodes may arrive in any order: a node is the sum of its two halves either way.

    Args:
        leaves: M.

    Attributes:
        places: node -> where it lies.
    """

    def __init__(self, leaves: int) -> None:
        self._leaves = leaves
        self.places: dict[Node, int] = {}

    def copy(self) -> Growing:
        """Another one with the same nodes."""
        other = Growing(self._leaves)
        other.places = dict(self.places)
        return other

    def free(self, count: int) -> list[int]:
        """The first `count` places in which no node lies. They stay free until nodes arrive there."""
        taken = set(self.places.values())
        return list(itertools.islice((place for place in itertools.count() if place not in taken), count))

    def neighbour(self, node: Node) -> int | None:
        """Where the neighbour lies with which this node would be merged on arrival; None if it is not there."""
        level, index = self._lifted(node)
        return self.places.get((level, index ^ 1))

    def arrive(self, node: Node, place: int) -> list[Merge]:
        """A node has been put at a place. Returns the merges that follow, in order."""
        merges: list[Merge] = []
        while True:
            level, index = self._lifted(node)
            other = self.places.pop((level, index ^ 1), None)
            if other is None:
                self.places[level, index] = place
                return merges
            # The sum lies where the left half lay. a + b and b + a have the same bits, so only the place is a choice.
            target, source = (other, place) if index % 2 else (place, other)
            merges.append(Merge(target, source))
            node, place = (level + 1, index // 2), target

    def join(self, node: Node, place: int) -> list[Merge]:
        """A node has been added to its neighbour, which lies at a place. Returns the merges that follow, in order."""
        level, index = self._lifted(node)
        del self.places[level, index ^ 1]
        return self.arrive((level + 1, index // 2), place)

    def _lifted(self, node: Node) -> Node:
        """A left-hand node at the end of its level has no right neighbour: it moves up unchanged."""
        level, index = node
        # Node 0 is never lifted: where it is the last one of its level, it covers all leaves, so it is the root.
        while index % 2 == 0 and 0 < index == (self._leaves - 1) >> level:
            level, index = level + 1, index // 2
        return level, index

    def in_order(self) -> list[tuple[int, int]]:
        """Moves the nodes to the places 0, 1, ... in their order. Returns the copies to make, in order: (to, from)."""
        moves = []
        for to, node in enumerate(self.nodes()):
            # Another node may lie at `to`. It is moved to a free place first, so that it is not written over.
            place = self.places[node]
            if place == to:
                continue
            for other, where in self.places.items():
                if where == to:
                    (self.places[other],) = self.free(1)
                    moves.append((self.places[other], to))
                    break
            self.places[node] = to
            moves.append((to, place))
        return moves

    def nodes(self) -> list[Node]:
        """The nodes that are there, in the order of their first leaves."""
        return sorted(self.places, key=lambda node: node[1] << node[0])


@cache
def local_program(leaves: int, begin: int, stop: int) -> tuple[tuple[tuple[Merge, ...], ...], tuple[Node, ...]]:
    """How a rank adds its block of leaves, one after the other.

    Args:
        leaves: M, micro-batches of the global batch.
        begin, stop: the rank's block of them.

    Returns:
        For each leaf, the merges that follow its arrival, and the nodes that are left at places 0, 1, ...
        A new leaf takes the first free place.
    """
    growing, program = Growing(leaves), []
    for leaf in range(begin, stop):
        program.append(tuple(growing.arrive((0, leaf), growing.free(1)[0])))
    return tuple(program), tuple(growing.nodes())


class Level(NamedTuple):
    """Additions inside a pack: rows first, first + stride, ... (`number`) each take that `distance` behind them."""

    first: int
    stride: int
    distance: int
    number: int


class PackProgram(NamedTuple):
    """How the leaves of a pack are added to one another.

    Attributes:
        levels: additions, in order; a node lies in the row of its first leaf.
        nodes: what is left.
        rows: where it lies.
        sizes: how many leaves each of these covers.
    """

    levels: tuple[Level, ...]
    nodes: tuple[Node, ...]
    rows: tuple[int, ...]
    sizes: tuple[int, ...]


def _rounds(merges: list[Merge]) -> list[list[Merge]]:
    """Merges in rounds: each merge stands in the first round in which both of its nodes are complete.

    So one operation can make a round, and the order of the additions within it cannot change a bit.
    """
    ready: dict[int, int] = {}
    rounds: list[list[Merge]] = []
    for merge in merges:
        turn = max(ready.get(merge.target, 0), ready.get(merge.source, 0))
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(merge)
        ready[merge.target] = turn + 1
    return rounds


@lru_cache(maxsize=1024)
def pack_program(leaves: int, pack: tuple[int, ...]) -> PackProgram:
    """How the leaves of a pack are added to one another, where they are neighbours in the tree.

    Args:
        leaves: M.
        pack: the leaves in order.
    """
    growing, merges = Growing(leaves), []
    for row, leaf in enumerate(pack):
        merges += growing.arrive((0, leaf), row)
    levels = [level for merges in _rounds(merges) for level in _runs(merges)]
    nodes = growing.nodes()
    rows = [growing.places[node] for node in nodes]
    ends = [min((index + 1) << level, leaves) for level, index in nodes]
    return PackProgram(
        tuple(levels), tuple(nodes), tuple(rows), tuple(e - (i << level) for e, (level, i) in zip(ends, nodes))
    )


def _runs(merges: list[Merge]) -> list[Level]:
    """The merges of one round as a few levels, each of which is one operation."""
    runs: list[Level] = []
    for to, distance in sorted((merge.target, merge.source - merge.target) for merge in merges):
        last = runs[-1] if runs else None
        if last is not None and distance == last.distance and last.number == 1:
            runs[-1] = Level(last.first, to - last.first, distance, 2)
        elif last is not None and distance == last.distance and to == last.first + last.number * last.stride:
            runs[-1] = last._replace(number=last.number + 1)
        else:
            runs.append(Level(to, 1, distance, 1))
    return runs


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
    growing, merges = Growing(leaves), []
    nodes = [node for rank in range(world_size) for node in cover(leaves, world_size, rank)]
    for place, node in enumerate(nodes):
        merges += growing.arrive(node, place)
    assert list(growing.places.values()) == [0], growing.places  # all leaves are in the root, at place 0
    return tuple(tuple(r) for r in _rounds(merges))


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
    # Rounds in order: a round adds what earlier rounds have made.
    for merges in rounds:
        if len(merges) == 1:
            rows[merges[0].target].add_(rows[merges[0].source])
        else:
            torch._foreach_add_([rows[m.target] for m in merges], [rows[m.source] for m in merges])
