"""Which rule a layer of a pack is computed by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.exact.packs.pieces import RIGHT, Pieces, trained
from trainer.exact.packs.findings import ALONE
from trainer.exact.packs.layers import Rule, Site
from trainer.exact.packs.rules import EMBEDDING
from trainer.exact.packs.verdicts import RefusedError

pytestmark = pytest.mark.usefixtures("one_thread")

WRONG = RIGHT._replace(forward=lambda site, x, w, b: (site.call(x, w, b) + 1.0, ()))


def fails(error: Exception) -> Rule:
    def forward(site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Any:
        raise error

    return RIGHT._replace(forward=forward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, place: int = 0) -> Tensor:
    return F.linear(x, weight, bias)


def made(trial: bool = True) -> Pieces:
    return Pieces(trained(3, 4), trained(3), trial=trial)


def layer(pieces: Pieces, *rules: Rule, x: Tensor | None = None, bias: bool = True, **options: Any) -> Any:
    """What a dense layer of a pack of two micro-batches of five samples gives."""
    x = pieces.parted(torch.ones(10, 4)) if x is None else x
    weight, own = pieces.parameters
    return pieces.sites.layer(rules or (RIGHT,), "linear", linear, x, weight, own if bias else None, **options)


def chosen(pieces: Pieces) -> list[int]:
    return list(pieces.findings.sites.values())


def test_a_trial_finds_the_rule_and_later_packs_take_it() -> None:
    trial, later = made(), made(trial=False)
    assert layer(later) is NotImplemented and chosen(later) == []
    assert layer(trial).tolist() == [[11.0, 28.0, 45.0]] * 10
    later.findings.sites = trial.findings.sites
    assert layer(later).tolist() == [[11.0, 28.0, 45.0]] * 10
    assert chosen(later) == [0]


@pytest.mark.parametrize("trial", [False, True])
def test_a_rule_leaves_one_gradient_a_micro_batch(trial: bool) -> None:
    pieces = made(trial)
    pieces.findings.sites = made_findings()
    y = layer(pieces)
    assert pieces.leaves.is_expected(0) and pieces.leaves.is_expected(1)
    y.backward(torch.cat([torch.ones(5, 3), torch.full((5, 3), 2.0)]))
    assert pieces.gradients() == {0: [[5.0] * 12, [10.0] * 12], 1: [[5.0] * 3, [10.0] * 3]}


def made_findings() -> dict[Any, int]:
    pieces = made()
    layer(pieces)
    return pieces.findings.sites


def test_without_gradients_no_rule_is_needed() -> None:
    pieces = made()
    with torch.no_grad():
        assert layer(pieces) is NotImplemented
    assert chosen(pieces) == []


def test_a_layer_whose_rules_are_all_wrong_is_computed_alone() -> None:
    pieces = made()
    assert layer(pieces, WRONG) is NotImplemented and chosen(pieces) == [ALONE]
    assert layer(pieces, RIGHT) is NotImplemented, "this was found before"
    assert not pieces.leaves.is_expected(0)


def test_a_trial_compares_a_layer_once() -> None:
    pieces, calls = made(), list[int]()

    def noted(site: Site, *arguments: Any) -> Any:
        calls.append(len(arguments[0]))
        return RIGHT.forward(site, *arguments)

    layer(pieces, RIGHT._replace(forward=noted))
    first = len(calls)
    layer(pieces, RIGHT._replace(forward=noted))
    assert first > 2 and len(calls) == first + 1


def test_a_layer_of_another_place_in_memory_is_another() -> None:
    pieces = made()
    layer(pieces)
    layer(pieces, x=pieces.parted(torch.ones(41)[1:].view(10, 4)))
    layer(pieces, x=pieces.parted(torch.ones(4, 10).t()))
    layer(pieces, bias=False)
    assert len(pieces.findings.sites) == 4


def test_comparing_draws_nobodys_numbers() -> None:
    pieces = made()
    layer(pieces)
    assert not pieces.streams.disturbed()


# Autocast


@pytest.mark.parametrize(("cast", "options", "dtype"), [
    (False, {}, torch.float32),
    (True, {}, torch.bfloat16),
    (True, {"casts": False}, torch.float32),
    (False, {"casts": False}, torch.float32),
])  # fmt: skip
def test_a_layer_casts_what_autocast_would(cast: bool, options: dict[str, Any], dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def noted(site: Site, x: Tensor, *parameters: Any) -> Any:
        seen.append(x.dtype)
        return RIGHT.forward(site, x, *parameters)

    pieces = made()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        layer(pieces, RIGHT._replace(forward=noted), bias=False, **options)
    assert seen[-1] == dtype


def test_whole_numbers_are_not_cast() -> None:
    pieces = Pieces(trained(9, 4))

    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return F.embedding(x, w)

    x, table = pieces.parted(torch.arange(8)), pieces.parameters[0]
    options = {"padding_idx": None, "scale_grad_by_freq": False}
    with torch.autocast("cpu", torch.bfloat16):
        y = pieces.sites.layer(EMBEDDING, "embedding", call, x, table, None, **options)
    assert y.dtype == torch.bfloat16 and torch.equal(y.float(), table[:8])


@pytest.mark.parametrize(("alone", "shared"), [(False, set[int]()), (True, {0, 1})])
def test_with_autocast_a_parameter_is_for_layers_or_for_single_micro_batches(alone: bool, shared: set[int]) -> None:
    """Two casts of a parameter would add its gradients in another order than the one that autocast makes."""
    pieces = made()
    with torch.autocast("cpu", torch.bfloat16):
        layer(pieces)
        if alone:
            pieces.shares.own(pieces.parameters, 0)
        else:
            layer(pieces)
    assert pieces.leaves.shared == shared


# Layers of what all micro-batches share


def shared(pieces: Pieces, *rules: Rule) -> Site | None:
    return pieces.sites.shared(rules, "linear", linear, torch.ones(1, 5, 4), pieces.parameters[0])


def test_a_shared_layer_has_a_rule_that_a_trial_has_found() -> None:
    trial, later = made(), made(trial=False)
    found = shared(trial, WRONG, RIGHT)
    assert found is not None and found.rule is RIGHT and (found.weight, found.bias) == (0, None)
    assert shared(later, RIGHT) is None and chosen(later) == []
    later.findings.sites = trial.findings.sites
    assert chosen(later) == [1]
    found = shared(later, WRONG, RIGHT)
    assert found is not None and found.rule is RIGHT
    assert shared(made(), WRONG) is None


def test_a_shared_layer_is_compared_once() -> None:
    pieces = made()
    assert shared(pieces, WRONG) is None
    assert shared(pieces, RIGHT) is None


def test_a_shared_layer_is_compared_with_its_input_given_to_each_micro_batch() -> None:
    shapes: set[tuple[int, ...]] = set()

    def noted(site: Site, x: Tensor, *parameters: Any) -> Any:
        shapes.add((*x.shape, *x.stride()))
        return RIGHT.forward(site, x, *parameters)

    shared(made(), RIGHT._replace(forward=noted))
    assert shapes == {(2, 5, 4, 20, 4, 1)}


# Gradients that lie in memory in another way


def site(pieces: Pieces, rule: Rule) -> Site:
    return Site(pieces.sites, rule, linear, ("linear", 2), 0, 1)


@pytest.mark.parametrize("trial", [False, True])
def test_a_rule_that_does_not_do_for_a_gradient_is_given_up(trial: bool) -> None:
    """Where the shape has been compared without this gradient, the pack is compared anew."""
    pieces = made(trial)
    with pytest.raises(RefusedError, match=r"^linear gets a gradient that lies in memory in another way$") as caught:
        pieces.sites.set_alone(site(pieces, RIGHT))
    assert caught.value.untried == (not trial)
    assert pieces.findings.sites == ({("linear", 2): ALONE} if trial else {})


def test_a_trial_compares_gradients_of_another_layout() -> None:
    def last_dimension_only(site: Site, grad: Tensor, *rest: Any) -> Any:
        dx, dw, db = RIGHT.backward(site, grad, *rest)
        return dx, dw, db if grad.is_contiguous() else db + 1.0

    pieces = made()
    arguments = (torch.ones(10, 4, requires_grad=True), *(p.detach() for p in pieces.parameters))
    turned = torch.ones(3, 10).t()
    unusual = site(pieces, RIGHT._replace(backward=last_dimension_only))
    assert pieces.sites.holds(unusual, torch.ones(10, 3), *arguments)
    assert not pieces.sites.holds(unusual, turned, *arguments)
    assert not pieces.sites.holds(site(pieces, RIGHT), turned, *arguments), "this was found before"
    assert not pieces.streams.disturbed()
    later = made(trial=False)
    assert not later.sites.holds(site(later, RIGHT), turned, *arguments), "not known"
    later.findings.sites = pieces.findings.sites
    assert later.sites.holds(unusual, torch.ones(10, 3), *arguments)
    assert not later.sites.holds(unusual, turned, *arguments)


# The clock


@pytest.mark.parametrize(
    ("times_s", "taken"),
    [
        ([1.1, 1.0], 0),  # the first has the fewest operators
        ([6.0, 5.0], 1),
        ([3.0, 2.0], 1),
        ([2.0, 3.0], 0),
        ([1.1, 3.0, 1.0], 0),
        ([3.0, 1.1, 1.0], 1),
    ],
)
def test_the_fastest_rule_is_taken(times_s: list[float], taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [RIGHT._replace() for _ in times_s]
    seconds = {id(rule): time_s for rule, time_s in zip(rules, times_s)}
    monkeypatch.setattr(Site, "backward_s", lambda self, *tensors: seconds[id(self.rule)])
    pieces = made()
    layer(pieces, *rules)
    assert chosen(pieces) == [taken]


@pytest.mark.parametrize("first", [WRONG, fails(RuntimeError("no such kernel"))])
def test_a_rule_that_is_not_exact_is_passed_over(first: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Site, "backward_s", lambda self, *tensors: 1.0)
    pieces = made()
    assert layer(pieces, first, RIGHT).tolist() == [[11.0, 28.0, 45.0]] * 10
    assert chosen(pieces) == [1]


def test_a_single_rule_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Site, "backward_s", lambda self, *tensors: pytest.fail("it is timed"))
    pieces = made()
    assert layer(pieces).shape == (10, 3)


def test_too_little_memory_says_nothing_about_a_rule() -> None:
    pieces = made()
    with pytest.raises(torch.OutOfMemoryError):
        layer(pieces, fails(torch.OutOfMemoryError("CUDA out of memory.")))
    assert chosen(pieces) == []
