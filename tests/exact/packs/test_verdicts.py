"""What a trial of a pack finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.exact.checks.hashes import hash64
from trainer.exact.packs.verdicts import HashedSums, Packed, RefusedError, Single, difference, out_of_memory, told

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


ONE = torch.ones(1)


def of_gradients(single: list[Tensor | None], packed: dict[int, Tensor], **present: list[bool]) -> str | None:
    """The difference for a pack of one micro-batch without statistics: its gradients alone, and in the pack."""
    loss = torch.tensor([1.0])
    alone = Single(hash64([loss[0]]), None, [None if g is None else hash64([g]) for g in single], False)
    sums = HashedSums(1)
    for place, gradient in packed.items():
        sums.take(place, gradient[None], present.get("present"))
    return difference([alone], Packed(loss, torch.empty(1, 0)), sums, {0: ["", "tied"], 1: ["head.0", "tied"]})


@pytest.mark.parametrize(
    ("single", "packed", "first"),
    [
        ([ONE, ONE], {0: ONE, 1: ONE}, None),
        ([None, ONE], {1: ONE}, None),
        ([None, None], {}, None),
        ([ONE, ONE], {0: ONE, 1: -ONE}, "head.0"),
        ([ONE, ONE], {0: -ONE, 1: -ONE}, "the model"),
        ([ONE, ONE], {0: ONE}, "head.0"),
        ([ONE, None], {0: ONE, 1: ONE}, "head.0"),
        ([ONE, ONE, ONE], {0: ONE, 1: ONE, 2: -ONE}, "?"),
    ],
)
def test_the_first_gradient_that_differs_is_named_by_its_module(
    single: list[Tensor | None], packed: dict[int, Tensor], first: str | None
) -> None:
    expected = None if first is None else f"other gradients in packs of 1, first of {first}"
    assert of_gradients(single, packed) == expected


def test_a_row_of_a_micro_batch_that_does_not_use_a_parameter_has_no_meaning() -> None:
    assert of_gradients([None], {0: ONE}, present=[False]) is None
    assert of_gradients([ONE], {0: ONE}, present=[True]) is None
    assert of_gradients([ONE], {0: ONE}, present=[False]) == "other gradients in packs of 1, first of the model"


def test_a_refusal_is_for_good_unless_it_is_said_otherwise() -> None:
    for error in (RefusedError("no", [2, 3]), RefusedError("no", once=True), RefusedError("no", untried=True)):
        assert str(error) == "no"
    told = [(e.parameters, e.once, e.untried) for e in (RefusedError("no", [2, 3]), RefusedError("no", once=True))]
    assert told == [((2, 3), False, False), ((), True, False)]
    untried = RefusedError("no", untried=True)
    assert untried.once and untried.untried, "the next pack is compared first"


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
    assert told(ValueError("one\ntwo"), model) == "ValueError: one"


class Calls(nn.Module):
    """Calls what torch does not know as a part of it, and raises an error."""

    def __init__(self, *others: Any) -> None:
        super().__init__()
        self.others = others  # in a tuple, where torch does not look for modules

    def forward(self, x: Tensor) -> Tensor:
        for other in self.others:
            x = other(x)
        raise ValueError("odd")


class Plain:
    """No module."""

    def __call__(self, x: Tensor) -> Tensor:
        raise ValueError("plain")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(Calls()), "ValueError in 0 (Calls): odd"),
        (nn.Sequential(Calls(Plain())), "ValueError in 0 (Calls): plain"),
        (nn.Sequential(Calls(Calls())), "ValueError in 0 (Calls): odd"),
        (Calls(), "ValueError: odd"),
    ],
    ids=["a module", "a function", "a module of nobody's", "the model itself"],
)
def test_the_innermost_module_of_the_model_is_told(model: nn.Module, expected: str) -> None:
    with pytest.raises(ValueError, match=r"odd|plain") as caught:
        model(torch.zeros(1))
    assert told(caught.value, model) == expected
