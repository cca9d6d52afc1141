"""What a micro-batch has of a pack's tensors."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.exact.packs.pieces import Pieces, trained
from trainer.exact.packs.tensors import NUMBERS, PARTED, SAME
from trainer.exact.packs.verdicts import RefusedError


class Named(NamedTuple):
    a: Any
    b: Any


def samples(pieces: Pieces, requires_grad: bool = False) -> Tensor:
    """Two samples a micro-batch: 0 and 1, 2 and 3, and so on."""
    return pieces.parted(torch.arange(2.0 * pieces.g).requires_grad_(requires_grad))


# Arguments are taken apart


def test_each_micro_batch_gets_its_part() -> None:
    pieces = Pieces(g=3)
    x, loss = samples(pieces), pieces.numbers(torch.tensor([5.0, 6.0, 7.0]))
    table = pieces.tensors.mark(torch.ones(6), SAME)
    for k in range(3):
        part = pieces.shares.part(([x, {"loss": loss}], (table, 6, "mean")), k)
        assert part[0][0].tolist() == [2.0 * k, 2.0 * k + 1]
        assert part[0][1]["loss"].tolist() == 5.0 + k
        assert part[1][0] is table and part[1][1:] == (6, "mean")


def test_a_tensor_that_is_given_twice_is_one_tensor() -> None:
    pieces = Pieces()
    x, other = samples(pieces), samples(pieces)
    part = pieces.shares.part((x, [x], other), 1)
    assert part[0] is part[1][0] and part[0] is not part[2]


class Flagged(OrderedDict[str, Any]):
    """A dictionary of a class of its own."""


@pytest.mark.parametrize("pack", [
    lambda x: [x, 3],
    lambda x: (x, 3),
    lambda x: {"x": x, "n": 3},
    lambda x: Flagged(x=x, n=3),
    lambda x: Named(x, 3),
    lambda x: ([(x,)], 3),
])  # fmt: skip
def test_what_one_micro_batch_has_keeps_its_form(pack: Any) -> None:
    pieces = Pieces()
    x = samples(pieces)
    own = pieces.shares.own(pack(x), 1)
    assert type(own) is type(pack(x))
    assert str(own) == str(pack(x[2:]))


SCALED: list[tuple[Any, set[int], Any]] = [
    # The places are those of `flat`: how many arguments there are, the arguments, the names, and what these name.
    (((8, 3), {}), {1}, ((2, 3), {})),
    (((8, 8), {}), {2}, ((8, 2), {})),
    (((), {"a": 8, "b": 4}), {4}, ((), {"a": 2, "b": 4})),
    (((), {"a": 8, "b": 4}), {5}, ((), {"a": 8, "b": 1})),
    ((([8, 4], 4), {}), {2, 4}, (([2, 4], 1), {})),
    (((slice(4, 8, 12), 16), {}), {1, 3}, ((slice(1, 8, 3), 16), {})),
    (((slice(4, 8, 12), 16), {}), {2, 4}, ((slice(4, 2, 12), 4), {})),
    ((({"n": 8}, 4), {"m": 4}), {3, 4}, (({"n": 2}, 1), {"m": 4})),
    ((({"n": 8}, 4), {"m": 4}), {7}, (({"n": 8}, 4), {"m": 1})),
]


@pytest.mark.parametrize(("given", "scaled", "own"), SCALED)
def test_numbers_of_all_samples_become_those_of_a_micro_batch(given: Any, scaled: set[int], own: Any) -> None:
    assert Pieces(g=4).shares.part(given, 0, frozenset(scaled)) == own


def test_tensors_are_taken_apart_beside_numbers_of_all_samples() -> None:
    pieces = Pieces(g=4)
    x = samples(pieces)
    args, kwargs = pieces.shares.part(((x, 8), {"x": x}), 3, frozenset({2}))
    assert args[0].tolist() == [6.0, 7.0] and args[1] == 2 and kwargs["x"] is args[0]


def test_a_slice_is_left_as_it_is_where_no_number_is_that_of_all_samples() -> None:
    place = slice(0, 4)
    assert Pieces().shares.part((place,), 0)[0] is place


def test_a_parameter_leaves_the_gradient_of_each_micro_batch() -> None:
    weight = trained(2)
    pieces = Pieces(weight)
    own = [pieces.shares.part((weight,), k)[0] for k in range(2)]
    assert own[0] is not weight and torch.equal(own[0], weight)
    (own[0].sum() * 3 + own[1].sum() * 4).backward()
    assert pieces.gradients() == {0: [[3.0, 3.0], [4.0, 4.0]]}
    assert weight.grad is None


def test_without_gradients_a_parameter_is_itself() -> None:
    weight = trained(2)
    pieces = Pieces(weight)
    with torch.no_grad():
        assert pieces.shares.own(weight, 0) is weight
    assert not pieces.leaves.is_expected(0)


def test_statistics_of_a_layer_are_those_of_the_micro_batch() -> None:
    norm = nn.BatchNorm1d(3)
    pieces = Pieces(model=norm)
    pieces.statistics.begin()
    for k in range(2):
        own = pieces.shares.own(norm.running_var, k)
        own.fill_(1.0 + k)
    assert pieces.statistics.rows_of(pieces.shares.scratch, 2)[:, 3:].tolist() == [[1.0] * 3, [2.0] * 3]
    rows = pieces.shares.scratch_of(norm.running_var)
    assert rows is not None and rows.tolist() == [[1.0] * 3, [2.0] * 3]
    assert pieces.shares.scratch_of(None) is None and pieces.shares.scratch_of(torch.ones(3)) is None


# One call uses a tensor: all micro-batches' parts come from one cut, whose gradients are joined


def test_the_parts_of_one_call_give_one_gradient() -> None:
    pieces = Pieces()
    x = samples(pieces, requires_grad=True)
    parts = [pieces.shares.own(x, k) for k in range(2)]
    assert parts[0].grad_fn is parts[1].grad_fn
    assert pieces.shares.own(x, 0) is parts[0]
    (parts[0].sum() + 3 * parts[1].sum()).backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 3.0, 3.0]
    pieces.shares.begin_call()
    assert pieces.shares.own(x, 0).grad_fn is not parts[0].grad_fn, "another call gives a gradient of its own"


def test_parts_without_a_gradient_are_no_copies_where_they_need_not_be() -> None:
    pieces = Pieces()
    x = pieces.parted(torch.ones(4, 16, requires_grad=True))
    with torch.no_grad():
        assert pieces.shares.own(x, 1).data_ptr() == x[2:].data_ptr()
    assert not pieces.shares.own(x.detach(), 1).requires_grad
    plain = pieces.parted(torch.ones(4, 16))
    assert pieces.shares.own(plain, 1).data_ptr() == plain[2:].data_ptr()
    own = pieces.shares.own(x, 1)
    assert own.requires_grad and own.data_ptr() != x[2:].data_ptr(), "it may be changed in place"


def test_a_tensor_that_was_changed_in_place_is_taken_apart_again() -> None:
    pieces = Pieces()
    x = samples(pieces)
    before = pieces.shares.own(x, 1)
    x.add_(10.0)
    assert pieces.shares.own(x, 0).tolist() == [10.0, 11.0]
    assert pieces.shares.own(x, 1).tolist() == [12.0, 13.0]
    assert pieces.shares.own(x, 1) is not before


def test_where_a_calls_graph_ends_is_named() -> None:
    """The first micro-batch's, of which all others are copies."""
    weight = trained(2)
    pieces = Pieces(weight)
    x, n = samples(pieces, requires_grad=True), pieces.numbers(torch.ones(2, requires_grad=True))
    parts = [pieces.shares.own(value, 0) for value in (x, n, weight)]
    named = [pieces.shares.ends[part.grad_fn] for part in parts]
    assert named == [pieces.tensors.named(x), pieces.tensors.named(n), ("parameter", 0)]
    pieces.shares.begin_call()
    assert pieces.shares.ends == {}
    pieces.shares.own(pieces.parted(torch.ones(4)), 0)
    assert pieces.shares.ends == {}, "it has no graph"


