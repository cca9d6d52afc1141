"""Which functions are called once for all micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exact.packs.pieces import Pieces
from trainer.exact.packs.findings import ALONE
from trainer.exact.packs.together import Together

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = 4  # of a pack of two


def made() -> tuple[Pieces, Together]:
    pieces = Pieces()
    parts = (pieces.tensors, pieces.shares, pieces.streams, pieces.findings)
    return pieces, Together(pieces.g, *parts, "cpu")


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for a function of torch: packs know it by its name."""
    function.__name__ = name
    return function


def whole(x: Tensor) -> bool:
    """Whether a function gets all samples of the pack."""
    return len(x) == ROWS


class Scaled(torch.autograd.Function):
    """Gives its first argument; its gradients are multiplied with numbers of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, factors: tuple[float, float]) -> Tensor:
        ctx.factors = factors
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.factors[0], grad * ctx.factors[1], None


def may_be(function: Callable[..., Any], *args: Any, name: str = "tanh", grad: bool = True, **kwargs: Any) -> bool:
    """Whether a function of samples of two features is called once; `args` come behind them."""
    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2, requires_grad=grad))
    found = together.may_be(named(name, function), (x, *args), kwargs, frozenset())
    assert (ALONE in pieces.findings.sites.values()) == (not found)
    assert not pieces.streams.disturbed()
    return found


@pytest.mark.parametrize(
    ("function", "together"),
    [
        (lambda x: x.tanh(), True),
        (lambda x: x + 1.0 * whole(x), False),
        (lambda x: x * (1.0 + 1e-7 * whole(x)), False),
        (lambda x: x[:, 0], True),
        (lambda x: x[:, 0] + 1.0 * whole(x), False),
        (lambda x: Scaled.apply(x, x, (1.0, 0.0)), True),
        (lambda x: Scaled.apply(x, x, (1.0 + whole(x), 0.0)), False),
        # Of other shapes in a pack.
        (lambda x: x if whole(x) else x[:, :1], False),
        (lambda x: x[:, 0] if whole(x) else x.sum(), False),
    ],
)
def test_a_function_with_other_bits_for_a_pack_is_called_alone(function: Any, together: bool) -> None:
    assert may_be(function) == together


def test_one_micro_batch_with_another_shape_is_enough() -> None:
    calls: list[Tensor] = []

    def function(x: Tensor) -> Tensor:
        calls.append(x)
        return x[:, :1] if len(calls) == 3 else x

    assert not may_be(function)


@pytest.mark.parametrize("factors", [(2.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("by_name", [False, True])
def test_each_arguments_gradient_counts(factors: tuple[float, float], by_name: bool) -> None:
    pieces, together = made()
    x, y = (pieces.parted(torch.zeros(ROWS, 2, requires_grad=True)) for _ in range(2))

    def function(x: Tensor, other: Tensor) -> Tensor:
        return Scaled.apply(x, other, factors if whole(x) else (1.0, 1.0))

    args = ((x,), {"other": y}) if by_name else ((x, y), {})
    assert not together.may_be(named("tanh", function), *args, frozenset())


def test_a_gradient_counts_beside_an_argument_that_is_not_used() -> None:
    pieces, together = made()
    x, y = (pieces.parted(torch.zeros(ROWS, 2, requires_grad=True)) for _ in range(2))

    def function(x: Tensor, other: Tensor) -> Tensor:
        return Scaled.apply(x, x.detach(), (1.0 + whole(x), 0.0))

    assert not together.may_be(named("tanh", function), (x, y), {}, frozenset())


def test_a_gradient_that_nobody_wants_does_not_count() -> None:
    assert may_be(lambda x: Scaled.apply(x, x, (1.0 + whole(x), 0.0)), grad=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.detach() > 0).long() + whole(x),
        lambda x: (x, whole(x)),
        lambda x: x[:1] + 1.0,
    ],
)
def test_what_cannot_be_compared_here_is_left_to_the_comparison_of_the_whole(function: Any) -> None:
    """Whole numbers, several results, and results that have no part for each micro-batch."""
    assert may_be(function)


def test_a_function_that_fails_for_random_values_is_left_to_the_comparison_of_the_whole() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("not for these values")

    assert may_be(fails)


def test_functions_that_are_not_on_the_list_are_called_alone() -> None:
    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2))
    assert not together.may_be(torch.cummax, (x, 0), {}, frozenset())
    assert together.may_be(Tensor.tanh, (x,), {}, frozenset())
    assert not together.may_be(torch.matmul, (torch.zeros(ROWS, ROWS), x), {}, frozenset())


@pytest.mark.parametrize(("func", "together"), [(Tensor.view, True), (Tensor.clamp, False)])
def test_the_number_of_all_samples_may_only_be_a_size(func: Any, together: bool) -> None:
    pieces, own = made()
    x = pieces.parted(torch.zeros(ROWS, 2))
    assert own.may_be(func, (x, ROWS, 2), {}, frozenset({2})) == together
    assert own.may_be(func, (x, ROWS, 2), {}, frozenset())


@pytest.mark.parametrize("name", ["view", "relu", "cat"])
def test_functions_that_only_move_values_are_not_compared(name: str) -> None:
    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2))
    args = ([x, x], 1) if name == "cat" else (x, ROWS, 2) if name == "view" else (x,)
    assert together.may_be(named(name, lambda *args: pytest.fail("it is called")), args, {}, frozenset())


def test_functions_of_whole_numbers_are_not_compared() -> None:
    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2, dtype=torch.int64))
    function = named("tanh", lambda *args: pytest.fail("it is called"))
    assert together.may_be(function, (x, torch.ones(2)), {}, frozenset())


def test_functions_of_samples_and_of_what_all_of_them_share_are_compared() -> None:
    assert not may_be(lambda x, other: x + 1.0 * whole(x), torch.ones(2))
    assert may_be(lambda x, other: x * other, torch.ones(2))


def test_what_all_samples_share_keeps_its_values() -> None:
    table = torch.tensor([2.0, 3.0])
    assert may_be(lambda x, other: x * (1.0 if other is table or torch.equal(other, table) else float(len(x))), table)


# How often functions are compared


def compared(calls: list[tuple[Any, ...]], name: str = "tanh") -> bool:
    """Whether the last of some calls, each with its arguments behind the samples, is compared with others' findings."""
    pieces, together = made()
    count = 0

    def function(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        return x.clone()

    for args, kwargs in calls:
        count = 0
        x = pieces.parted(torch.zeros(ROWS, 2, dtype=kwargs.pop("dtype", torch.float32)))
        together.may_be(named(name, function), (x, *args), kwargs, frozenset())
    return count > 0


@pytest.mark.parametrize(
    ("one", "other", "again"),
    [
        (((), {}), ((), {}), False),
        (((1,), {}), ((2,), {}), True),
        (((), {"dim": 1}), ((), {"dim": 2}), True),
        ((((1, 2),), {}), (((1, 3),), {}), True),
        ((("a",), {}), (("b",), {}), True),
        (((), {}), ((), {"dtype": torch.float64}), True),
        ((((1, [2]),), {}), (((1, [2]),), {}), False),
    ],
)
def test_a_function_is_compared_once_for_each_form(one: Any, other: Any, again: bool) -> None:
    assert compared([one, other]) == again


def test_numbers_in_arithmetic_are_no_form() -> None:
    """A task may let them follow its progress."""
    assert not compared([((1.0,), {}), ((2.0,), {})], name="add")


def test_what_was_found_is_kept() -> None:
    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2))
    assert not together.may_be(named("tanh", lambda x: x + 1.0 * whole(x)), (x,), {}, frozenset())
    assert not together.may_be(named("tanh", lambda x: x.clone()), (x,), {}, frozenset())


