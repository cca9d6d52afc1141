"""The gradient sum: one fixed binary tree over the micro-batches, whatever rank computes which.

Floating-point addition is not associative, so "sum the gradients" means nothing exact until an order
is fixed. Ours is a binary tree over the M micro-batches of a global batch: neighbours are added in
pairs, level by level, an odd one out moves up unchanged. A rank adds what it can of its own block as a
binary counter does, which leaves it with the few nodes of the tree that cover the block (exactly one
where M and the number of ranks are powers of two). The ranks then exchange nodes, and the additions
that are left are made in the same tree. Collectives only move bytes, so no library's order matters.

Addition is elementwise: how the flat gradient is cut into shards changes no bit either.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from .batching import rank_block
from .distributed import all_gather_flat

Node = tuple[int, int]  # (level, index): covers the leaves [index 2^level, (index + 1) 2^level), cut off at M

# 16 float32 are 64 bytes: every tensor in a flat buffer starts where a fresh allocation would, so that
# no kernel can be chosen by alignment.
ALIGNMENT = 16

# Up to this many received bytes the ranks exchange whole nodes in one collective and each adds all of
# them; beyond it each rank adds one shard, in two collectives of less volume. The same bits either way.
# Two ranks always exchange whole nodes: that is the same volume in one collective.
# Measured over gloo on one machine (tests/benchmarks/exchange.py).
DIRECT_LIMIT_BYTES = 6 << 20


@dataclass(frozen=True)
class Merge:
    """Adding the node in `source` to the node in `target`, in place; positions in a list of nodes."""

    target: int
    source: int


def _settle(stack: list[tuple[Node, int]], leaves: int, merges: list[Merge]) -> None:
    """Adds and lifts the top of a stack of (node, position) as far as its neighbours allow."""
    while True:
        (level, index), position = stack[-1]
        last = (leaves - 1) >> level  # index of the last node of this level
        if last == 0:
            return
        if index % 2 == 1 and len(stack) > 1 and stack[-2][0] == (level, index - 1):
            target = stack[-2][1]
            merges.append(Merge(target, position))
            del stack[-2:]
            stack.append(((level + 1, index // 2), target))
        elif index % 2 == 0 and index == last:
            stack[-1] = ((level + 1, index // 2), position)
        else:
            return


@cache
def local_program(leaves: int, begin: int, stop: int) -> tuple[tuple[tuple[Merge, ...], ...], tuple[Node, ...]]:
    """How a rank adds its block of leaves: pure arithmetic, made once and followed in every step.

    Args:
        leaves: M, micro-batches of the global batch.
        begin, stop: the rank's block of them.

    Returns:
        Per leaf, the merges that follow its arrival (positions in a stack of buffers: a new leaf
        takes the first free one, so its first merge is always with the position below), and the
        nodes that are left at positions 0, 1, ...
    """
    stack: list[tuple[Node, int]] = []
    program = []
    for leaf in range(begin, stop):
        merges: list[Merge] = []
        stack.append(((0, leaf), len(stack)))
        _settle(stack, leaves, merges)
        program.append(tuple(merges))
    return tuple(program), tuple(node for node, _ in stack)


@cache
def cover(leaves: int, world_size: int, rank: int) -> tuple[Node, ...]:
    """The nodes of the tree that a rank has after adding its own block."""
    block = rank_block(leaves, world_size, rank)
    return local_program(leaves, block.start, block.stop)[1]


@cache
def exchange_program(leaves: int, world_size: int) -> tuple[tuple[Merge, ...], ...]:
    """The additions over all ranks' nodes (numbered by rank, then position), in rounds of independent ones.

    The root of the tree ends at node 0.
    """
    stack: list[tuple[Node, int]] = []
    merges: list[Merge] = []
    position = 0
    for rank in range(world_size):
        for node in cover(leaves, world_size, rank):
            stack.append((node, position))
            _settle(stack, leaves, merges)
            position += 1
    assert len(stack) == 1 and stack[0][1] == 0, stack
    ready: dict[int, int] = {}
    rounds: list[list[Merge]] = []
    for merge in merges:
        turn = max(ready.get(merge.target, 0), ready.get(merge.source, 0))
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(merge)
        ready[merge.target] = turn + 1
    return tuple(tuple(r) for r in rounds)


def _positions(leaves: int, world_size: int, rank: int) -> int:
    """Buffers this rank needs: for its own counter, and for the most nodes that any rank sends."""
    block = rank_block(leaves, world_size, rank)
    depth = peak = 0
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


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class TreeSum:
    """Adds the gradients of micro-batches over all ranks, and carries a few numbers of each along.

    One step: `start(M)`; for each micro-batch of this rank's block, in order, `add(...)`; then `reduce()`
    (collective: every rank). All buffers are made once.

    Args:
        shapes_of: the parameters whose gradients are added, in order; float32.
        leaves: every M that a step may have (a full global batch, and an epoch's last one).
        statistics_size: floats that each micro-batch hands to all ranks besides its loss.
        norms: measure the norm of each micro-batch's gradient, and hand it to all ranks, too.
        rank, world_size: this rank, and how many.
        staging: the device on which collectives run; the CPU where gloo has to carry GPU tensors.
    """

    def __init__(
        self,
        shapes_of: Sequence[Tensor],
        *,
        leaves: Collection[int],
        statistics_size: int,
        norms: bool = False,
        rank: int,
        world_size: int,
        staging: torch.device | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        # Its loss, its statistics, its norm if asked for, and whether its rank asks all others for something (see
        # `raise_flag`).
        self.record_size = record_size = 1 + statistics_size + norms + 1
        self._statistics_stop = 1 + statistics_size
        device = shapes_of[0].device
        offsets, size = [], 0
        for parameter in shapes_of:
            offsets.append(size)
            size = _round_up(size + parameter.numel(), ALIGNMENT)
        self.numel, self._parameters = size, len(shapes_of)
        # Behind the gradient lies one number a parameter: in how many micro-batches it had no gradient. The
        # tree adds these up like everything else. What is exchanged divides into shards; how much padding
        # that takes depends on W, so neither is part of `gradient`.
        self.size = _round_up(size + self._parameters, ALIGNMENT * world_size)
        self.shard = self.size // world_size
        max_leaves = max(leaves)
        self._most_local = -(-max_leaves // world_size)
        self.records_size = _round_up(self._most_local * record_size, ALIGNMENT)
        positions = max(_positions(m, world_size, rank) for m in leaves)
        # One allocation, records first: whatever nodes a rank ends with lie next to its records, so the
        # direct exchange sends one contiguous piece and copies nothing.
        self._storage = torch.zeros(self.records_size + positions * self.size, device=device)
        self._nodes = self._storage[self.records_size :].view(positions, self.size)
        self._views = [[_view_like(p, node, o) for p, o in zip(shapes_of, offsets)] for node in self._nodes]
        self._missing = [node[size : size + self._parameters] for node in self._nodes]
        self._zeros: dict[int, Tensor] = {}
        self._records = self._storage[: self._most_local * record_size].view(self._most_local, record_size)
        # Made once: indexing costs more than the copy it is for.
        self._loss_cells = [row[0] for row in self._records]
        self._statistics_rows = [row[1 : self._statistics_stop] for row in self._records]
        self._norm_cells = [row[-2] for row in self._records] if norms else None
        self._gathered_records = torch.zeros(max_leaves, record_size, device=device)
        self._norms = self._flags = self._gathered_records[:0, 0]
        self._staging = staging or device
        self._messages: dict[tuple[str, int], Tensor] = {}
        self._program: tuple[tuple[Merge, ...], ...] = ()
        self._leaves = self._leaf = self._top = 0

    @property
    def gradient(self) -> Tensor:
        """The flat gradient after `reduce`: (numel,) float32; what lies between parameters stays 0.

        As long at every world size: a norm adds in an order that depends on the length.
        """
        return self._nodes[0, : self.numel]

    @property
    def gradient_views(self) -> list[Tensor]:
        """The same memory as one tensor a parameter, with the parameter's shape."""
        return self._views[0]

    def start(self, leaves: int) -> range:
        """Begins a step of M micro-batches. Returns this rank's block of them."""
        block = rank_block(leaves, self.world_size, self.rank)
        self._program = local_program(leaves, block.start, block.stop)[0]
        self._leaves, self._leaf, self._top = leaves, 0, 0
        return block

    @property
    def statistics(self) -> Tensor:
        """Where the next micro-batch's statistics go: (statistics_size,) float32. Fill it before `add`."""
        return self._statistics_rows[self._leaf]

    def raise_flag(self) -> None:
        """From the next step on, this rank's micro-batches carry a flag, which all ranks then see in the same step."""
        self._records[:, -1] = 1.0

    @property
    def flags(self) -> Tensor:
        """After `reduce`: (M,) float32, 1 for each micro-batch whose rank has raised its flag."""
        return self._flags

    @property
    def norms(self) -> Tensor:
        """After `reduce`: (M,) float32, the norm of each micro-batch's gradient, where they are measured."""
        return self._norms

    def add(self, gradients: Sequence[Tensor | None], loss: Tensor) -> None:
        """Adds the next micro-batch.

        Args:
            gradients: one tensor a parameter, in order; None for one that the micro-batch did not use.
            loss: () its summed loss.
        """
        self._loss_cells[self._leaf].copy_(loss.detach())
        merges = self._program[self._leaf]
        # A right-hand leaf goes straight into its left neighbour's buffer.
        position = self._top - 1 if merges else self._top
        if not merges:
            self._missing[position].zero_()  # of the step before
        present = [g if g is not None else self._note_missing(i, position) for i, g in enumerate(gradients)]
        if self._norm_cells is not None:
            # The norm, to be squared on the host: in float32 the square of a small one would vanish.
            self._norm_cells[self._leaf].copy_(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present))))
        if merges:
            torch._foreach_add_(self._views[position], present)
            for merge in merges[1:]:
                self._nodes[merge.target].add_(self._nodes[merge.source])
        else:
            torch._foreach_copy_(self._views[position], present)
        self._top += 1 - len(merges)
        self._leaf += 1

    def _note_missing(self, parameter: int, position: int) -> Tensor:
        """Counts a missing gradient in a node, and returns zeros to add in its place."""
        self._missing[position][parameter] += 1.0
        zeros = self._zeros.get(parameter)
        if zeros is None:
            zeros = self._zeros[parameter] = torch.zeros_like(self._views[0][parameter])
        return zeros

    def without_gradient(self) -> Tensor:
        """After `reduce`: which parameters no micro-batch of the step used, (parameters,) bool on the device."""
        return self._missing[0] == self._leaves

    def reduce(self) -> Tensor:
        """Finishes the sum: `gradient` then holds the root of the tree on every rank.

        Collective: every rank.

        Returns:
            (M, 1 + statistics_size) float32: each micro-batch's loss and statistics, in order.
        """
        M, W = self._leaves, self.world_size
        assert self._leaf == len(self._program), (self._leaf, len(self._program))
        if W == 1:
            records = self._gathered_records[:M]
            records.copy_(self._records[:M])
            return self._taken_apart(records)
        counts = [len(cover(M, W, r)) for r in range(W)]
        most = max(counts)
        if W == 2 or most * self.size * 4 * W <= DIRECT_LIMIT_BYTES:
            received = self._exchange_directly(counts, most)
        else:
            received = self._exchange_shards(counts)
        return self._taken_apart(self._in_order(received[:, : self.records_size], M))

    def _taken_apart(self, records: Tensor) -> Tensor:
        self._norms, self._flags = records[:, -2], records[:, -1]  # without norms, nobody looks at the first
        return records[:, : self._statistics_stop]

    def _exchange_directly(self, counts: list[int], most: int) -> Tensor:
        length = self.records_size + most * self.size
        received = self._gather(self._storage[:length])
        nodes = received[:, self.records_size :].view(self.world_size, most, self.size)
        rows = [nodes[r, k] for r, count in enumerate(counts) for k in range(count)]
        rounds = exchange_program(self._leaves, self.world_size)
        run_rounds(rounds[:-1], rows)
        if rounds:
            (last,) = rounds[-1]
            torch.add(rows[last.target], rows[last.source], out=self._nodes[0])
        else:
            self._nodes[0].copy_(rows[0])
        return received

    def _exchange_shards(self, counts: list[int]) -> Tensor:
        W, shard, mine = self.world_size, self.shard, counts[self.rank]
        # (node, rank, shard) -> (rank, node, shard): what goes to one rank lies together.
        send = self._nodes[:mine].view(mine, W, shard).transpose(0, 1).contiguous().to(self._staging)
        rows = self._memory("rows", sum(counts) * shard).view(-1, shard)
        dist.all_to_all_single(
            rows.view(-1),
            send.view(-1),
            [count * shard for count in counts],
            [mine * shard] * W,
        )
        rows = rows.to(self._storage.device)
        run_rounds(exchange_program(self._leaves, W), list(rows))
        owned = self._memory("owned", self.records_size + shard)
        owned[: self.records_size].copy_(self._storage[: self.records_size])
        owned[self.records_size :].copy_(rows[0])
        received = self._gather(owned)
        self._nodes[0].view(W, shard).copy_(received[:, self.records_size :])
        return received

    def _gather(self, piece: Tensor) -> Tensor:
        """(length,) of each rank -> (W, length)."""
        received = self._memory("received", self.world_size * piece.numel())
        all_gather_flat(received, piece.to(self._staging))
        return received.view(self.world_size, -1).to(self._storage.device)

    def _memory(self, purpose: str, numel: int) -> Tensor:
        """Memory for messages, where collectives run; the same at every step."""
        memory = self._messages.get((purpose, numel))
        if memory is None:
            memory = self._messages[purpose, numel] = torch.empty(numel, device=self._staging)
        return memory

    def _in_order(self, received: Tensor, leaves: int) -> Tensor:
        """(W, records_size) -> (M, record_size), micro-batch after micro-batch."""
        records = self._gathered_records[:leaves]
        table = received[:, : self._most_local * self.record_size].unflatten(1, (self._most_local, self.record_size))
        if leaves == self.world_size * self._most_local:
            records.view(table.shape).copy_(table)
            return records
        for rank in range(self.world_size):
            block = rank_block(leaves, self.world_size, rank)
            records[block.start : block.stop].copy_(table[rank, : len(block)])
        return records


def _view_like(parameter: Tensor, flat: Tensor, offset: int) -> Tensor:
    """A piece of `flat` with the shape of `parameter`, and with its strides where they fill it densely."""
    if parameter.is_contiguous() or not _is_dense(parameter):
        return flat[offset : offset + parameter.numel()].view(parameter.shape)
    return torch.as_strided(flat, parameter.shape, parameter.stride(), flat.storage_offset() + offset)


def _is_dense(tensor: Tensor) -> bool:
    sizes = sorted(zip(tensor.stride(), tensor.shape))
    expected = 1
    for stride, size in sizes:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
