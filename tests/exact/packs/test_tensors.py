"""What a tensor is to a pack."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.packs.tensors import NUMBERS, PARTED, SAME, Tensors

X, WEIGHT, BUFFER = torch.zeros(4, 3), torch.zeros(3), torch.zeros(2)


@pytest.fixture
def tensors() -> Tensors:
    """Of a pack with the samples X, the parameter WEIGHT at place 4, and the constant BUFFER."""
    return Tensors({id(WEIGHT): 4}, frozenset([id(BUFFER)]), {"x": X})


@pytest.mark.parametrize("kind", [PARTED, NUMBERS, SAME])
def test_the_kind_of_a_tensor_is_that_of_what_made_it(kind: int, tensors: Tensors) -> None:
    for tensor in (tensors.mark(torch.zeros(4), kind), tensors.as_part(torch.zeros(4), kind)):
        assert tensors.kind(tensor) == kind
        assert tensors.has_part(tensor) == (kind == PARTED)
        assert tensors.has_parts([tensor]) == (kind in (PARTED, NUMBERS))


def test_kinds_can_be_told_apart_where_several_are_added_up() -> None:
    assert len({a | b for a in (0, PARTED) for b in (0, NUMBERS)} | {SAME}) == 5


def test_samples_have_parts_and_nothing_else_that_was_there_before(tensors: Tensors) -> None:
    assert tensors.has_part(X)
    assert tensors.has_part(tensors.as_part(torch.zeros(4)))
    for other in (WEIGHT, BUFFER, torch.zeros(4, 3)):
        assert tensors.kind(other) == 0 and not tensors.has_part(other)
    assert not any(tensors.has_part(value) for value in (None, 3, "x", [X]))


def test_a_tensor_of_an_earlier_pack_is_none_of_this_one(tensors: Tensors) -> None:
    of_another = Tensors({}, frozenset(), {}).mark(torch.zeros(4), PARTED)
    assert tensors.kind(of_another) == 0


def test_arguments_have_parts_if_any_tensor_has(tensors: Tensors) -> None:
    assert tensors.has_parts((WEIGHT, {"x": [X]}))
    assert not tensors.has_parts((WEIGHT, 3, tensors.mark(torch.zeros(1), SAME)))


def test_parameters_and_what_follows_from_them_have_places(tensors: Tensors) -> None:
    derived = torch.zeros(3)
    tensors.derived[id(derived)] = -1
    assert tensors.place(WEIGHT) == 4 and tensors.place(derived) == -1
    assert tensors.place(X) is None and tensors.place(BUFFER) is None
    assert tensors.named(WEIGHT) == ("parameter", 4) and tensors.named(derived) == ("parameter", -1)


def test_tensors_are_named_in_the_order_in_which_they_are_made(tensors: Tensors) -> None:
    def names(tensors: Tensors) -> list[int]:
        return [tensors.named(tensors.mark(torch.zeros(1), kind)) for kind in (PARTED, SAME, PARTED)]

    one, other = names(tensors), names(Tensors({}, frozenset(), {"x": X.clone()}))
    assert one == other, "a pack that does the same has the same names"
    assert len({hash(name) for name in (*one, tensors.named(X))}) == 4, "the form of a pack takes their hashes"
    assert tensors.named(torch.zeros(1)) is None


def test_what_is_made_for_one_micro_batch_is_of_no_use_to_the_next(tensors: Tensors) -> None:
    own = torch.zeros(2)
    assert not tensors.made_here(own)
    tensors.mark_here(own)
    assert tensors.made_here(own) and not tensors.made_here(X)
    tensors.leave_scope()
    assert not tensors.made_here(own)


def test_other_tensors_of_the_model_are_constants(tensors: Tensors) -> None:
    assert tensors.is_constant(BUFFER)
    assert not tensors.is_constant(WEIGHT) and not tensors.is_constant(X)


def test_a_tensor_is_new_until_something_is_known_of_it(tensors: Tensors) -> None:
    tensor = torch.zeros(1)
    assert tensors.is_new(tensor)
    assert not any(tensors.is_new(known) for known in (X, WEIGHT, BUFFER, tensors.mark(tensor, SAME)))
