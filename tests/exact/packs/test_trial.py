"""A pack's calls, compared with those of its micro-batches alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.pieces import Pieces, trained
from trainer.exact.packs.nested import flat
from trainer.exact.packs.tensors import SAME
from trainer.exact.packs.trace import Call, Shape, Trace
from trainer.exact.packs.trial import Trial
from trainer.exact.packs.verdicts import RefusedError


def call(func: Any, *args: Any, outside: bool = False, **noted: Any) -> Call:
    """A call of a micro-batch alone. outside: whether nobody saw its tensors being made."""
    given = [Shape(v.shape, v if outside else None) if isinstance(v, Tensor) else v for v in flat((args, {}), [])]
    return Call(func, given, [], **noted)


def trace(*calls: Call, losses: int = 0) -> Trace:
    """A micro-batch alone; its last calls, so many, belong to the loss."""
    own = Trace({}, frozenset(), ())
    own.calls, own.forward_calls = list(calls), len(calls) - losses
    return own


def made(*traces: Trace | None, pieces: Pieces | None = None) -> tuple[Pieces, Trial]:
    """A trial of two micro-batches that call the same, if there is one trace only."""
    own = Pieces() if pieces is None else pieces
    traces = traces * 2 if len(traces) == 1 else traces
    return own, Trial(traces, own.g, own.tensors, own.shares, own.findings, "cpu")


ONE, TWO = torch.zeros(2, 3), torch.zeros(4, 3)  # a micro-batch's, and a pack's


# The calls of the pack


@pytest.mark.parametrize("first_counts", [True, False])
def test_calls_are_compared_in_their_order(first_counts: bool) -> None:
    calls = trace(call(torch.tanh, ONE), call(Tensor.view, ONE, 2, 3), call(torch.relu, ONE))
    pieces, trial = made(calls if first_counts else None, calls)
    x = pieces.parted(TWO.clone())
    assert trial.compared(torch.tanh, (x,), {}) == (calls.calls[0], frozenset())
    with pytest.raises(RefusedError, match=r"forward\(\) calls fewer functions than with a micro-batch alone"):
        trial.end_of_forward()
    assert trial.compared(Tensor.view, (x, 4, 3), {}) == (calls.calls[1], {2})
    assert trial.compared(torch.relu, (x,), {})[0] is calls.calls[2]
    assert trial.position == 3
    trial.end_of_forward()
    with pytest.raises(RefusedError, match=r"^relu is not called for a micro-batch alone$"):
        trial.compared(torch.relu, (x,), {})


def test_another_call_is_refused() -> None:
    pieces, trial = made(trace(call(torch.tanh, ONE)))
    with pytest.raises(RefusedError, match=r"^relu is called where a micro-batch alone calls tanh$"):
        trial.compared(torch.relu, (pieces.parted(TWO.clone()),), {})


def test_sizes_follow_from_the_micro_batches() -> None:
    number, table = torch.zeros(()), torch.zeros(3)
    pieces, trial = made(trace(call(torch.stack, ONE, number, table), call(torch.stack, ONE)))
    given = (pieces.parted(TWO.clone()), pieces.numbers(torch.zeros(2)), pieces.tensors.mark(table.clone(), SAME))
    trial.compared(torch.stack, given, {})
    assert pieces.findings.outside == {}, "they were made in the pack"
    with pytest.raises(RefusedError, match="whose size does not follow"):
        trial.compared(torch.stack, (pieces.tensors.mark(TWO.clone(), SAME),), {})


def test_parameters_constants_and_the_very_tensors_from_outside_may_be_given() -> None:
    weight, constant, outside = trained(3), torch.ones(3), torch.ones(3)
    pieces = Pieces(weight, constants=[constant])
    own = [call(torch.tanh, weight), call(torch.tanh, constant), call(torch.tanh, outside, outside=True)]
    _, trial = made(trace(*own), pieces=pieces)
    for tensor in (weight, constant, outside):
        trial.compared(torch.tanh, (tensor,), {})
    assert {id(constant), id(outside)} == set(pieces.findings.outside)
    assert pieces.findings.outside[id(outside)]() is outside


def test_an_unknown_tensor_is_refused() -> None:
    _, trial = made(trace(call(torch.tanh, torch.ones(3), outside=True)))
    with pytest.raises(RefusedError, match=r"^tanh gets a tensor that packs have not seen being made$"):
        trial.compared(torch.tanh, (torch.ones(3),), {})


@pytest.mark.parametrize("func", [torch.tanh, F.batch_norm])
def test_statistics_are_for_normalisation_only(func: Any) -> None:
    norm = nn.BatchNorm1d(3)
    pieces = Pieces(model=norm)
    pieces.statistics.begin()
    mean = norm.running_mean
    _, trial = made(trace(call(func, mean, outside=True)), pieces=pieces)
    if func is F.batch_norm:
        trial.compared(func, (mean,), {})
    else:
        with pytest.raises(RefusedError, match=r"^tanh of BatchNorm's statistics$"):
            trial.compared(func, (mean,), {})


# Calls for one micro-batch at a time


def inner(*calls: Call) -> Trace:
    """A micro-batch whose second call is a module that makes these calls, and whose loss calls relu."""
    return trace(call(torch.tanh, ONE), call(nn.GRU, ONE, inner=calls), call(torch.relu, ONE), losses=1)


def test_a_module_and_the_loss_are_followed_call_by_call() -> None:
    pieces, trial = made(inner(call(torch.exp, ONE), call(torch.sin, ONE)))
    x = pieces.parted(TWO.clone())
    trial.follow(torch.cos, (x,), {}, (ONE,))  # nothing is computed alone so far
    for k in range(2):
        trial.begin_alone(k, 1)
        trial.follow(torch.exp, (x,), {}, ((ONE,), {}))
        trial.follow(torch.sin, (x,), {}, ((ONE,), {}))
        with pytest.raises(RefusedError, match=r"^sin is not called for a micro-batch alone$"):
            trial.follow(torch.sin, (x,), {}, ((ONE,), {}))
        trial.begin_alone(k, None)
        trial.follow(torch.relu, (x,), {}, ((ONE,), {}))


def test_another_call_for_a_micro_batch_is_refused() -> None:
    pieces, trial = made(inner(call(torch.exp, ONE)))
    x = pieces.parted(TWO.clone())
    trial.begin_alone(1, 1)
    with pytest.raises(RefusedError, match=r"^exp gets a tensor of another size than in a micro-batch alone$"):
        trial.follow(torch.exp, (x,), {}, ((ONE[:1],), {}))


def test_each_micro_batch_follows_its_own_calls() -> None:
    pieces, trial = made(inner(call(torch.exp, ONE)), inner(call(torch.sin, ONE)))
    x = pieces.parted(TWO.clone())
    trial.begin_alone(0, 1)
    trial.follow(torch.exp, (x,), {}, ((ONE,), {}))
    trial.begin_alone(1, 1)
    trial.follow(torch.sin, (x,), {}, ((ONE,), {}))


def test_a_micro_batch_whose_calls_say_nothing_is_not_followed() -> None:
    pieces, trial = made(inner(call(torch.exp, ONE)), None)
    trial.begin_alone(0, 1)
    trial.begin_alone(1, 1)
    trial.follow(torch.cos, (pieces.parted(TWO.clone()),), {}, ((ONE,), {}))


LEFT_BEHIND = "^exp gets what another micro-batch has left behind$"


def following(func: Any, tensor: Tensor, pieces: Pieces, outside: Tensor | None = None, changes: bool = False) -> Trial:
    """A trial in which a micro-batch alone has called a function of a tensor. outside: which nobody saw being made."""
    own = Call(func, [1, Shape(tensor.shape, outside), 0], [], changes)
    _, trial = made(inner(own), pieces=pieces)
    trial.begin_alone(0, 1)
    return trial


@pytest.mark.parametrize("kind", ["made here", "a constant", "from outside", "a parameter", "a part", "statistics"])
def test_what_a_micro_batch_has_of_its_own_may_be_given(kind: str) -> None:
    norm, weight, tensor = nn.BatchNorm1d(3), trained(3), torch.ones(3)
    pieces = Pieces(weight, constants=[tensor] if kind == "a constant" else [], model=norm)
    pieces.statistics.begin()
    assert norm.running_mean is not None
    tensor = {"a parameter": weight, "statistics": norm.running_mean}.get(kind, tensor)
    if kind == "made here":
        pieces.tensors.mark_here(tensor)
    if kind == "a part":
        pieces.parted(tensor)
    trial = following(torch.exp, tensor, pieces, tensor if kind == "from outside" else None)
    trial.follow(torch.exp, (tensor,), {}, ((tensor,), {}))


@pytest.mark.parametrize("of", ["nobody", "another micro-batch", "another tensor"])
def test_what_another_micro_batch_has_left_behind_is_refused(of: str) -> None:
    """In an attribute of a module, for example."""
    pieces, tensor = Pieces(), torch.ones(3)
    pieces.tensors.mark_here(tensor)
    if of != "another tensor":
        pieces.tensors.leave_scope()
    else:
        tensor = tensor.clone()
    trial = following(torch.exp, tensor, pieces, torch.ones(3) if of == "another tensor" else None)
    with pytest.raises(RefusedError, match=LEFT_BEHIND):
        trial.follow(torch.exp, (tensor,), {}, ((tensor,), {}))


@pytest.mark.parametrize(
    ("func", "here", "changes", "refused"),
    [
        (Tensor.add_, (True, True), True, False),
        (Tensor.add_, (True, False), True, True),
        (Tensor.add_, (False, False), True, True),
        (torch.add, (True, False), False, False),
        (F.batch_norm, (True, False), True, False),
    ],
)
def test_only_a_micro_batchs_own_tensors_may_be_changed(
    func: Any, here: tuple[bool, bool], changes: bool, refused: bool
) -> None:
    pieces = Pieces()
    tensors = [pieces.parted(torch.ones(3)) for _ in here]
    for tensor, own in zip(tensors, here):
        if own:
            pieces.tensors.mark_here(tensor)
    _, trial = made(inner(call(func, *tensors, changes=changes)), pieces=pieces)
    trial.begin_alone(0, 1)
    if refused:
        with pytest.raises(RefusedError, match=r"^add_ changes a tensor in place for one micro-batch at a time$"):
            trial.follow(func, tuple(tensors), {}, (tensors, {}))
    else:
        trial.follow(func, tuple(tensors), {}, (tensors, {}))


# Memory


def compare(trial: Trial, func: Any = torch.relu, changes: bool = False, aliases: bool = False, **here: bool) -> None:
    """A call that changes, and shares, memory for a micro-batch alone; `changed` and `shares` say whether it does here.

    Where they are not given, it does the same.
    """
    x = torch.ones(3)
    found = x[:2] if here.get("shares", aliases) else x.clone()
    own = call(func, x, changes=changes, aliases=aliases)
    trial.compare_memory(func, (x,), {}, own, found, here.get("changed", changes))


@pytest.mark.parametrize("changes", [False, True])
def test_memory_is_changed_as_for_a_micro_batch_alone(changes: bool) -> None:
    _, trial = made(trace())
    with pytest.raises(RefusedError, match=r"^relu changes a tensor in place for a micro-batch alone, and not here$"):
        compare(trial, changes=changes, changed=not changes)
    compare(trial, F.batch_norm, changes=changes, changed=not changes)  # statistics are compared otherwise


SHARED = "^tensors are changed in place, and relu gives a copy or a view, unlike alone$"


@pytest.mark.parametrize("aliases", [False, True])
@pytest.mark.parametrize("changes_first", [False, True])
def test_where_tensors_are_changed_memory_is_shared_as_for_a_micro_batch_alone(
    aliases: bool, changes_first: bool
) -> None:
    _, trial = made(trace())
    for changes in (changes_first, not changes_first):
        trial.check_order()
        compare(trial, Tensor.add_ if changes else torch.relu, changes, aliases, shares=aliases == changes)
    with pytest.raises(RefusedError, match=SHARED):
        trial.check_order()


@pytest.mark.parametrize("aliases", [False, True])
def test_memory_that_is_shared_alike_may_be_changed(aliases: bool) -> None:
    _, trial = made(trace())
    compare(trial, changes=True, aliases=aliases)
    compare(trial, changes=False, aliases=not aliases)
    trial.check_order()


def test_a_module_that_returns_a_view_of_its_input_gives_a_copy() -> None:
    _, trial = made(trace())
    trial.note_copy("relu")
    trial.check_order()
    compare(trial, changes=True)
    with pytest.raises(RefusedError, match=SHARED):
        trial.check_order()


# The order in which gradients are added

SEVERAL = "^{} uses a tensor several times that others use as well$"


def several(function: Any, uses: int = 2, func: Any = torch.einsum, value: Tensor | None = None) -> Trial:
    """A trial with a call of the first micro-batch's part of a tensor, which so many calls use."""
    pieces, trial = made(trace(), pieces=Pieces(trained(4), trained(4)) if value is None else Pieces(trained(4), value))
    x = pieces.parted(torch.ones(4, requires_grad=True)) if value is None else value
    for _ in range(uses):
        trial.note_uses((x, [x], torch.ones(4)))
    trial.note_several(func, function(pieces.shares.own(x, 0)))
    return trial


