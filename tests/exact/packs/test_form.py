"""The form of a pack: which calls count as the same as those of the trials."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.exact.packs.findings import Findings
from trainer.exact.packs.form import Form
from trainer.exact.packs.tensors import NUMBERS, PARTED, SAME, Tensors
from trainer.exact.packs.verdicts import RefusedError

ROWS = 8
X, WEIGHT, BUFFER = torch.zeros(ROWS, 3), torch.zeros(3, 3), torch.ones(3)


@pytest.fixture
def tensors() -> Tensors:
    """Of a pack with the samples X, the parameter WEIGHT at place 4, and the constant BUFFER."""
    return Tensors({id(WEIGHT): 4}, frozenset([id(BUFFER)]), {"x": X})


def named(tensors: Tensors, func: Any, *args: Any, **kwargs: Any) -> int:
    """What names a pack that makes this call and no other."""
    form = Form(tensors, ROWS, Findings(), trying=True)
    form.add(func, args, kwargs)
    return form.value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((2,), (3,)),
        ((-1,), (-2,)),
        (("a",), ("b",)),
        ((None,), (False,)),
        ((torch.float32,), (torch.float64,)),
        (([1, 2], 3), ([1], 2, 3)),
        (([[1], [2]],), ([[1, 2]],)),
        (({"a": 1},), ({"b": 1},)),
        (({"a": 1},), ({"a": 2},)),
        ((slice(1, 2, 3),), (slice(0, 2, 3),)),
        ((slice(1, 2, 3),), (slice(1, 0, 3),)),
        ((slice(1, 2, 3),), (slice(1, 2, 0),)),
        ((slice(-1, None),), (slice(-2, None),)),
        ((np.int64(2),), (np.int64(3),)),
        ((torch.contiguous_format,), (torch.device("cpu"),)),
        ((X[:4],), (X[:2],)),
        ((X[:3],), (X[:3].t(),)),
        ((X,), (X.double(),)),
        ((X,), (X.clone().requires_grad_(),)),
    ],
    ids=str,
)
def test_calls_with_other_arguments_have_other_names(one: Any, other: Any, tensors: Tensors) -> None:
    assert named(tensors, torch.roll, *one) == named(tensors, torch.roll, *one)
    assert named(tensors, torch.roll, *one) != named(tensors, torch.roll, *other)
    assert named(tensors, torch.roll, X, a=one) != named(tensors, torch.roll, X, a=other), "in a named argument, too"


def test_other_functions_and_other_orders_have_other_names(tensors: Tensors) -> None:
    assert named(tensors, torch.sin, X) != named(tensors, torch.cos, X)
    one, other = (Form(tensors, ROWS, Findings(), trying=True) for _ in range(2))
    for form, order in ((one, (torch.sin, torch.cos)), (other, (torch.cos, torch.sin))):
        for func in order:
            form.add(func, (X,), {})
    assert one.value != other.value


def test_calls_without_gradients_have_another_name(tensors: Tensors) -> None:
    with torch.no_grad():
        without = named(tensors, torch.sin, X)
    assert without != named(tensors, torch.sin, X)


@pytest.mark.parametrize("as_number", [int, float, np.float32], ids=lambda kind: kind.__name__)
def test_numbers_in_arithmetic_may_follow_the_progress(as_number: Any, tensors: Tensors) -> None:
    assert named(tensors, torch.mul, X, as_number(2)) == named(tensors, torch.mul, X, as_number(3))
    assert named(tensors, torch.mul, X, 2) != named(tensors, torch.mul, X, 2.0)
    assert named(tensors, torch.roll, X, as_number(2)) != named(tensors, torch.roll, X, as_number(3))


def test_the_number_of_a_packs_samples_in_arithmetic_has_a_name_of_its_own(tensors: Tensors) -> None:
    """A mean divides by it. It was another number in the trials if the task divides by something else at first."""
    assert named(tensors, torch.div, X, ROWS) != named(tensors, torch.div, X, ROWS + 1)


def test_tensors_that_other_calls_have_made_are_told_apart(tensors: Tensors) -> None:
    one, other = (tensors.mark(torch.zeros(ROWS, 3), PARTED) for _ in range(2))
    assert named(tensors, torch.sin, one) != named(tensors, torch.sin, other)


def test_tensors_that_are_something_else_to_the_pack_are_told_apart(tensors: Tensors) -> None:
    sample, parameter, outside = torch.zeros(3, 3), WEIGHT, torch.zeros(3, 3)
    names = {named(tensors, torch.sin, value) for value in (parameter, outside, tensors.mark(sample, PARTED))}
    assert len(names) == 3


def test_calls_for_one_micro_batch_count_too(tensors: Tensors) -> None:
    def of(func: Any, *args: Any, **kwargs: Any) -> int:
        form = Form(tensors, ROWS, Findings(), trying=True)
        form.add_alone(func, args, kwargs)
        return form.value

    assert of(torch.roll, X, 2) != of(torch.roll, X, 3)
    assert of(torch.roll, X, 2) != of(torch.roll, X, shifts=2)
    assert of(torch.sin, X) != of(torch.cos, X)
    assert of(torch.mul, X, 2) == of(torch.mul, X, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "kinds", "places"),
    [
        ((3,), {}, 0, set()),
        ((X,), {}, PARTED, set()),
        ((3,), {"input": X}, PARTED, set()),
        ((X,), {"weight": WEIGHT}, PARTED, {4}),
        (([WEIGHT, X], "a"), {}, PARTED, {4}),
        (({"x": X},), {}, PARTED, set()),
        ((X, [2]), {}, PARTED, set()),
        ((BUFFER,), {}, 0, set()),
    ],
)
def test_what_is_among_the_arguments(args: Any, kwargs: Any, kinds: int, places: set[int], tensors: Tensors) -> None:
    assert Form(tensors, ROWS, Findings(), trying=True).add(F.linear, args, kwargs) == (kinds, places)


def test_kinds_that_are_among_the_arguments_are_added_up(tensors: Tensors) -> None:
    number, same = tensors.mark(torch.zeros(2), NUMBERS), tensors.mark(torch.zeros(2), SAME)
    form = Form(tensors, ROWS, Findings(), trying=True)
    assert form.add(torch.mul, (X, number), {})[0] == PARTED | NUMBERS
    assert form.add(torch.mul, (X,), {"other": number})[0] == PARTED | NUMBERS
    assert form.add(torch.mul, ([X], [number]), {})[0] == PARTED | NUMBERS
    assert form.add(torch.mul, (same, same), {})[0] == 0, "what is the same for all concerns no micro-batch"


def test_complex_numbers_are_refused(tensors: Tensors) -> None:
    with pytest.raises(RefusedError, match="complex numbers"):
        Form(tensors, ROWS, Findings(), trying=True).add(torch.sin, (X.to(torch.complex64),), {})


# After the trials


def test_a_tensor_that_nobody_saw_being_made_has_to_be_tried_first(tensors: Tensors) -> None:
    unknown = torch.zeros(3)
    with pytest.raises(RefusedError, match="that packs have not seen being made") as caught:
        Form(tensors, ROWS, Findings(), trying=False).add(torch.mul, (X, unknown), {})
    assert caught.value.untried
    Form(tensors, ROWS, Findings(), trying=True).add(torch.mul, (X, unknown), {})


def of_one_micro_batch(tensors: Tensors) -> Tensor:
    made = torch.zeros(3)
    tensors.mark_here(made)
    return made


@pytest.mark.parametrize(
    "known",
    [
        lambda tensors: X,
        lambda tensors: WEIGHT,
        lambda tensors: BUFFER,
        lambda tensors: tensors.mark(torch.zeros(3), SAME),
        of_one_micro_batch,
    ],
    ids=["samples", "a parameter", "a constant of the model", "made by a call", "made for this micro-batch"],
)
def test_what_packs_know_needs_no_trial(known: Any, tensors: Tensors) -> None:
    Form(tensors, ROWS, Findings(), trying=False).add(torch.mul, (X, known(tensors)), {})


def test_a_tensor_of_the_trials_may_be_given_again(tensors: Tensors) -> None:
    """By itself: one that has got the place of another in memory is not known."""
    of_trials, other = torch.zeros(3), torch.zeros(3)
    findings = Findings(outside={id(of_trials): weakref.ref(of_trials), id(other): weakref.ref(of_trials)})
    form = Form(tensors, ROWS, findings, trying=False)
    form.add(torch.mul, (X, of_trials), {})
    with pytest.raises(RefusedError, match="have not seen being made"):
        form.add(torch.mul, (X, other), {})
