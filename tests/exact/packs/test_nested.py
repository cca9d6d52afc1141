"""Tensors in lists, tuples and dictionaries."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch

from trainer.exact.packs.nested import cloned, filled, flat, mapped, parts, tensors_of

X, Y = torch.zeros(2), torch.ones(2)
Pair = namedtuple("Pair", "first second")


class Outputs(OrderedDict):  # type: ignore[type-arg]
    """As transformers': its fields are attributes, too, and it holds more than its fields."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self.__dict__[name] = value


def outputs() -> Outputs:
    made = Outputs(logits=X)
    made.note = "kept"  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((X, 2, "a"), [X, 2, "a"]),
        (([X, Y], 3), [2, X, Y, 3]),
        (((X,), []), [1, X, 0]),
        (({"a": X, "b": [1]}, 2), [2, "a", "b", X, 1, 1, 2]),
        ({"a": X}, ["a", X]),
        ((slice(1, 2, 3),), [1, 2, 3]),
        ((slice(None),), [None, None, None]),
        (([[1], [2]],), [2, 1, 1, 1, 2]),
        (([[1, 2]],), [1, 2, 1, 2]),
    ],
)
def test_arguments_in_one_list(values: Any, expected: list[Any]) -> None:
    """Two calls with other arguments have two other lists."""
    found = flat(values, [])
    assert len(found) == len(expected)
    assert all(a is b if isinstance(b, torch.Tensor) else a == b for a, b in zip(found, expected))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (X, [X]),
        ([X, (Y, 2)], [X, Y]),
        ({"a": [X], "b": Y}, [X, Y]),
        (MappingProxyType({"a": X}), [X]),
        (outputs(), [X]),
        ("text", []),
        (3, []),
        (None, []),
    ],
)
def test_the_tensors_of_what_a_function_returns(value: Any, expected: list[Any]) -> None:
    found = list(tensors_of(value))
    assert len(found) == len(expected) and all(a is b for a, b in zip(found, expected))


def test_copies_of_tensors_leave_the_rest_as_it_is() -> None:
    other = object()
    copy = cloned({"a": [X, 2], "b": other})
    assert copy["b"] is other and copy["a"][1] == 2
    copy["a"][0].add_(1)
    assert X.tolist() == [0, 0] and copy["a"][0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [([1, 2], [1, 2]), ((1,), [1]), ({"a": 1}, [1]), (MappingProxyType({"a": 1}), [1]), (1, []), ("text", []), (X, [])],
)
def test_what_a_value_holds(value: Any, expected: list[Any]) -> None:
    assert list(parts(value)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2], [2, 4]),
        ((1,), (2,)),
        (Pair(1, 2), Pair(2, 4)),
        ({"a": 1}, {"a": 2}),
        (Outputs(logits=1), Outputs(logits=2)),
        ("text", "text"),
        (slice(1, 2), slice(1, 2)),
        (3, 3),
    ],
)
def test_a_function_of_each_element_keeps_the_class(value: Any, expected: Any) -> None:
    found = mapped(value, lambda v: 2 * v)
    assert found == expected and type(found) is type(expected)


def test_a_dictionary_of_a_class_of_its_own_keeps_what_else_it_has() -> None:
    before = outputs()
    for found in (filled(before, {"logits": Y}), mapped(before, lambda v: Y)):
        assert found["logits"] is Y and found.logits is Y and found.note == "kept"
    assert before["logits"] is X and before.logits is X, "the old one is as it was"
