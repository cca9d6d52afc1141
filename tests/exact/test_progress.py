"""Tasks that ask how far the run is are told; tasks that don't ask are called without it."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.exact.progress import Progress, TaskCalls, takes_progress

HALFWAY = Progress(step=5, epoch=2, total_steps=10)


class Silent:
    def forward(self, model: Any, batch: Any) -> Any:
        return "forward", model, batch

    def loss(self, outputs: Any, batch: Any) -> Any:
        return "loss", outputs, batch


class Asking:
    """Asks in every way in which a keyword may stand."""

    def forward(self, model: Any, batch: Any, progress: Progress) -> Any:
        return "forward", model, batch, progress

    def loss(self, outputs: Any, batch: Any, progress: Progress | None = None) -> Any:
        return "loss", outputs, batch, progress

    def augment(self, batch: Any, random: Any, *, progress: Progress) -> Any:
        return "augment", batch, random, progress


def test_the_fraction_is_0_in_the_first_step_and_1_at_the_end() -> None:
    assert [Progress(step, 0, 4).fraction for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_task_that_asks_gets_the_progress_by_its_keyword() -> None:
    calls = TaskCalls(Asking())
    assert calls.forward("model", "batch", HALFWAY) == ("forward", "model", "batch", HALFWAY)
    assert calls.loss("outputs", "batch", HALFWAY) == ("loss", "outputs", "batch", HALFWAY)
    assert calls.augment is not None
    assert calls.augment("batch", "random", HALFWAY) == ("augment", "batch", "random", HALFWAY)


def test_a_task_that_does_not_ask_is_called_without_it() -> None:
    calls = TaskCalls(Silent())
    assert calls.forward("model", "batch", HALFWAY) == ("forward", "model", "batch")
    assert calls.loss("outputs", "batch", HALFWAY) == ("loss", "outputs", "batch")
    assert calls.augment is None


def test_an_augment_that_is_none_is_none() -> None:
    task: Any = Silent()
    task.augment = None
    assert TaskCalls(task).augment is None
    assert not takes_progress(task)


@pytest.mark.parametrize("method", ["forward", "loss", "augment"])
def test_one_method_that_asks_is_enough(method: str) -> None:
    task: Any = Silent()
    assert not takes_progress(task)
    setattr(task, method, getattr(Asking(), method))
    assert takes_progress(task)
