"""A micro-batch's own calls, and what in a pack's calls does not fit them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules._functions import BackwardHookFunction

from trainer.exact.packs.trace import (
    Call,
    Custom,
    Shape,
    Trace,
    custom_functions,
    flat,
    forwards_replaced,
    memories,
    name_in,
    same_alone,
    same_calls,
    scaled_numbers,
)
from trainer.exact.packs.verdicts import RefusedError

CONSTANT, WEIGHT = torch.ones(3), nn.Parameter(torch.ones(3))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def traced(forward: Callable[[Tensor], Any], rows: int = 2, apart: tuple[nn.Module, ...] = ()) -> Trace:
    x = torch.zeros(rows, 3)
    trace = Trace({"x": x}, frozenset([id(WEIGHT)]), apart)
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
    assert torch.autograd.Function.apply.__qualname__ == "Function.apply", "all is as it was"


def test_a_tensor_that_nobody_saw_being_made_is_kept() -> None:
    """It has to be the same one in a pack. Samples, parameters and what functions return are known."""
    trace = traced(lambda x: torch.relu((x + CONSTANT) * WEIGHT))
    outside = [given.outside for call in trace.calls for given in call.given if isinstance(given, Shape)]
    assert [id(tensor) for tensor in outside] == [id(None), id(CONSTANT), id(None), id(None), id(None)]


def test_named_arguments_are_passed_on() -> None:
    trace = traced(lambda x: x.view(x.size(dim=1), -1).sum(dim=1, keepdim=True))
    assert [call.shapes for call in trace.calls] == [[(3, 2)], [(3, 1)]]


@pytest.mark.parametrize(
    ("forward", "changes", "aliases"),
    [
        (lambda x: x + 1, False, False),
        (lambda x: x.add_(1), True, True),
        (lambda x: x.t(), False, True),
        (lambda x: torch.add(x, 1, out=x), True, True),
        (lambda x: x.new_zeros(0).sum(), False, False),
    ],
)
def test_what_a_call_does_to_memory_is_noted(forward: Any, changes: bool, aliases: bool) -> None:
    call = traced(forward).calls[-1]
    assert (call.changes, call.aliases) == (changes, aliases)


def test_tensors_without_values_have_no_memory_to_share() -> None:
    x = torch.zeros(4)
    assert memories([x, x[2:], {"a": x[:0]}]) == {x.data_ptr()}
    assert memories(torch.zeros(0)) == set()


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: torch.cos(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])),
        lambda x: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]).neg(),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_call_that_cannot_be_noted_spoils_the_trace(forward: Callable[[Tensor], Any]) -> None:
    trace = traced(forward)
    assert trace.broken != "" and all(name not in names(trace) for name in ("cos", "neg"))
    assert traced(torch.cos).broken == ""


def test_a_module_that_is_taken_apart_is_one_call() -> None:
    layer = nn.LSTM(3, 4)
    trace = traced(layer, apart=(layer,))
    assert names(trace) == ["LSTM"] and trace.calls[0].inner
    assert [type(given).__name__ for given in trace.calls[0].given] == ["int", "Shape", "int"]
    assert "forward" not in vars(layer)


def test_a_module_in_one_that_is_taken_apart_belongs_to_its_call() -> None:
    inner = nn.ReLU()
    outer = nn.Sequential(inner, nn.Tanh())
    trace = traced(lambda x: outer(x) + 1, apart=(outer, inner))
    assert names(trace) == ["Sequential", "add"]
    assert [call.func.__name__ for call in trace.calls[0].inner] == ["relu", "tanh"]


def test_a_forward_that_a_user_has_replaced_is_put_back() -> None:
    module, plain = nn.ReLU(), nn.Tanh()
    own = module.forward = lambda x: x + 5  # type: ignore[method-assign,assignment]
    with (
        contextlib.suppress(ZeroDivisionError),
        forwards_replaced([module, plain], lambda m, forward: lambda x: forward(x) * 2),
    ):
        assert module(torch.ones(1)).item() == 12.0, "the user's, called through the new one"
        assert plain(torch.zeros(1)).item() == 0.0
        raise ZeroDivisionError
    assert module.forward is own and "forward" not in vars(plain)


def test_functions_have_names_in_messages() -> None:
    assert name_in(torch.add) == "add" and name_in(nn.LSTM) == "LSTM"
    assert "partial" in name_in(functools.partial(torch.add, 1)), "that has none of its own"


# Functions with a backward of their own


class Tripled(Doubled):
    pass


def seen_through(own: tuple[type, ...], forward: Callable[[Tensor], Any], in_a_mode: bool = True) -> list[str]:
    """The functions with a backward of their own that are seen."""
    found: list[str] = []

    def seen(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found.append(func.__name__)
        return func(*args, **kwargs)

    mode = torch.overrides.BaseTorchFunctionMode()
    with mode if in_a_mode else torch.enable_grad(), custom_functions(seen, own):
        forward(torch.ones(2, requires_grad=True))
    assert torch.autograd.Function.apply.__qualname__ == "Function.apply"
    return found


def test_functions_of_ones_own_are_seen_but_those_of_packs() -> None:
    assert seen_through((), lambda x: Doubled.apply(x)) == ["Doubled.apply"]
    assert seen_through((nn.Module,), lambda x: Doubled.apply(x)) == ["Doubled.apply"]
    assert seen_through((Doubled,), lambda x: Tripled.apply(x)) == []
    # Inside of torch's own functions no mode is active.
    assert seen_through((), lambda x: Doubled.apply(x), in_a_mode=False) == []


def test_functions_of_ones_own_are_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), custom_functions(lambda *call: None, ()):
        raise ZeroDivisionError
    assert torch.autograd.Function.apply.__qualname__ == "Function.apply"


def test_a_backward_hook_of_a_module_is_refused_in_packs_only() -> None:
    module = nn.Linear(2, 2)
    module.register_full_backward_hook(lambda module, into, out: None)
    assert f"{BackwardHookFunction.__name__}.apply" in seen_through((), module)
    with pytest.raises(RefusedError, match="a module has a backward hook"):
        seen_through((Doubled,), module)
    assert torch.autograd.Function.apply.__qualname__ == "Function.apply"


def test_a_function_of_ones_own_is_known_by_its_class() -> None:
    one, same, other = Custom(Doubled, Doubled.apply), Custom(Doubled, torch.add), Custom(Tripled, Tripled.apply)
    assert one == same and hash(one) == hash(same)
    assert one != other and one != Doubled and one.__name__ == "Doubled.apply"
    assert one(torch.ones(1)).item() == 2.0


# Two micro-batches


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.view(-1) * 3,
        lambda x: torch.full_like(x, float("nan")),
        lambda x: torch.flatten(x.to(torch.device("cpu"), dtype=torch.float64), 1),
        lambda x: torch.einsum("ij,ij->i", x, x),
    ],
)
def test_micro_batches_that_call_the_same(forward: Callable[[Tensor], Any]) -> None:
    assert same_calls(traced(forward), traced(forward))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x * 3, lambda x: x * 4),
        (lambda x: x * 3, lambda x: x + 3),
        (lambda x: x * 3, lambda x: x * 3.0),
        (lambda x: x * 1, lambda x: x * True),
        (lambda x: x * x, lambda x: x * 3),
        (lambda x: x * 3, lambda x: x * x),
        (lambda x: x * 3, lambda x: (x * 3).cos()),
        (lambda x: (x * 3).cos(), lambda x: x * 3),
        (lambda x: x[:1].sum(), lambda x: x[:2].sum()),
        (lambda x: torch.nonzero(x), lambda x: torch.nonzero(x + 1)),
        (lambda x: (x, torch.nonzero(CONSTANT))[1], lambda x: (x, torch.nonzero(0 * CONSTANT))[1]),
        (lambda x: torch.einsum("ij->i", x), lambda x: torch.einsum("ij->j", x)),
        (lambda x: x.sum(None), lambda x: x.sum(0)),
        (lambda x: x.sum(0), lambda x: x.sum(None)),
        (lambda x: torch.flatten(x).cos(), lambda x: torch.flatten(x).sin()),
    ],
)
def test_micro_batches_that_call_something_else(one: Callable[[Tensor], Any], other: Callable[[Tensor], Any]) -> None:
    assert not same_calls(traced(one), traced(other))


def test_micro_batches_of_other_sizes_do_not_call_the_same() -> None:
    """Although what comes out has one shape."""
    assert not same_calls(traced(torch.sum), traced(torch.sum, rows=3))


def test_what_a_function_returns_counts_too() -> None:
    """Its shape may follow from values."""
    one, other = (Trace({}, frozenset(), ()) for _ in range(2))
    for trace, x in ((one, torch.tensor([1.0, 0.0])), (other, torch.tensor([1.0, 1.0]))):
        with trace.active():
            torch.nonzero(x)
            trace.end_of_forward()
    assert not same_calls(one, other)


def test_only_the_calls_of_the_forward_are_compared() -> None:
    """A loss may take another way for each micro-batch: it is called for each."""
    one, other = (Trace({}, frozenset(), ()) for _ in range(2))
    for trace, loss in ((one, torch.sin), (other, torch.cos)):
        with trace.active():
            torch.relu(CONSTANT)
            trace.end_of_forward()
            loss(CONSTANT)
    assert same_calls(one, other)


# A pack's calls beside those of a micro-batch alone


def scaled(args: tuple[Any, ...], own: list[Any], parted: bool = True) -> frozenset[int]:
    call = Call(torch.add, own, [])
    return scaled_numbers(torch.add, flat((args, {}), []), call, 4, lambda tensor: parted)


def test_a_number_of_all_samples_is_known_by_that_of_a_micro_batch() -> None:
    pack, one = torch.zeros(8, 3), Shape(torch.Size((2, 3)), None)
    assert scaled((pack, 8, 3), [3, one, 2, 3, 0]) == {2}
    assert scaled((pack, 8, 0.5), [3, one, 8, 0.5, 0]) == set()
    assert scaled((torch.zeros(2, 3), 1), [2, one, 1, 0], parted=False) == set()


def test_a_number_of_each_micro_batch_is_one_dimension_of_the_pack() -> None:
    assert scaled((torch.zeros(4),), [1, Shape(torch.Size(()), None), 0]) == set()
    assert scaled((torch.zeros(()),), [1, Shape(torch.Size(()), None), 0], parted=False) == set()


NAN = float("nan")


class Uncomparable:
    """As arrays of other libraries may be."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("not with this one")

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "uncomparable"


