"""A rank's part of the gradient sum: its own micro-batches, added along the tree into flat buffers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .plan import rank_block
from .tree import Growing, Merge, buffers_needed

# 16 float32 are 64 bytes, the alignment of a fresh allocation on the CPU. Every tensor in a flat buffer starts at such
# a multiple: a math library may choose its kernel by alignment.
ALIGNMENT = 16


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is at least `value`."""
    return -(-value // multiple) * multiple


class GradientSum:
    """Adds the gradients of this rank's micro-batches, and holds the sum over all ranks in the end.

    In a step, call `start(M)`, then `add(j, gradients)` for each micro-batch of this rank's block, in any order, then
    `finish()`. Then `nodes` holds the nodes of the tree that cover the block. `exchange.Exchange` leaves the root in
    `nodes[0]`, which is `gradient`. All buffers are made once. Only another order than the block's may need more.

    Attributes:
        growing: the nodes that this rank has now, and their buffers.
        left: how many micro-batches of the block have not been added yet.
        starts: where each parameter's gradient begins in a node.
        numel: floats of the gradient, which is the same at every world size.
        size: floats of a node: the gradient, one count a parameter (see `unused`), and padding that depends on W.
        storage: (head_size + buffers x size,) float32: `head`, then `nodes`, so that both can be sent as one piece.
        head: (head_size,) memory in front of the nodes, for what is sent with them.
        nodes: (buffers, size).

    Args:
        shapes_of: the parameters whose gradients are added, in order; float32.
        leaves: every M that a step may have (a full global batch, and an epoch's last one).
        rank, world_size: this rank, and how many.
        head_size: floats of `head`.
    """

    def __init__(
        self, shapes_of: Sequence[Tensor], *, leaves: Collection[int], rank: int, world_size: int, head_size: int
    ) -> None:
        self._rank, self._world_size = rank, world_size
        offsets, size = [], 0
        for parameter in shapes_of:
            offsets.append(size)
            size = round_up(size + parameter.numel(), ALIGNMENT)
        self.numel, count = size, len(shapes_of)
        # Behind the gradient lies one number a parameter: the number of micro-batches in which it had no gradient.
        # The tree adds these numbers like everything else. Then comes padding, so that a node divides into W shards.
        # The padding depends on W, so it is not part of `gradient`.
        self.size = round_up(size + count, ALIGNMENT * world_size)
        # Enough for every M: an epoch's last, smaller batch can leave more nodes than a full one.
        buffers = max(buffers_needed(m, world_size, rank) for m in leaves)
        head_size = round_up(head_size, ALIGNMENT)
        self.storage = torch.zeros(head_size + buffers * self.size, device=shapes_of[0].device)
        self.head = self.storage[:head_size]
        self.nodes = self.storage[head_size:].view(buffers, self.size)
        self._rows = list(self.nodes.unbind())
        self._views = [[_view_like(p, node, o) for p, o in zip(shapes_of, offsets)] for node in self.nodes]
        self._missing = [node[size : size + count] for node in self.nodes]
        self._zeros: dict[int, Tensor] = {}
        self.growing = Growing(0)
        self._leaves = self.left = 0
        self._shapes_of, self.starts, self._count = list(shapes_of), offsets, count

    @property
    def gradient(self) -> Tensor:
        """The flat gradient after the exchange: (numel,) float32; the gaps between parameters stay 0.

        Its length is the same at every world size: a norm adds in an order that depends on the length.
        """
        return self.nodes[0, : self.numel]

    @property
    def gradient_views(self) -> list[Tensor]:
        """The same memory as one tensor a parameter, with the parameter's shape."""
        return self._views[0]

    def start(self, leaves: int) -> range:
        """Begins a step of M micro-batches. Returns this rank's block of them."""
        block = rank_block(leaves, self._world_size, self._rank)
        self.growing = Growing(leaves)
        self._leaves, self.left = leaves, len(block)
        return block

    def add(self, j: int, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Adds micro-batch j.

        Args:
            j: of the global batch.
            gradients: one tensor a parameter, in order; None for one that the micro-batch did not use.

        Returns:
            The gradients, with zeros in place of None.
        """
        # A leaf whose neighbour is here is added to that one's buffer at once, and needs none of its own.
        there = self.growing.neighbour((0, j))
        place = self.growing.free(1)[0] if there is None else there
        _, views, missing = self.buffer(place)
        if there is None:
            missing.zero_()  # it still holds counts of an earlier micro-batch
        present = [g if g is not None else self._note_missing(i, missing) for i, g in enumerate(gradients)]
        # One call for all parameters in both cases: on a GPU that is a few kernels instead of one a parameter.
        if there is None:
            torch._foreach_copy_(views, present)
            self.growing.arrive((0, j), place)
        else:
            torch._foreach_add_(views, present)  # the first merge, for all parameters in one call
            self.merge(self.growing.join((0, j), place))
        self.left -= 1
        return present

    def merge(self, merges: Sequence[Merge]) -> None:
        """Adds whole nodes: all parameters and their counts, in one operation each."""
        for merge in merges:
            self.buffer(merge.target)[0].add_(self.buffer(merge.source)[0])

    def note_added(self, count: int) -> None:
        """Notes that `count` micro-batches have been added in another way, see `packs.pack_sum`."""
        self.left -= count

    def finish(self) -> None:
        """Brings the nodes into `nodes`, in order. Call it when all micro-batches of the block have been added."""
        self._check_complete()
        for to, source in self.growing.in_order():
            self.buffer(to)[0].copy_(self.buffer(source)[0])

    def whole_nodes(self) -> list[Tensor]:
        """The nodes in order, wherever they lie: (size,) each. Call it when the whole block has been added."""
        self._check_complete()
        return [self.buffer(self.growing.places[node])[0] for node in self.growing.nodes()]

    def _check_complete(self) -> None:
        assert self.left == 0, f"{self.left} micro-batches are missing"

    def buffer(self, number: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """A buffer in three forms: whole, as one tensor a parameter, and its counts of missing gradients.

        Packs may need a few more buffers than `nodes` has. These are made when they are first used.
        """
        while number >= len(self._views):
            node = torch.zeros(self.size, device=self.storage.device)
            self._rows.append(node)
            self._views.append([_view_like(p, node, o) for p, o in zip(self._shapes_of, self.starts)])
            end = self.numel
            self._missing.append(node[end : end + self._count])
        return self._rows[number], self._views[number], self._missing[number]

    def _note_missing(self, parameter: int, missing: Tensor) -> Tensor:
        """Counts a missing gradient in a node's counts. Returns zeros to add in its place."""
        missing[parameter] += 1.0
        # Made once and kept: models that leave a parameter unused mostly do so in every step.
        zeros = self._zeros.get(parameter)
        if zeros is None:
            zeros = self._zeros[parameter] = torch.zeros_like(self._views[0][parameter])
        return zeros

    def unused(self) -> Tensor:
        """Which parameters no micro-batch of the step used: (parameters,) bool on the device. After the exchange."""
        return self._missing[0] == self._leaves  # counts in float32 are exact up to 2^24 micro-batches


def norm_of(gradients: list[Tensor]) -> Tensor:
    """The norm of a micro-batch's gradient, () float32.

    Square it on the host, in float64: in float32 the square of a small norm would become 0.
    """
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def _view_like(parameter: Tensor, flat: Tensor, offset: int) -> Tensor:
    """A piece of `flat` with the shape of `parameter`, and with its strides if they leave no gaps.

    A model in channels_last has such strides. Gradients of equal strides are added without a change of layout.
    """
    if parameter.is_contiguous() or not _is_dense(parameter):
        return flat[offset : offset + parameter.numel()].view(parameter.shape)
    return torch.as_strided(flat, parameter.shape, parameter.stride(), flat.storage_offset() + offset)


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill one piece of memory, in any order of its dimensions, without gaps or overlap."""
    sizes = sorted(zip(tensor.stride(), tensor.shape))
    expected = 1
    for stride, size in sizes:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