USED_ONCE: dict[str, Any] = {
    "once": lambda x: x * 2.0,
    "by what is used twice": lambda x: (h := x.exp()) * h,
    "by what several results come from": lambda x: (h := x.exp(), h.sin(), [h.cos()]),
    "as it is": lambda x: x,
    "beside numbers of another": lambda x: [x * 2.0, torch.ones(3)],
    "not at all": lambda x: torch.ones(3),
}
USED_TWICE: dict[str, Any] = {
    "at once": lambda x: x * x,
    "far away": lambda x: x.exp().sin() + x.cos() * torch.ones(2),
    "for several results": lambda x: {"a": x.exp(), "b": [x.sin()]},
    "three times": lambda x: x * x + x,
}


@pytest.mark.parametrize("how", USED_ONCE)
def test_a_call_may_use_a_tensor_once_beside_others(how: str) -> None:
    several(USED_ONCE[how]).check_order()


@pytest.mark.parametrize("how", USED_TWICE)
def test_a_call_may_use_a_tensor_several_times_if_no_other_does(how: str) -> None:
    several(USED_TWICE[how], uses=1).check_order()
    for uses in (2, 3):
        trial = several(USED_TWICE[how], uses)
        with pytest.raises(RefusedError, match=SEVERAL.format("einsum")):
            trial.check_order()


