"""A micro-batch's own calls, and what in a pack's calls does not fit them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.exact.packs.trace import Call, Shape, Trace, flat, same_calls, scaled_numbers
from trainer.exact.packs.verdicts import RefusedError

CONSTANT = torch.ones(3)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def traced(forward: Callable[[Tensor], Any], rows: int = 2, apart: tuple[nn.Module, ...] = ()) -> Trace:
    x = torch.zeros(rows, 3)
    trace = Trace({"x": x}, frozenset(), apart)
    with trace.active():
        forward(x)
        trace.end_of_forward()
    return trace


def names(trace: Trace) -> list[str]:
    return [call.func.__name__ for call in trace.calls]


def test_every_function_is_noted_but_those_that_only_look() -> None:
    trace = traced(lambda x: torch.relu(Doubled.apply(x.view(x.shape[0], -1)) + CONSTANT))
    assert names(trace) == ["view", "Doubled.apply", "add", "relu"]
    assert trace.calls[0].given[-3:] == [2, -1, 0] and trace.calls[0].shapes == [(2, 3)]
    outside = [given.outside for call in trace.calls for given in call.given if isinstance(given, Shape)]
    assert [tensor is CONSTANT for tensor in outside] == [False, False, False, True, False]
    assert torch.autograd.Function.apply.__qualname__ == "Function.apply", "all is as it was"


def test_a_module_that_is_taken_apart_is_one_call() -> None:
    layer = nn.LSTM(3, 4)
    assert names(traced(layer, apart=(layer,))) == ["LSTM"]
    assert "forward" not in vars(layer)


def test_micro_batches_that_call_the_same() -> None:
    one = traced(lambda x: x.view(-1) * 3)
    assert same_calls(one, traced(lambda x: x.view(-1) * 3))
    assert not same_calls(one, traced(lambda x: x.view(-1) * 4))
    assert not same_calls(one, traced(lambda x: x.view(-1) + 3))
    assert not same_calls(one, traced(lambda x: x.view(-1) * 3, rows=3))


def scaled(args: tuple[Any, ...], own: list[Any], parted: bool = True) -> frozenset[int]:
    call = Call(torch.add, own, [])
    return scaled_numbers(torch.add, flat((args, {}), []), call, 4, lambda tensor: parted)


def test_a_number_of_all_samples_is_known_by_that_of_a_micro_batch() -> None:
    pack, one = torch.zeros(8, 3), Shape(torch.Size((2, 3)), None)
    assert scaled((pack, 8, 3), [3, one, 2, 3, 0]) == {2}
    assert scaled((pack, 8, 0.5), [3, one, 8, 0.5, 0]) == set()
    assert scaled((torch.zeros(2, 3), 1), [2, one, 1, 0], parted=False) == set()


@pytest.mark.parametrize(
    ("args", "own", "parted", "why"),
    [
        ((torch.zeros(6, 3),), [1, Shape(torch.Size((2, 3)), None), 0], True, "whose size does not follow"),
        ((torch.zeros(8, 3),), [1, Shape(torch.Size((2, 3)), None), 0], False, "whose size does not follow"),
        ((7,), [1, 2, 0], True, "depends on how many samples"),
        ((0.25,), [1, 0.5, 0], True, "depends on how many samples"),
        (("a",), [1, "b", 0], True, "something else"),
        ((torch.zeros(8),), [1, 2, 0], True, "a tensor where a micro-batch alone has none"),
        ((1, 2), [1, 1, 0], True, "is called where"),
    ],
)
def test_calls_that_do_not_fit(args: tuple[Any, ...], own: list[Any], parted: bool, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        scaled(args, own, parted)