UNCOMPARABLE = Uncomparable()
SAME: list[tuple[Any, Any]] = [
    (3, 3),
    (2, 2.0),
    (NAN, NAN),
    ("ab", "".join(["a", "b"])),
    (None, None),
    (torch.device("cpu"), torch.device("cpu")),
    (np.arange(3), np.arange(3)),
    (np.float32("nan"), np.float32("nan")),
    (UNCOMPARABLE, UNCOMPARABLE),
]
OTHERS: list[tuple[Any, Any]] = [
    ("a", "b"),
    (None, "a"),
    ("a", None),
    (3, "aaa"),
    ("a", 3),
    (3, None),
    (torch.device("cpu"), torch.device("meta")),
    (np.arange(3), np.arange(1, 4)),
    (np.arange(3), np.array([0, 1, 5])),
    (np.arange(3), np.arange(2)),
    (np.float32(1), np.float32(2)),
    (Uncomparable(), Uncomparable()),
    (3, Shape(torch.Size((2,)), None)),
]


@pytest.mark.parametrize(("given", "own"), SAME, ids=str)
def test_arguments_that_are_the_same(given: Any, own: Any) -> None:
    assert scaled((given,), [1, own, 0]) == set()
    same_alone(torch.add, [1, given, 0], Call(torch.add, [1, own, 0], []))


