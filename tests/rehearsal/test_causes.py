"""The cause of a difference: found by trying, and named by the module or function and the value that make it."""

from __future__ import annotations

import itertools
import os
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.rehearsal.staged import Task, net, staged
from trainer.rehearsal.causes import explain
from trainer.rehearsal.results import Finding

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one")


def cause(task: Task, model: nn.Module | None = None) -> Finding:
    found = explain(staged(task, model))
    assert found is not None
    return found


class Scales(Task):
    """Its outputs are multiplied by a number that a test chooses."""

    def factor(self, batch: dict[str, Tensor]) -> float:
        return 1.0

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(batch["x"]) * self.factor(batch)


def test_a_task_that_keeps_the_promise_has_none() -> None:
    assert explain(staged()) is None


HIDDEN = itertools.count(1)


def test_what_changes_without_a_trace_is_said_to_be_out_of_sight() -> None:
    class Hidden(Scales):
        def factor(self, batch: dict[str, Tensor]) -> float:
            return float(next(HIDDEN))

    found = cause(Hidden())
    assert found.what == (
        "forward() gives another result when the same micro-batch is computed again from the same state and seed"
    )
    assert "a closure, a cache" in found.remedy


class Layer(nn.Module):
    """Adds what it has not been told to."""

    def forward(self, x: Tensor) -> Tensor:
        return x + next(HIDDEN)


def test_the_innermost_module_is_named() -> None:
    model = net()
    model[2] = nn.Sequential(nn.Tanh(), Layer())  # type: ignore[operator]
    assert cause(Task(), model).what.startswith("the module 2.1 (Layer) gives another result")
    assert cause(Task(), nn.Sequential(Layer(), nn.Linear(5, 1))).what.startswith("the module 0 (Layer)")

    class Whole(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * next(HIDDEN)

    assert cause(Task(), Whole(5, 1)).what.startswith("the model (Whole) gives another result")


def test_a_module_is_not_blamed_for_what_it_is_given() -> None:
    class Before(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
            return model(batch["x"] * next(HIDDEN))

    assert cause(Before()).what.startswith("forward() gives another result")


def test_what_differs_before_the_model_is_augments() -> None:
    class Augments(Task):
        def augment(self, batch: dict[str, Tensor], random: Any) -> dict[str, Tensor]:
            return {**batch, "x": batch["x"] * next(HIDDEN)}

    assert cause(Augments()).what.startswith("augment() gives another result")


def test_the_one_value_that_matters_is_named_among_those_that_change() -> None:
    class Counts(Scales):
        def __init__(self) -> None:
            self.harmless, self.calls, self.seen = 0, 0, [0]

        def factor(self, batch: dict[str, Tensor]) -> float:
            self.harmless += 1
            self.seen.append(1)
            self.calls += 1
            return float(self.calls)

    found = cause(Counts())
    assert (
        found.what == "the task's attribute calls changes from one micro-batch to the next, and forward() depends on it"
    )
    assert "keyword `progress`" in found.remedy


def test_generators_are_told_from_other_state() -> None:
    class Python(Scales):
        def factor(self, batch: dict[str, Tensor]) -> float:
            return random.random()

    class Own(Scales):
        def __init__(self) -> None:
            self.noise = torch.Generator().manual_seed(1)

        def factor(self, batch: dict[str, Tensor]) -> float:
            return float(torch.rand(1, generator=self.noise))

    found = cause(Python())
    assert found.what == "forward() draws from Python's random module, which the trainer doesn't seed"
    assert "torch.rand" in found.remedy
    assert cause(Own()).what.startswith("forward() draws from a generator of its own (the task's attribute noise)")


def test_two_values_that_only_matter_together_are_called_state() -> None:
    class Both(Scales):
        def __init__(self) -> None:
            self.one, self.two = 0, 0

        def factor(self, batch: dict[str, Tensor]) -> float:
            self.one, self.two = self.one + 1, self.two + 1
            return 2.0 if min(self.one, self.two) > 1 else 1.0

    assert cause(Both()).what == (
        "forward() gives another result after other micro-batches than before them: the task or the model keeps state"
    )


@pytest.mark.parametrize("how", ["torch.distributed", "environment"])
def test_numbers_that_depend_on_the_rank(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")

    class Asks(Scales):
        def factor(self, batch: dict[str, Tensor]) -> float:
            return 1.0 + (dist.get_rank() if how == "torch.distributed" else int(os.environ["RANK"]))

    found = cause(Asks())
    assert found.what.startswith("forward() depends on the rank: torch.distributed.get_rank()")
    assert "may depend only on samples, parameters, seed and progress." in found.remedy


def test_a_rank_that_is_needed_for_something_else_is_no_cause() -> None:
    class Fails(Scales):
        def factor(self, batch: dict[str, Tensor]) -> float:
            assert dist.get_rank() == 0
            return 1.0

    assert explain(staged(Fails())) is None
