"""Which model of a run is the best on validation, and when a run has seen enough."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.run.small import PlainEngine, config_of
from trainer.errors import UserError
from trainer.run.best import BestModel


def best_of(own_choice: tuple[str, str] | None = ("error", "min"), **best: Any) -> BestModel:
    return BestModel(config_of(best=best), own_choice)


def engine_at(value: float) -> PlainEngine:
    """A model whose parameters and buffers all have one value."""
    engine = PlainEngine(nn.BatchNorm1d(2))
    move(engine, value)
    return engine


def move(engine: PlainEngine, value: float) -> None:
    for tensor in engine.model_state().values():
        tensor.fill_(value)


def offer(best: BestModel, engine: PlainEngine, step: int, error: float, loss: float = 1.0) -> None:
    move(engine, step)
    best.offer(engine, {"error": error, "loss": loss}, step)


def test_the_best_parameters_and_buffers_come_back() -> None:
    best, engine = best_of(), engine_at(0)
    for step, error in ((5, 0.9), (10, 0.3), (15, 0.6)):
        offer(best, engine, step, error)
    best.restore(engine)
    assert {float(t.flatten()[0]) for t in engine.model_state().values()} == {10.0}
    assert best.summary() == {"step": 10, "metric": "error", "mode": "min", "value": 0.3}
    assert best.metrics == {"error": 0.3, "loss": 1.0}


def test_more_is_better_where_the_mode_says_so() -> None:
    best, engine = best_of(metric="error", mode="max"), engine_at(0)
    for step, error in ((5, 0.2), (10, 0.9), (15, 0.6)):
        offer(best, engine, step, error)
    assert (best.step, best.value) == (10, 0.9)


def test_among_equals_the_loss_decides_and_then_the_first() -> None:
    best, engine = best_of(), engine_at(0)
    for step, loss in ((5, 0.7), (10, 0.4), (15, 0.4), (20, 0.5)):
        offer(best, engine, step, 0.3, loss)
    assert best.step == 10
    best.restore(engine)
    assert float(engine.model_state()["weight"][0]) == 10.0


def test_a_metric_that_is_not_finite_is_never_the_best() -> None:
    best, engine = best_of(), engine_at(0)
    for step, error in ((5, math.nan), (10, -math.inf), (15, 0.6), (20, math.nan)):
        offer(best, engine, step, error)
    assert (best.step, best.value) == (15, 0.6)
    assert best.metrics["error"] == 0.6


def test_a_run_has_seen_enough_after_so_many_validations_without_progress() -> None:
    """A tie with a better loss is kept, and is no progress."""
    best, engine = best_of(patience_evaluations=2), engine_at(0)
    seen = []
    for step, (error, loss) in enumerate([(0.9, 1), (0.5, 1), (0.6, 1), (0.4, 1), (0.4, 0.5), (math.nan, 1)], 1):
        offer(best, engine, step, error, loss)
        seen.append(best.enough)
    assert seen == [False, False, False, False, False, True]
    assert best.step == 5


def test_without_patience_no_run_has_seen_enough() -> None:
    best, engine = best_of(), engine_at(0)
    for step in range(1, 50):
        offer(best, engine, step, float(step))
    assert not best.enough


def test_what_is_compared() -> None:
    """The config's metric, else the task's own, else the loss."""
    assert (best_of(None).metric, best_of(None).mode) == ("loss", "min")
    assert (best_of(("accuracy", "max")).metric, best_of(("accuracy", "max")).mode) == ("accuracy", "max")
    other = best_of(("accuracy", "max"), metric="accuracy", mode="min")
    assert (other.metric, other.mode) == ("accuracy", "min")
    named = best_of(("accuracy", "max"), metric="loss")
    assert (named.metric, named.mode) == ("loss", "min")
    assert best_of(("accuracy", "max"), metric="accuracy").mode == "max"


def test_a_metric_that_is_not_there_is_named_with_its_neighbour() -> None:
    with pytest.raises(
        UserError, match=r'"trainer\.best\.metric": validation has no metric "eror"\. Did you mean "error"'
    ):
        best_of(metric="eror", mode="min").check({"error": 0.5, "loss": 1.0})


def test_why_a_metric_is_not_there_is_said() -> None:
    with pytest.raises(UserError) as caught:
        best_of(metric="auroc", mode="max").check({"error": 0.1, "loss": 1.0}, lambda name: f"no class for {name}")
    assert '"auroc": no class for auroc: error, loss.' in str(caught.value)


def test_whether_more_or_less_is_better_is_asked_where_it_is_not_known() -> None:
    """Of the task's own metric it is known, and of usual names."""
    with pytest.raises(UserError, match=r'"trainer\.best\.mode" is needed: is a low or a high score better\?'):
        best_of(metric="score").check({"score": 0.5, "loss": 1.0})
    for known in (best_of(metric="score", mode="max"), best_of(metric="loss"), best_of(metric="error")):
        known.check({"score": 0.5, "error": 0.5, "loss": 1.0})
    for name, mode in (("accuracy", "max"), ("rmse", "min")):
        usual = best_of(metric=name)
        usual.check({name: 0.5, "loss": 1.0})
        assert usual.mode == mode


def test_a_checkpoint_keeps_the_best_model_and_the_patience() -> None:
    best, engine = best_of(patience_evaluations=2), engine_at(0)
    for step, error in ((5, 0.3), (10, 0.6)):
        offer(best, engine, step, error)
    tensors, values = best.state_dict()
    again, other = best_of(patience_evaluations=2), engine_at(0)
    again.load_state_dict({name: t.clone() for name, t in tensors.items()}, values, other)
    assert again.summary() == best.summary()
    offer(again, other, 15, 0.5)
    assert again.enough
    again.restore(other)
    assert float(other.model_state()["weight"][0]) == 5.0
    assert torch.equal(tensors["weight"], torch.full((2,), 5.0)), "the first run's copy is its own"


def test_a_checkpoint_before_the_first_validation() -> None:
    again, engine = best_of(), engine_at(0)
    tensors, values = best_of().state_dict()
    again.load_state_dict(tensors, values, engine)
    offer(again, engine, 5, 7.0)
    assert (again.step, again.value) == (5, 7.0)
