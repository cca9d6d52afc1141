"""Which micro-batches of a rank's block share a pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..micro_batches import GlobalBatch


def shape_of(batch: GlobalBatch, j: int) -> tuple[int, int]:
    """Samples of micro-batch j and, for texts, the length of its longest; 0 for others."""
    begin, end = batch.bounds[j]
    return end - begin, batch.longest[j] if batch.longest is not None else 0


def parts_of(batch: GlobalBatch, block: range, size: int, anywhere: bool) -> Iterator[Sequence[int]]:
    """A rank's block in parts, each of which may be a pack.

    Args:
        batch: the global batch.
        block: this rank's micro-batches.
        size: micro-batches in a part, at most. All of a part have one shape.
        anywhere: whether they may lie anywhere in the block, so that gradients wait for their neighbours in the tree.
    """
    groups: list[list[int]] = []
    latest: dict[tuple[int, int], list[int]] = {}
    for j in block:
        shape = shape_of(batch, j)
        if shape not in latest or not (anywhere or latest[shape][-1] == j - 1):
            groups.append([])
            latest[shape] = groups[-1]
        latest[shape].append(j)
    for group in groups:
        yield from _chunks(group, size)


def _chunks(group: list[int], size: int) -> Iterator[list[int]]:
    """Micro-batches of one shape in parts.

    Neighbours are cut at multiples of the size, so that a part is a branch of the tree. Others are cut into powers of
    two, because each size has to be tried first.
    """
    neighbours, done = group[-1] - group[0] == len(group) - 1, 0
    while done < len(group):
        power = 1 << ((len(group) - done).bit_length() - 1)
        count = size - group[done] % size if neighbours else min(size, power)
        yield group[done : done + count]
        done += count
