"""What follows from trained parameters alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.exact.packs.pieces import Pieces, trained
from trainer.exact.packs.layers import Site
from trainer.exact.packs.rules import EMBEDDING
from trainer.exact.packs.tensors import SAME
from trainer.exact.packs.verdicts import RefusedError


def three() -> tuple[Pieces, list[Tensor]]:
    """Three parameters of two numbers each, and twice the first, three times the second, four times the third."""
    pieces = Pieces(trained(2), trained(2), trained(2))
    followed = [pieces.derived.call(torch.mul, (p, 2.0 + i), {}, {i}) for i, p in enumerate(pieces.parameters)]
    return pieces, followed


def test_what_follows_is_a_leaf_to_which_the_backward_leads() -> None:
    pieces, followed = three()
    assert [f.tolist() for f in followed] == [[2.0, 4.0], [3.0, 6.0], [4.0, 8.0]]
    assert all(a is b for a, b in zip(pieces.derived.inputs, followed, strict=True))
    assert all(f.is_leaf and f.requires_grad for f in followed)
    assert [pieces.tensors.place(f) for f in followed] == [-1, -2, -3]
    pieces.derived.close()
    assert pieces.derived.inputs == []


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_are_passed_on_through_all_that_lies_between(which: int) -> None:
    pieces, followed = three()
    squared = pieces.derived.call(torch.square, (), {"input": followed[which]}, {-1 - which})
    assert squared.tolist() == [(2.0 + which) ** 2, 4 * (2.0 + which) ** 2]
    for k in range(2):
        pieces.leaves.put_one(-4, k, torch.tensor([1.0, 10.0 * k]))
    pieces.derived.pass_on(pieces.parameters)
    factor = 2 * (2.0 + which) ** 2  # of c² p², the derivative is 2 c² p
    assert pieces.gradients() == {which: [[factor, 0.0], [factor, 10 * factor * 2]]}
    assert pieces.derived.pairs[3].roots == {which}


def test_what_follows_from_two_parameters_passes_its_gradients_on_to_both() -> None:
    pieces, followed = three()
    product = pieces.derived.call(torch.mul, (followed[0], pieces.parameters[2]), {}, {-1, 2})
    assert pieces.derived.pairs[3].roots == {0, 2}
    pieces.leaves.put(-4, torch.ones(2, 2))
    pieces.derived.pass_on(pieces.parameters)
    assert product.tolist() == [2.0, 8.0]
    assert pieces.gradients() == {0: [[2.0, 4.0]] * 2, 2: [[2.0, 4.0]] * 2}


def test_micro_batches_without_a_gradient_pass_none_on() -> None:
    pieces, _ = three()
    pieces.leaves.put_one(-2, 1, torch.ones(2))
    pieces.derived.pass_on(pieces.parameters)
    assert pieces.gradients() == {1: [None, [3.0, 3.0]]}


def test_parameters_from_which_something_follows_wait_for_the_end() -> None:
    pieces, _ = three()
    pieces.leaves.expect(0)
    assert pieces.leaves.shared == {0}, "it gets gradients both now and in the end"


def test_what_needs_no_gradient_is_as_torch_gives_it() -> None:
    weight = trained(2)
    pieces = Pieces(weight)
    call = pieces.derived.call
    assert call(Tensor.size, (weight,), {}, {0}) == (2,)
    assert call(Tensor.numel, (weight,), {}, {0}) == 2
    assert call(Tensor.detach, (weight,), {}, {0}).tolist() == [1.0, 2.0]
    assert pieces.derived.pairs == []
    pieces.leaves.expect(0)
    assert pieces.leaves.shared == set(), "nothing follows from it"


@pytest.mark.parametrize("kind", [list, tuple])
def test_results_in_a_list_follow_one_by_one(kind: Any) -> None:
    pieces = Pieces(trained(4))
    halves = pieces.derived.call(lambda w: kind([7, *w.split(2)]), pieces.parameters, {}, {0})
    assert type(halves) is kind and halves[0] == 7
    assert [pieces.tensors.place(half) for half in halves[1:]] == [-1, -2]
    biggest = pieces.derived.call(torch.max, (pieces.parameters[0], 0), {}, {0})
    assert pieces.tensors.place(biggest.values) == -3
    assert int(biggest.indices) == 3 and pieces.tensors.place(biggest.indices) is None


def test_a_call_that_gives_back_its_argument_makes_nothing_new() -> None:
    pieces, followed = three()
    assert pieces.derived.call(Tensor.to, (followed[1], torch.float32), {}, {-2}) is followed[1]
    assert len(pieces.derived.pairs) == 3


def test_what_is_changed_in_place_follows_anew() -> None:
    pieces, followed = three()
    changed = pieces.derived.call(Tensor.mul_, (followed[1], 10.0), {}, {-2})
    assert changed is not followed[1] and changed.tolist() == [30.0, 60.0]
    assert pieces.tensors.place(changed) == -4


@pytest.mark.parametrize("kwargs", [False, True])
def test_a_function_of_parameters_and_of_what_samples_gave_is_refused(kwargs: bool) -> None:
    """No micro-batch has a part of such a tensor, but its graph leads to samples."""
    pieces, _ = three()
    other = pieces.tensors.mark(torch.ones(2, requires_grad=True), SAME)
    args = ((pieces.parameters[0],), {"other": other}) if kwargs else ((pieces.parameters[0], other), {})
    with pytest.raises(RefusedError, match=r"^mul with parameters$") as caught:
        pieces.derived.call(torch.mul, *args, {0, 1, -1})
    assert caught.value.parameters == (0, 1)


def test_numbers_that_are_not_trained_may_be_among_the_arguments() -> None:
    pieces, followed = three()
    summed = pieces.derived.call(torch.stack, ([followed[0], torch.ones(2)],), {}, {-1})
    assert summed.tolist() == [[2.0, 4.0], [1.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_only_types_that_are_compared_may_follow(dtype: torch.dtype) -> None:
    pieces = Pieces(trained(2))
    args = (pieces.parameters[0], dtype)
    if dtype == torch.float64:
        with pytest.raises(RefusedError, match=r"^what follows from parameters alone is torch\.float64$"):
            pieces.derived.call(Tensor.to, args, {}, {0})
    else:
        assert pieces.derived.call(Tensor.to, args, {}, {0}).dtype == dtype


@pytest.mark.parametrize(("met", "several"), [((-1, -2), ()), ((-1, -4), (0,)), ((-4,), ()), ((-2, -4), ())])
def test_samples_may_meet_one_thing_that_follows_from_a_parameter(
    met: tuple[int, ...], several: tuple[int, ...]
) -> None:
    pieces, _ = three()
    pieces.derived.call(torch.exp, (pieces.parameters[0],), {}, {0})
    for place in met:
        pieces.leaves.expect(place)
        pieces.leaves.expect(place)  # as often as they like
    assert pieces.derived.used_several_times() == several


def test_three_things_that_follow_from_a_parameter_are_too_many() -> None:
    pieces = Pieces(trained(2))
    for _ in range(3):
        pieces.derived.call(torch.exp, pieces.parameters, {}, {0})
        pieces.leaves.expect(-len(pieces.derived.pairs))
    assert pieces.derived.used_several_times() == (0,)


# Tables that all samples share


def looked_up() -> tuple[Pieces, list[int]]:
    """A row of ones, and row 1 of a table, for two micro-batches; how many gradients were made in one call."""
    table, made = trained(3, 2), list[int]()
    pieces = Pieces(trained(1), table)
    backward = EMBEDDING[0].backward

    def counted(site: Site, rows: Tensor, *rest: Any) -> Any:
        made.append(len(rows))
        return backward(site, rows, *rest)

    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return F.embedding(x, w)

    options = {"padding_idx": None, "scale_grad_by_freq": False}
    rule = EMBEDDING[0]._replace(backward=counted)
    site = Site(pieces.sites, rule, call, ("embedding",), 1, None, **options)
    found = pieces.derived.looked_up(torch.tensor([1, 1]), table, site)
    assert found.tolist() == [[3.0, 4.0], [3.0, 4.0]]
    return pieces, made


GRADIENT = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
SUMS = [0.0, 0.0, 11.0, 22.0, 0.0, 0.0]  # of both lookups, in row 1


def test_a_table_gets_the_gradients_of_all_micro_batches_in_one_call() -> None:
    pieces, made = looked_up()
    pieces.leaves.put(-1, torch.stack([GRADIENT, -GRADIENT]))
    pieces.derived.pass_on(pieces.parameters)
    assert made == [2]
    assert pieces.gradients() == {1: [SUMS, [-s for s in SUMS]]}


def test_a_micro_batch_without_a_gradient_of_a_table_is_left_out() -> None:
    pieces, made = looked_up()
    pieces.leaves.put_one(-1, 0, GRADIENT)
    pieces.derived.pass_on(pieces.parameters)
    assert made == [] and pieces.gradients() == {1: [SUMS, None]}


def test_rows_of_a_table_that_were_changed_in_place_pass_on_what_autograd_knows() -> None:
    """The one call would give the gradient of the rows as they were looked up."""
    pieces, made = looked_up()
    (row,) = pieces.derived.inputs
    changed = pieces.derived.call(Tensor.mul_, (row, 3.0), {}, {-1})
    pieces.leaves.put(-1, torch.stack([GRADIENT, GRADIENT]))
    pieces.derived.pass_on(pieces.parameters)
    assert changed.tolist() == [[9.0, 12.0], [9.0, 12.0]]
    assert made == [] and pieces.gradients() == {1: [[3 * s for s in SUMS]] * 2}
