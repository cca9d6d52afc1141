"""How far a run is. A task that anneals something takes it from here, and needs no counter of its own.

A counter in a task or a model counts the calls of one rank, so its value depends on the number of ranks. The number
of the step does not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a run stands, the same on every rank and in every micro-batch of a step.

    Attributes:
        step: optimizer steps made so far; 0 in the first step.
        epoch: passes over the training set before this one; 0 in the first.
        total_steps: the length of the run in steps; an upper bound if AdaScale chooses the length.
    """

    step: int
    epoch: int
    total_steps: int

    @property
    def fraction(self) -> float:
        """The fraction of the run that is done: 0 in the first step, 1 at the end."""
        return self.step / self.total_steps


# A task's methods ask for the progress by taking a keyword of this name.
KEYWORD = "progress"
_METHODS = ("forward", "loss", "sample_losses", "augment")


def _asks(method: Callable[..., Any] | None) -> bool:
    return method is not None and KEYWORD in inspect.signature(method).parameters


def takes_progress(task: Any) -> bool:
    """Whether any of a task's methods takes the keyword `progress`."""
    return any(_asks(getattr(task, name, None)) for name in _METHODS)


class TaskCalls:
    """A task's methods of a step, with one way to call them, whether or not they take `progress`.

    Call each as in `tasks.protocol.Task`, with the progress as one more argument at the end.

    Attributes:
        sample_losses, augment: None if the task has none.
        follow_progress: whether any but `augment` takes `progress`.
    """

    def __init__(self, task: Any) -> None:
        self.follow_progress = any(_asks(getattr(task, name, None)) for name in _METHODS if name != "augment")
        self.forward: Callable[..., Any] = _caller(task.forward)
        self.loss: Callable[..., Any] = _caller(task.loss)
        self.sample_losses = _optional(task, "sample_losses")
        self.augment = _optional(task, "augment")


def _optional(task: Any, name: str) -> Callable[..., Any] | None:
    method = getattr(task, name, None)
    return None if method is None else _caller(method)


def _caller(method: Callable[..., Any]) -> Callable[..., Any]:
    # The signature is read once, when the run is built: reading it costs more than a call.
    if _asks(method):
        return functools.partial(_with_keyword, method)
    return functools.partial(_without, method)


def _with_keyword(method: Callable[..., Any], *arguments: Any) -> Any:
    return method(*arguments[:-1], progress=arguments[-1])


def _without(method: Callable[..., Any], *arguments: Any) -> Any:
    return method(*arguments[:-1])