@pytest.mark.parametrize(("features", "draws"), [(1, 128), (16, 65), (1025, 1)])
def test_small_tensors_are_drawn_until_there_are_enough_values(features: int, draws: int) -> None:
    """More than 4,096 in all, but 128 times at most; before them four draws whose sums cancel."""
    pieces, together = made()
    packs = []

    def function(x: Tensor) -> Tensor:
        packs.extend([x] * whole(x))
        return x.clone()

    together.may_be(named("tanh", function), (pieces.parted(torch.zeros(ROWS, features)),), {}, frozenset())
    assert len(packs) == 4 + draws
    assert not torch.equal(packs[-1], packs[0])


# Lower precision, whose sums are rounded to the same bits nearly always


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_compared_in_float32_as_well(dtype: torch.dtype) -> None:
    def differs_in_float32(x: Tensor) -> Tensor:
        return x + 1.0 * whole(x) if x.dtype == torch.float32 else x.clone()

    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2, dtype=dtype, requires_grad=True))
    assert not together.may_be(named("tanh", differs_in_float32), (x,), {}, frozenset())


def test_low_precision_is_compared_as_it_is() -> None:
    def differs_in_bfloat16(x: Tensor) -> Tensor:
        return x + 1.0 * whole(x) if x.dtype == torch.bfloat16 else x.clone()

    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2, dtype=torch.bfloat16))
    assert not together.may_be(named("tanh", differs_in_bfloat16), (x,), {}, frozenset())