# Results are joined


def test_tensors_and_numbers_of_micro_batches_are_joined() -> None:
    pieces = Pieces()
    joined = pieces.shares.joined
    rows = joined([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])], "f")
    assert rows.tolist() == [1.0, 2.0, 3.0, 4.0] and pieces.tensors.kind(rows) == PARTED
    numbers = joined([torch.tensor(1.0), torch.tensor(2.0)], "f")
    assert numbers.tolist() == [1.0, 2.0] and pieces.tensors.kind(numbers) == NUMBERS
    assert joined([3, 3], "f") == 3 and joined([None, None], "f") is None


@pytest.mark.parametrize("pack", [
    lambda x: [x, 3],
    lambda x: (x, 3),
    lambda x: {"x": x, "n": 3},
    lambda x: Flagged(x=x, n=3),
    lambda x: Named(x, 3),
    lambda x: ([(x,)], 3),
])  # fmt: skip
def test_what_micro_batches_return_keeps_its_form(pack: Any) -> None:
    whole = Pieces(g=3).shares.joined([pack(torch.full((1,), float(k))) for k in range(3)], "f")
    assert type(whole) is type(pack(torch.zeros(1)))
    assert str(whole) == str(pack(torch.tensor([0.0, 1.0, 2.0])))


SHAPES, VALUES = "^f gives micro-batches different shapes$", "^f differs among micro-batches$"


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ([torch.ones(2), torch.ones(2), torch.ones(1)], SHAPES),
        ([torch.ones(2), torch.ones(1), torch.ones(2)], SHAPES),
        ([torch.ones(2), torch.ones(2), 1.0], SHAPES),
        ([[1], [1], [1, 1]], SHAPES),
        ([[1], [1, 1], [1]], SHAPES),
        ([1, 1, 2], VALUES),
        ([1, 2, 1], VALUES),
        ([2, 1, 1], VALUES),
    ],
)
def test_results_that_do_not_fit_one_another_are_refused_this_once(found: list[Any], why: str) -> None:
    """Other micro-batches may give results that do."""
    with pytest.raises(RefusedError, match=why) as caught:
        Pieces(g=3).shares.joined(found, "f")
    assert caught.value.once and not caught.value.untried


