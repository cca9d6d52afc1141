"""Parameters, buffers and optimizer state are taken down, compared by their bits, and put back where they lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.rehearsal.staged import Engine, net
from trainer.rehearsal.model_state import ModelState

pytestmark = pytest.mark.usefixtures("one_thread")


def made(whole: bool = True) -> tuple[ModelState, Any, dict[str, torch.Tensor]]:
    """(the state, the engine that has it, copies of it)."""
    engine: Any = Engine(net())
    engine.model.register_buffer("average", torch.zeros(3))
    return ModelState(engine, whole), engine, {name: tensor.clone() for name, tensor in engine.state().items()}


def same(engine: Any, before: dict[str, torch.Tensor]) -> bool:
    now = engine.state()
    return set(now) == set(before) and all(torch.equal(now[name], before[name]) for name in before)


def test_what_stays_is_not_named() -> None:
    state, engine, before = made()
    assert state.put_back() == []
    assert same(engine, before)


def test_what_was_written_to_is_named_and_restored_in_place() -> None:
    state, engine, before = made()
    places = {name: tensor.data_ptr() for name, tensor in engine.state().items()}
    with torch.no_grad():
        engine.model[0].weight[1, 2] += 1e-7
        engine.model[1].running_mean.add_(1)
        engine.model.average[0] = -0.0  # equal to 0.0, but not its bits
    assert state.put_back() == [("parameter", "0.weight"), ("buffer", "average"), ("buffer", "1.running_mean")]
    assert same(engine, before)
    assert {name: tensor.data_ptr() for name, tensor in engine.state().items()} == places
    assert not torch.signbit(engine.model.average).any()
    assert state.put_back() == []


def test_what_was_assigned_anew_is_the_old_object_again() -> None:
    """As in `self.average = 0.9 * self.average + ...`."""
    state, engine, before = made()
    model, average, weight = engine.model, engine.model.average, engine.model[0].weight
    model.average = 0.9 * average + 1
    model[0].weight = nn.Parameter(torch.ones(4, 5))
    assert sorted(state.put_back()) == [("buffer", "average"), ("parameter", "0.weight")]
    assert model.average is average and model[0].weight is weight
    assert same(engine, before)


def test_what_was_added_or_taken_away_is_named_and_undone() -> None:
    state, engine, before = made()
    model, calls = engine.model, []
    model.register_buffer("last", torch.ones(2))
    del model.average
    model.append(nn.Linear(1, 1))
    model.register_forward_hook(lambda *_: calls.append(1))
    assert sorted(state.put_back()) == [
        ("buffer", "average"),
        ("buffer", "last"),
        ("parameter", "5.bias"),
        ("parameter", "5.weight"),
    ]
    assert same(engine, before)
    model(torch.zeros(2, 5))
    assert calls == [], "its hook is gone"


def test_the_optimizers_state_is_named_only() -> None:
    state, engine, _ = made()
    engine.momentum["0.bias"].mul_(2)
    assert state.put_back() == [("optimizer", "0.bias.momentum")]
    assert float(engine.momentum["0.bias"][0]) == 2.0


def test_parameters_that_a_probe_has_moved_are_put_back_alone() -> None:
    state, engine, before = made()
    with torch.no_grad():
        for parameter in engine.parameters:
            parameter.add_(1)
        engine.model.average.add_(1)
    state.put_back_parameters()
    assert state.put_back() == [("buffer", "average")]
    assert same(engine, before)


def test_a_rank_that_holds_a_part_looks_at_buffers_that_no_order_updates() -> None:
    """With ZeRO: parameters are in pieces, and DeepSpeed's own; running statistics are applied after the step."""
    state, engine, _ = made(whole=False)
    piece = nn.Parameter(torch.ones(1))
    engine.model[0].weight = piece
    engine.model[1].running_var.mul_(2)
    engine.model.average.add_(1)
    assert state.put_back() == [("buffer", "average")]
    assert engine.model[0].weight is piece, "DeepSpeed has put it there"
    assert float(engine.model.average.sum()) == 0.0
