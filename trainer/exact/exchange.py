"""The exchange: ranks swap nodes of the tree, and make the remaining additions in the tree's order.

Collectives only move bytes. An all-reduce would add in an order that the library chooses, so none is used. Addition is
elementwise, so cutting the flat gradient into shards changes no bit either.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from ..ranks.collectives import all_gather_flat
from .gradient_sum import GradientSum
from .plan import rank_block
from .record import RecordLayout, Records
from .tree import cover, exchange_program, run_rounds

# Up to this many received bytes, the ranks exchange whole nodes in one collective, and each rank adds all of them.
# Beyond it each rank adds one shard, in two collectives of less volume. The bits are the same either way.
# The limit was measured over gloo on one machine (tests/benchmarks/exchange.py).
DIRECT_LIMIT_BYTES = 6 << 20


def is_direct(leaves: int, world_size: int, node_size: int) -> bool:
    """Whether ranks exchange whole nodes, rather than shards of them.

    Args:
        leaves: M.
        world_size: W. Two ranks always exchange whole nodes: that is the same volume in one collective.
        node_size: floats of a node.
    """
    # The rank with the most nodes decides for all: every rank must choose the same collectives.
    most = max(len(cover(leaves, world_size, rank)) for rank in range(world_size))
    return world_size == 2 or most * node_size * 4 * world_size <= DIRECT_LIMIT_BYTES


class Exchange:
    """Finishes the gradient sum over all ranks, and hands every rank the records of all micro-batches.

    Args:
        gradient_sum: this rank's part of the sum. Its head begins with the records of the rank's block.
        layout: of the records.
        leaves: every M that a step may have.
        rank, world_size: this rank, and how many.
        staging: the device on which collectives run: the CPU for gloo. None stands for the gradient's own device.
    """

    def __init__(
        self,
        gradient_sum: GradientSum,
        layout: RecordLayout,
        *,
        leaves: Collection[int],
        rank: int,
        world_size: int,
        staging: torch.device | None = None,
    ) -> None:
        self._sum, self._layout = gradient_sum, layout
        self._rank, self._world_size = rank, world_size
        self._most_local = most_local(leaves, world_size)
        device = gradient_sum.storage.device
        self._all_records = torch.zeros(max(leaves), layout.size, device=device)
        self._staging = staging or device
        self._messages: dict[tuple[str, int], Tensor] = {}

    def __call__(self, leaves: int) -> Records:
        """Exchanges the ranks' nodes of a step of M micro-batches, and adds them.

        Afterwards `gradient` is the root of the tree on every rank. Collective: every rank.

        Returns:
            The records of all M micro-batches in order.
        """
        self._sum.finish()
        W = self._world_size
        if W == 1:
            received = self._sum.head[None]
        elif is_direct(leaves, W, self._sum.size):
            received = self._direct(leaves)
        else:
            received = self._by_shards(leaves)
        return Records(self._in_order(received[:, : len(self._sum.head)], leaves), self._layout)

    def _direct(self, leaves: int) -> Tensor:
        """Every rank gets all nodes, and makes all additions. Returns the ranks' heads and nodes, (W, length)."""
        W, head, size, nodes = self._world_size, len(self._sum.head), self._sum.size, self._sum.nodes
        counts = [len(cover(leaves, W, r)) for r in range(W)]
        most = max(counts)
        # Records and nodes lie side by side, so one contiguous piece is sent without a copy. Ranks with fewer nodes
        # send what else is in their buffers: pieces have one size, and `rows` leaves the surplus out.
        received = self._gather(self._sum.storage[: head + most * size])  # (W, head + most * size)
        by_rank = received[:, head:].view(W, most, size)
        # By rank, then position: the numbers that `exchange_program` uses.
        rows = [by_rank[r, k] for r, count in enumerate(counts) for k in range(count)]
        rounds = exchange_program(leaves, W)
        run_rounds(rounds[:-1], rows)
        if rounds:
            (last,) = rounds[-1]  # the addition that makes the root, written straight to where the optimizer reads it
            torch.add(rows[last.target], rows[last.source], out=nodes[0])
        else:
            nodes[0].copy_(rows[0])
        return received

    def _by_shards(self, leaves: int) -> Tensor:
        """Each rank gets one shard of all nodes and adds it, then the results are gathered. Returns (W, length).

        The returned rows begin with the ranks' heads, as those of `_direct` do.
        """
        W, head, nodes = self._world_size, self._sum.head, self._sum.nodes
        counts = [len(cover(leaves, W, r)) for r in range(W)]
        # The size of a node is a multiple of W, see `GradientSum`.
        shard, mine = self._sum.size // W, counts[self._rank]
        # (node, rank, shard) -> (rank, node, shard), because all that is sent to one rank must lie together.
        send = nodes[:mine].view(mine, W, shard).transpose(0, 1).contiguous().to(self._staging)
        rows = self._memory("rows", sum(counts) * shard).view(-1, shard)  # (all nodes of all ranks, shard)
        dist.all_to_all_single(
            rows.view(-1),
            send.view(-1),
            [count * shard for count in counts],
            [mine * shard] * W,
        )
        rows = rows.to(nodes.device)  # host to device, where gloo carries GPU tensors
        run_rounds(exchange_program(leaves, W), list(rows))
        # The records were not part of the first collective: they travel in the second, with the finished shard.
        owned = self._memory("owned", len(head) + shard)
        owned[: len(head)].copy_(head)
        owned[len(head) :].copy_(rows[0])
        received = self._gather(owned)
        nodes[0].view(W, shard).copy_(received[:, len(head) :])
        return received

    def _gather(self, piece: Tensor) -> Tensor:
        """(length,) of each rank -> (W, length)."""
        received = self._memory("received", self._world_size * piece.numel())
        all_gather_flat(received, piece.to(self._staging))
        return received.view(self._world_size, -1).to(self._sum.storage.device)

    def _memory(self, purpose: str, numel: int) -> Tensor:
        """Memory for messages, on the device where collectives run. It is made once and used in every step."""
        memory = self._messages.get((purpose, numel))
        if memory is None:
            memory = self._messages[purpose, numel] = torch.empty(numel, device=self._staging)
        return memory

    def _in_order(self, heads: Tensor, leaves: int) -> Tensor:
        """The ranks' heads, (W, head) -> the records, (M, layout.size), micro-batch after micro-batch."""
        W, most, size = self._world_size, self._most_local, self._layout.size
        records = self._all_records[:leaves]
        table = heads[:, : most * size].unflatten(1, (most, size))
        if leaves == W * most:  # every rank has the same number of micro-batches, so one copy is enough
            records.view(table.shape).copy_(table)
            return records
        for rank in range(W):
            block = rank_block(leaves, W, rank)
            records[block.start : block.stop].copy_(table[rank, : len(block)])
        return records


def most_local(leaves: Collection[int], world_size: int) -> int:
    """The largest number of micro-batches that a rank may have in a step."""
    return -(-max(leaves) // world_size)