def test_the_gradient_of_what_was_joined_is_taken_apart() -> None:
    own = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    Pieces().shares.joined(own, "f").backward(torch.arange(4.0))
    assert [t.grad.tolist() for t in own if t.grad is not None] == [[0.0, 1.0], [2.0, 3.0]]


# Autocast: a parameter is cast once a forward, and the gradients of its uses are added in that type


@pytest.mark.parametrize(
    ("uses", "cached", "shared"),
    [
        ((True,), True, False),
        ((False,), True, False),
        ((False, False), True, False),
        ((True, True), True, True),
        ((False, True), True, True),
        ((True, False), True, True),
        ((False, False), False, True),
        ((False,), False, False),
        ((True, False, False), True, True),
        ((False, False, True), True, True),
    ],
)
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_parameter_is_cast_once_or_used_once(uses: tuple[bool, ...], cached: bool, shared: bool, place: int) -> None:
    """True stands for a use for one micro-batch at a time, False for a layer with a rule."""
    pieces = Pieces(trained(1), trained(1))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        for alone in uses:
            pieces.shares.note_low_use(place, alone)
    followed = place < 0  # what follows from a parameter is cast at each use, alone too
    assert pieces.leaves.shared == ({place} if shared and not followed else set())


def test_without_autocast_a_parameter_may_be_used_in_any_way() -> None:
    pieces = Pieces(trained(1))
    for _ in range(2):
        pieces.shares.note_low_use(0, alone=True)
    assert pieces.leaves.shared == set()


def test_all_micro_batches_together_are_one_use() -> None:
    weight = trained(1)
    pieces = Pieces(weight, g=3)
    with torch.autocast("cpu", torch.bfloat16):
        for k in range(3):
            pieces.shares.own(weight, k)
        assert pieces.leaves.shared == set()
        pieces.shares.note_low_use(0, alone=False)
    assert pieces.leaves.shared == {0}
