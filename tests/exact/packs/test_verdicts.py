"""What a trial of a pack finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.exact.checks.hashes import hash64
from trainer.exact.packs.verdicts import HashedSums, Packed, Single, difference, out_of_memory, told

OWNERS = {0: ["head"]}


def found(losses: Tensor, statistics: Tensor, rows: Tensor | None) -> tuple[list[Single], Packed, HashedSums]:
    """Two micro-batches with losses 1 and 2, statistics (3,), (4,) and gradients (5,), (6,); and a pack."""
    singles = [
        Single(
            hash64([torch.tensor(1.0 + k)]),
            hash64([torch.tensor([3.0 + k])]),
            [hash64([torch.tensor([5.0 + k])])],
            False,
        )
        for k in range(2)
    ]
    sums = HashedSums(2)
    if rows is not None:
        sums.take(0, rows, None)
    return singles, Packed(losses, statistics), sums


LOSSES, STATISTICS, ROWS = torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0], [6.0]])


@pytest.mark.parametrize(
    ("losses", "statistics", "rows", "words"),
    [
        (LOSSES, STATISTICS, ROWS, None),
        (LOSSES + 1, STATISTICS, ROWS, "another loss in packs of 2"),
        (LOSSES, STATISTICS.flip(0), ROWS, "other statistics in packs of 2"),
        (LOSSES, STATISTICS, ROWS.flip(0), "other gradients in packs of 2, first of head"),
        (LOSSES, STATISTICS, None, "other gradients in packs of 2, first of head"),
    ],
)
def test_the_first_difference_is_named(
    losses: Tensor, statistics: Tensor, rows: Tensor | None, words: str | None
) -> None:
    assert difference(*found(losses, statistics, rows), OWNERS) == words


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError("can't allocate memory: 9")]
)
def test_errors_of_too_little_memory(error: Exception) -> None:
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("shapes"))


def test_an_error_of_a_forward_is_told_with_its_innermost_module() -> None:
    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(8, -1)

    model = nn.ModuleDict({"body": nn.Identity(), "head": nn.Sequential(Head())})
    with pytest.raises(RuntimeError) as caught:
        model["head"](torch.zeros(3, 3))
    assert told(caught.value, model).startswith("RuntimeError in head.0 (Head): shape '[8, -1]' is invalid")
    assert told(ValueError(), model) == "ValueError: without a message"