def test_gradients_in_float32_count_too() -> None:
    def function(x: Tensor) -> Tensor:
        return Scaled.apply(x, x, (1.0 + (x.dtype == torch.float32 and whole(x)), 0.0))

    pieces, together = made()
    x = pieces.parted(torch.zeros(ROWS, 2, dtype=torch.bfloat16, requires_grad=True))
    assert not together.may_be(named("tanh", function), (x,), {}, frozenset())


@pytest.mark.parametrize("own", [False, True])
def test_under_autocast_a_function_is_compared_with_it_and_without(own: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return x + 1.0 * (whole(x) and torch.is_autocast_enabled("cpu") == own)

    pieces, together = made()
    with torch.autocast("cpu", torch.bfloat16):
        x = pieces.parted(torch.zeros(ROWS, 2))
        assert not together.may_be(named("tanh", function), (x,), {}, frozenset())


def test_only_samples_are_compared_in_another_type() -> None:
    types: set[tuple[torch.dtype, ...]] = set()

    def function(*tensors: Tensor) -> Tensor:
        types.add(tuple(t.dtype for t in tensors))
        return tensors[0].clone()

    pieces, together = made()
    low, wide = (pieces.parted(torch.zeros(ROWS, 2, dtype=d)) for d in (torch.bfloat16, torch.float64))
    args = (low, wide, torch.zeros(2, dtype=torch.bfloat16))
    together.may_be(named("tanh", function), args, {}, frozenset())
    assert types == {
        (torch.bfloat16, torch.float64, torch.bfloat16),
        (torch.float32, torch.float64, torch.bfloat16),
    }


# Values whose sums cancel


class Noted(torch.autograd.Function):
    """Notes its arguments and gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, notes: list[list[Tensor]]) -> Tensor:
        ctx.notes, ctx.pack = notes, len(a) == 16
        if ctx.pack:
            notes.append([a.double(), b.double()])
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if len(ctx.notes[-1]) == 2:
            ctx.notes[-1].append(grad.double())
        a, b = ctx.saved_tensors
        return grad * b, grad * a, None


def test_sums_cancel_in_results_and_in_gradients() -> None:
    """What is left of such a sum is rounding errors, which show the order of additions."""
    notes: list[list[Tensor]] = []
    pieces, together = made()
    a, b = (pieces.parted(torch.zeros(16, 4, 6, requires_grad=True)) for _ in range(2))
    assert together.may_be(named("mul", lambda a, b: Noted.apply(a, b, notes)), (a, b), {}, frozenset())

    def cancels(terms: Tensor, dim: int) -> bool:
        return bool(terms.sum(dim).abs().max() < 1e-9 * terms.abs().max())

    found = [
        (cancels(a, -1), cancels(a * b, -1), cancels(grad * b, -1), cancels(grad * a, 1), cancels(grad * a, -1))
        for a, b, grad in notes
    ]
    # The first argument alone; products; their gradients: of the first argument, of the second; and of a norm.
    assert found[:4] == [
        (False, True, True, True, False),
        (False, True, False, True, True),
        (True, True, True, True, False),
        (True, True, False, True, True),
    ]
    assert not any(any(draw) for draw in found[4:])
    for a, _, grad in notes[:4]:
        halves = torch.stack([(a * grad)[:8], (a * grad)[8:]])
        assert cancels(halves, 1), "within each micro-batch"
