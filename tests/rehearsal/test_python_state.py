"""Python's state: all that a task's own code can change is taken down, compared, and put back."""

from __future__ import annotations

import collections
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.rehearsal.python_state import NUMPYS, PYTHONS, PythonState, changes

COUNT = 0


class Settings:
    def __init__(self) -> None:
        self.temperature, self.history = 1.0, [1, 2]


class Layer(nn.Module):
    made = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.n = nn.Linear(2, 2), 0


class Keeper:
    """A task with state of every kind."""

    shared: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.count, self.loss, self.name, self.nothing = 0, float("nan"), "a", None
        self.list: list[Any] = [1, [2]]
        self.dict: dict[str, Any] = {"a": {"b": 1}}
        self.set, self.queue = {1}, collections.deque([1, 2], maxlen=3)
        self.pair = ([1], 2)
        self.tensor, self.array = torch.ones(3), np.ones(3)
        self.generator, self.random = torch.Generator().manual_seed(1), random.Random(1)
        self.numpy, self.old_numpy = np.random.default_rng(1), np.random.RandomState(1)
        self.settings = Settings()

    def disturb(self, model: Layer) -> None:
        """Changes all of it."""
        global COUNT
        COUNT += 1
        Keeper.shared.append(1)
        Layer.made += 1
        model.n += 1
        self.count, self.loss, self.name, self.nothing = 1, 2.0, "b", "c"
        self.list[1].append(3)
        self.dict["a"]["c"] = 2
        self.set.add(2)
        self.queue.append(3)
        self.pair[0].append(2)
        self.tensor += 1
        self.array += 1
        for draw in (lambda: torch.rand(1, generator=self.generator), self.random.random, self.numpy.random):
            draw()
        self.old_numpy.random_sample()
        self.settings.temperature *= 0.5
        self.settings.history.append(3)
        self.new = 1
        del self.name
        random.random()
        np.random.rand()


NAMES = {
    *(f"the task's attribute {name}" for name in vars(Keeper())),
    "the task's attribute new",
    "the attribute n of the model (Layer)",
    "the class attribute Layer.made",
    "the class attribute Keeper.shared",
    "the global COUNT of test_python_state.py",
    PYTHONS[1],
    NUMPYS[1],
}


def test_everything_is_seen_and_put_back() -> None:
    task, model = Keeper(), Layer()
    state = PythonState(task, model)
    before = state.take()
    objects = {name: id(value) for name, value in vars(task).items()}
    task.disturb(model)
    assert {state.name_of(key) for key in changes(before, state.take())} == NAMES
    state.put_back(before)
    assert changes(before, state.take()) == []
    assert {name: id(value) for name, value in vars(task).items()} == objects, "the same objects"
    assert (COUNT, Keeper.shared, Layer.made, model.n, task.pair) == (0, [], 0, 0, ([1], 2))


def test_one_value_can_be_left() -> None:
    task, model = Keeper(), Layer()
    state = PythonState(task, model)
    before = state.take()
    task.disturb(model)
    key = next(key for key in changes(before, state.take()) if state.name_of(key) == "the task's attribute count")
    state.put_back(before, leave=key)
    assert changes(before, state.take()) == [key]
    state.put_back(before)


def test_generators_can_be_stirred() -> None:
    """As if other micro-batches had drawn from them; and put back."""
    task = Keeper()
    state = PythonState(task, Layer())
    before = state.take()
    state.stir(2)
    generators = {"generator", "random", "numpy", "old_numpy"}
    expected = {f"the task's attribute {name}" for name in generators} | {PYTHONS[1], NUMPYS[1]}
    assert {state.name_of(key) for key in changes(before, state.take())} == expected
    state.put_back(before)
    assert changes(before, state.take()) == []


def test_a_large_task_is_not_copied() -> None:
    """Datasets in attributes cost nothing: large tensors, long lists, and many small arrays."""
    import tracemalloc

    task = Keeper()
    task.large = torch.zeros(1 << 22)  # type: ignore[attr-defined]
    task.many = [np.zeros((200, 200)) for _ in range(3000)]  # type: ignore[attr-defined]
    task.texts = ["word " * 50] * 1_000_000  # type: ignore[attr-defined]
    task.table = {i: [i] * 40 for i in range(4000)}  # type: ignore[attr-defined]
    state = PythonState(task, Layer())
    tracemalloc.start()
    before = state.take()
    state.put_back(before)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100 << 20
    task.large += 1  # type: ignore[attr-defined]
    assert "the task's attribute large" in {state.name_of(key) for key in changes(before, state.take())}
