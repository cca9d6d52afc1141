"""Which micro-batches share a pack."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from trainer.exact.micro_batches import GlobalBatch
from trainer.exact.packs.grouping import parts_of, shape_of
from trainer.exact.progress import Progress


def batch_of(samples: Sequence[int], longest: list[int] | None = None) -> GlobalBatch:
    """A global batch of micro-batches of so many samples, and of texts of these lengths."""
    ends = list(itertools.accumulate(samples))
    bounds = list(zip([0, *ends], ends))
    progress = Progress(step=0, epoch=0, total_steps=1)
    return GlobalBatch(progress, torch.arange(ends[-1]), bounds, float(ends[-1]), longest)


def parts(batch: GlobalBatch, block: range, size: int, anywhere: bool = True) -> list[list[int]]:
    """The parts of a block; not for ever."""
    return [list(part) for part in itertools.islice(parts_of(batch, block, size, anywhere), 40)]


def test_the_shape_of_a_micro_batch_is_its_samples_and_its_longest_text() -> None:
    assert [shape_of(batch_of([4, 4, 2]), j) for j in range(3)] == [(4, 0), (4, 0), (2, 0)]
    assert shape_of(batch_of([4, 2], longest=[7, 5]), 1) == (2, 5)


@pytest.mark.parametrize(
    ("block", "size", "expected"),
    [
        (range(8), 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (range(8), 3, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (range(8), 1, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (range(8), 16, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (range(3, 8), 4, [[3], [4, 5, 6, 7]]),
        (range(5, 7), 2, [[5], [6]]),
        (range(2, 4), 4, [[2, 3]]),
        (range(3, 3), 4, []),
    ],
)
@pytest.mark.parametrize("anywhere", [False, True])
def test_neighbours_share_a_pack_that_is_a_branch_of_the_tree(
    block: range, size: int, anywhere: bool, expected: list[list[int]]
) -> None:
    """So parts begin at multiples of the size, wherever a rank's block begins."""
    assert parts(batch_of([4] * 8), block, size, anywhere) == expected


@pytest.mark.parametrize("anywhere", [False, True])
def test_a_smaller_last_micro_batch_has_no_part_in_a_pack(anywhere: bool) -> None:
    assert parts(batch_of([4, 4, 4, 2]), range(4), 4, anywhere) == [[0, 1, 2], [3]]


@pytest.mark.parametrize(
    ("longest", "size", "expected"),
    [
        ([5, 6, 5, 6, 5, 5], 4, [[0, 2, 4, 5], [1, 3]]),
        ([5, 6, 5, 6, 5, 5], 2, [[0, 2], [4, 5], [1, 3]]),
        ([5, 6, 5, 6, 5], 4, [[0, 2], [4], [1, 3]]),
        ([5, 6, 5, 5, 5, 5, 5, 5], 8, [[0, 2, 3, 4], [5, 6], [7], [1]]),
        ([7, 5, 5, 5], 2, [[0], [1], [2, 3]]),
    ],
)
def test_texts_of_one_length_share_packs_of_powers_of_two(
    longest: list[int], size: int, expected: list[list[int]]
) -> None:
    """Each size has to be tried, so that there are few of them."""
    assert parts(batch_of([4] * len(longest), longest), range(len(longest)), size) == expected


def test_texts_that_are_no_neighbours_have_packs_of_their_own_if_gradients_cannot_wait() -> None:
    batch = batch_of([4] * 7, [5, 5, 6, 5, 6, 6, 5])
    assert parts(batch, range(7), 4, anywhere=False) == [[0, 1], [2], [3], [4, 5], [6]]