def test_the_first_function_that_does_is_named() -> None:
    pieces, trial = made(trace())
    x = pieces.parted(torch.ones(4, requires_grad=True))
    for func in (torch.hypot, torch.einsum):
        trial.note_uses((x,))
        own = pieces.shares.own(x, 0)
        trial.note_several(func, own * own)
    with pytest.raises(RefusedError, match=SEVERAL.format("hypot")):
        trial.check_order()


def test_tensors_without_gradients_may_be_used_in_any_way() -> None:
    pieces, trial = made(trace())
    x = pieces.parted(torch.ones(4))
    for _ in range(2):
        trial.note_uses((x,))
    own = pieces.shares.own(x, 0)
    trial.note_several(torch.einsum, own * own)
    trial.check_order()


@pytest.mark.parametrize("place", [0, 1])
def test_under_autocast_one_function_may_not_use_a_parameter_several_times(place: int) -> None:
    weights = [trained(4), trained(4)]
    pieces, trial = made(trace(), pieces=Pieces(*weights))
    own = pieces.shares.own(weights[place], 0)
    trial.note_several(nn.GRU, own * own)  # without autocast, it may
    with torch.autocast("cpu", torch.bfloat16):
        trial.note_several(nn.GRU, own * 2.0)
        with pytest.raises(RefusedError, match=r"^GRU uses a parameter several times under autocast$"):
            trial.note_several(nn.GRU, own * own)


def test_under_autocast_other_tensors_may_be_used_several_times() -> None:
    """What follows from a parameter is cast at each use, alone too."""
    pieces, trial = made(trace(), pieces=Pieces(trained(4)))
    followed = pieces.derived.call(torch.exp, pieces.parameters, {}, {0})
    x = pieces.parted(torch.ones(4, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        for tensor in (followed, x):
            own = pieces.shares.own(tensor, 0)
            trial.note_several(nn.GRU, own * own)
    trial.check_order()
