"""Probes: slips that a comparison of two results would not show, each found from a single micro-batch or two."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.rehearsal.staged import Task, net, staged
from trainer.errors import UserError
from trainer.rehearsal.probes import (
    moved_values,
    refuse_collectives,
    refuse_use_of_running_statistics,
    under_moved_weights,
)
from trainer.rehearsal.python_state import changes
from trainer.rehearsal.results import Finding

pytestmark = pytest.mark.usefixtures("one_thread")


class Talks(Task):
    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        mean = batch["x"].mean(0)
        dist.all_reduce(mean)
        return model(batch["x"] - mean)


def test_a_task_that_talks_to_other_ranks_is_refused(group_of_one: None) -> None:
    refuse_collectives(staged())
    with pytest.raises(UserError, match=r"Talks calls torch\.distributed \(allreduce\) in its forward or loss"):
        refuse_collectives(staged(Talks()))


def test_a_layer_that_talks_by_itself_is_labelled_elsewhere(group_of_one: None) -> None:
    frozen = nn.SyncBatchNorm(1).eval()  # on a processor it runs in evaluation mode only
    refuse_collectives(staged(Talks(), nn.Sequential(nn.Linear(5, 1), frozen)))


class Reads(Task):
    def forward(self, model: Any, batch: dict[str, Tensor]) -> Any:
        return model(batch["x"] + model[1].running_mean.mean())


class Evaluates(Task):
    """Its norm is frozen: it may read its statistics, which are those of before the run."""

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Any:
        return model(batch["x"])


def test_running_statistics_that_are_read_in_training_are_refused() -> None:
    refuse_use_of_running_statistics(staged())
    with pytest.raises(UserError, match="Reads reads the running statistics of a normalisation layer"):
        refuse_use_of_running_statistics(staged(Reads()))
    frozen = net()
    frozen[1].eval()  # type: ignore[index]
    refuse_use_of_running_statistics(staged(Evaluates(), frozen))


def test_a_forward_that_changes_something_of_its_own_is_not_accused_of_reading_statistics() -> None:
    model = net()
    model[4] = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 1))  # type: ignore[operator]
    refuse_use_of_running_statistics(staged(None, model))


class Average(nn.Module):
    """Holds a copy of its weights, which a forward follows once they move."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.teacher = nn.Linear(5, 1), nn.Linear(5, 1)
        self.teacher.load_state_dict(self.own.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.own.parameters()):
                mine.lerp_(other, 0.5)
        return self.own(x) + self.teacher(x)


def moved(model: nn.Module) -> list[str]:
    stage = staged(None, model)
    found = under_moved_weights(stage, stage.numbers[:2], {n: p for p, n in stage.engine.names.items()})
    stage.model_state.put_back_parameters()
    return found


def test_parameters_that_follow_others_show_when_all_have_moved() -> None:
    assert moved(net()) == []
    assert moved(Average()) == ["teacher.weight", "teacher.bias"]


def test_a_forward_that_cannot_work_with_other_weights_is_left_in_peace() -> None:
    class Exact(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert float(self.bias.detach()[0]) == 0.5
            return super().forward(x)

    model = Exact(5, 1)
    nn.init.constant_(model.bias, 0.5)
    assert moved(model) == []


# ---------------------------------------------------------------- counters and generators


class Counts(Task):
    """Calls to forward are counted, and `of` makes a factor of the count."""

    def __init__(self, of: Callable[[int], float]) -> None:
        self.of, self.calls, self.others = of, 0, 0

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        self.calls += 1
        self.others += 1
        return model(batch["x"]) * self.of(self.calls)


def looked_for(task: Any) -> Finding | None:
    """What is found of the values that two micro-batches have moved; they are afterwards where they were."""
    stage = staged(task)
    for number in (0, 1):
        stage.visit(stage.items[number])
    after = stage.python.take()
    found = moved_values(stage, changes(stage.before, after), after)
    assert changes(stage.before, stage.python.take()) == []
    return found


@pytest.mark.parametrize(
    "of",
    [
        lambda calls: 1.0 if calls < 1000 else 2.0,
        lambda calls: 1.0 if calls % 16 else 2.0,
        lambda calls: 1.0 if calls % 13 else 2.0,
        lambda calls: 1.0 if calls < 17 else 2.0,
    ],
    ids=["from the 1,000th on", "every 16th", "every 13th", "from the 17th on"],
)
def test_a_counter_that_matters_only_later_is_named(of: Callable[[int], float]) -> None:
    found = looked_for(Counts(of))
    assert found is not None
    assert (
        found.what == "the task's attribute calls changes from one micro-batch to the next, and forward() depends on it"
    )
    assert "`progress`" in found.remedy


def test_a_counter_that_nothing_depends_on_is_nobodys_fault() -> None:
    assert looked_for(Counts(lambda calls: 1.0)) is None
    assert looked_for(Task()) is None


def test_a_value_that_cannot_be_is_passed_over() -> None:
    """A table has no place 1,000: that says nothing of the run."""
    table = [1.0] * 10
    assert looked_for(Counts(lambda calls: table[calls])) is None


def test_a_generator_that_matters_rarely_is_named() -> None:
    class Rarely(Task):
        def __init__(self) -> None:
            self.noise = random.Random(3)

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            loss, count = super().loss(outputs, batch)
            return (loss * 2 if self.noise.random() < 0.2 else loss), count

    found = looked_for(Rarely())
    assert found is not None
    assert found.what.startswith("loss() draws from a generator of its own (the task's attribute noise)")
