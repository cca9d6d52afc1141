"""Callbacks: what a program is told about its run, and what happens if a callback fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..config.schema import near
from ..errors import TrainerError, UserError
from .arguments import objects_in

if TYPE_CHECKING:
    from .result import Result

_HOOKS = ("on_log", "on_evaluation", "on_end")


class Callback:
    """Is told about a run, in the process and the thread that called `train`; with several ranks, about rank 0 only.

    Inherit from it, or give any object that has some of these methods. A callback cannot change a bit of the run: it
    gets its own copies of plain numbers, and with several ranks the run is in other processes. At one rank the run is
    in this process. There a callback has the process's own settings and random generators. The run then continues with
    its own, whatever the callback has done to torch's settings, generators or the environment. (It could still search
    the process for the model, and change that. Nothing can prevent it, and the run does not notice.)

    If a callback raises an exception, no callback is called any more, and the run stops with a checkpoint. Then `train`
    raises `CallbackError`, also after `sys.exit()`. After a KeyboardInterrupt it raises one, as after Ctrl-C.
    """

    def on_log(self, record: dict[str, float]) -> None:
        """Called after each `trainer.log_every_steps` steps. On a GPU the call comes one such window later.

        Args:
            record: a line of metrics.jsonl: "step" (optimizer steps made), "epoch", "time_s" (seconds of training),
                "train/loss" (the mean over the window's samples), "train/learning_rate",
                "throughput/samples_per_s", and others by their names in TensorBoard.
        """

    def on_evaluation(self, split: str, metrics: dict[str, float], step: int) -> None:
        """Called after an evaluation.

        Args:
            split: "validation" or "test".
            metrics: "loss", and the task's metrics.
            step: optimizer steps made.
        """

    def on_end(self, result: Result) -> None:
        """Called when the run has finished and all its files are written; not if it was stopped or has failed."""


class CallbackError(TrainerError):
    """A callback has raised an exception, which is this error's `__cause__`."""


class Callbacks:
    """The callbacks of one run. Its `listener` is what a run calls.

    Args:
        callbacks: objects with hooks.
        outside: a context in which they are called.

    Attributes:
        folder: the run's output folder, as soon as it is known.
        failed: why the run has to stop; None until a callback fails.

    Raises:
        UserError: they are no list, or an object has no hook, or a hook with a misspelt name.
    """

    def __init__(
        self,
        callbacks: Iterable[object],
        outside: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._callbacks, self.outside = objects_in("callbacks", callbacks), outside
        for number, callback in enumerate(self._callbacks):
            _check(callback, f"callbacks[{number}]")
        self.folder: str | None = None
        self.failed: str | None = None
        self._error: BaseException | None = None

    def listener(self, kind: str, values: dict[str, Any]) -> str | None:
        """Calls the hooks for an event, as of `run.run.Listener`. Returns why the run has to stop, or None."""
        if kind == "folder":
            self.folder = values["path"]
        elif kind == "log":
            self._call("on_log", lambda: (dict(values),))
        elif kind == "evaluation":
            prefix = f"eval/{values['split']}/"
            metrics = {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}
            self._call("on_evaluation", lambda: (values["split"], dict(metrics), int(values["step"])))
        return self.failed

    def end(self, result: Result) -> None:
        """Calls on_end."""
        self._call("on_end", lambda: (result,))

    def _call(self, hook: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
        if not self._callbacks or self.failed is not None:
            return
        with self.outside():
            for callback in self._callbacks:
                method = getattr(callback, hook, None)
                if method is None:
                    continue
                try:
                    method(*arguments())  # each callback has a copy of its own
                except BaseException as error:  # sys.exit(), too: first the run has to stop with a checkpoint
                    where = f"{type(callback).__name__}.{hook}()"
                    self.failed = f"the callback {where} has raised {type(error).__name__}"
                    self._error = error
                    return

    def raise_failure(self, ended: str) -> None:
        """Raises the error of a callback, if one has failed.

        Args:
            ended: how the run has ended, as a sentence.
        """
        if self._error is None:
            return
        if isinstance(self._error, KeyboardInterrupt):  # Ctrl-C while a callback was at work, or the callback's own
            raise KeyboardInterrupt(ended) from self._error
        if not isinstance(self._error, (Exception, SystemExit)):  # meant for what runs the program, such as a debugger
            raise self._error
        why = f"T{str(self.failed)[1:]}: {self._error}"
        raise CallbackError(f"{why}\n{ended}") from self._error


def _check(callback: object, name: str) -> None:
    if isinstance(callback, type):
        raise UserError(f"{name} is the class {callback.__name__}. Give an object: {callback.__name__}().")
    hooks = [hook for hook in dir(callback) if hook.startswith("on_") and callable(getattr(callback, hook))]
    # Objects of other libraries may have hooks for those libraries, too.
    unknown = [] if set(hooks) & set(_HOOKS) and not isinstance(callback, Callback) else set(hooks) - set(_HOOKS)
    for hook in sorted(unknown):
        raise UserError(f"{name}: {type(callback).__name__}.{hook} is no hook. {near(hook, _HOOKS)}")
    if not hooks:
        raise UserError(
            f"{name} is a {type(callback).__name__}, which has none of the methods {', '.join(_HOOKS)}.\n"
            "A callback is an object with one of them, or of a class that inherits from trainer.Callback."
        )