@pytest.mark.parametrize(("given", "own"), OTHERS, ids=str)
def test_arguments_that_are_something_else(given: Any, own: Any) -> None:
    with pytest.raises(RefusedError, match="add gets something else than in a micro-batch alone"):
        scaled((given,), [1, own, 0])
    size = isinstance(own, Shape)
    with pytest.raises(RefusedError, match="a tensor of another size" if size else "something else than in a micro"):
        same_alone(torch.add, [1, given, 0], Call(torch.add, [1, own, 0], []))


def test_another_function_of_the_same_arguments_does_not_fit() -> None:
    for compare in (same_alone, lambda *call: scaled_numbers(*call, 4, lambda tensor: True)):
        with pytest.raises(RefusedError, match="add is called where a micro-batch alone calls sub"):
            compare(torch.add, [1, 2, 0], Call(torch.sub, [1, 2, 0], []))
        with pytest.raises(RefusedError, match="add is called where a micro-batch alone calls add"):
            compare(torch.add, [1, 2, 0], Call(torch.add, [1, 2, 0, 3], []))


@pytest.mark.parametrize(
    ("args", "own", "parted", "why"),
    [
        ((torch.zeros(6, 3),), [1, Shape(torch.Size((2, 3)), None), 0], True, "whose size does not follow"),
        ((torch.zeros(8, 3),), [1, Shape(torch.Size((2, 3)), None), 0], False, "whose size does not follow"),
        ((7,), [1, 2, 0], True, "depends on how many samples"),
        ((0.25,), [1, 0.5, 0], True, "depends on how many samples"),
        ((2.0,), [1, 0.5, 0], True, "depends on how many samples"),
        ((8.0,), [1, 2, 0], True, "depends on how many samples"),
        ((True,), [1, 0.25, 0], True, "depends on how many samples"),
        ((NAN, 3), [2, NAN, 1, 0], True, "depends on how many samples"),
        ((torch.zeros(8, 3),), [1, Shape(torch.Size((2, 4)), None), 0], True, "whose size does not follow"),
        ((torch.zeros(4),), [1, Shape(torch.Size(()), None), 0], False, "whose size does not follow"),
        (("a",), [1, "b", 0], True, "something else"),
        ((torch.zeros(8),), [1, 2, 0], True, "a tensor where a micro-batch alone has none"),
        ((1, 2), [1, 1, 0], True, "is called where"),
    ],
)
def test_calls_that_do_not_fit(args: tuple[Any, ...], own: list[Any], parted: bool, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        scaled(args, own, parted)


@pytest.mark.parametrize(
    ("given", "own", "why"),
    [
        (torch.zeros(2, 3), Shape(torch.Size((2, 4)), None), "add gets a tensor of another size"),
        (torch.zeros(2, 3), 2, "add gets a tensor of another size"),
        (2, Shape(torch.Size(()), None), "add gets a tensor of another size"),
        (3, 2, "add gets 3, and 2 in a micro-batch alone"),
        (0.5, NAN, "add gets 0.5, and nan in a micro-batch alone"),
    ],
)
def test_calls_for_one_micro_batch_that_do_not_fit(given: Any, own: Any, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        same_alone(torch.add, [1, given, 0], Call(torch.add, [1, own, 0], []))


def test_tensors_of_one_size_fit() -> None:
    same_alone(torch.add, [1, torch.zeros(2, 3), 0], Call(torch.add, [1, Shape(torch.Size((2, 3)), CONSTANT), 0], []))
