"""Callbacks: what each hook gets, which objects are none, and what a failure does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer import Callback, CallbackError, Result, UserError
from trainer.api.callbacks import Callbacks

RESULT = Result(Path("runs/x"), {"metrics": {}})


class Hears:
    """Inherits from nothing."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_evaluation(self, split: str, metrics: dict[str, float], step: int) -> None:
        self.heard.append((split, dict(metrics), step))
        metrics.clear()

    def on_log(self, record: dict[str, float]) -> None:
        self.heard.append(dict(record))
        record.clear()

    def on_end(self, result: Result) -> None:
        self.heard.append(result)


def test_each_hook_gets_a_copy_of_its_own() -> None:
    one, other = Hears(), Hears()
    heard = Callbacks([one, other])
    assert heard.listener("folder", {"path": "runs/x"}) is None and heard.folder == "runs/x"
    record = {"step": 2, "train/loss": 0.5}
    assert heard.listener("log", record) is None and record == {"step": 2, "train/loss": 0.5}
    heard.listener("evaluation", {"split": "test", "step": 2, "epoch": 1, "eval/test/loss": 0.25, "eval/test/f/1": 1.0})
    heard.end(RESULT)
    assert one.heard == other.heard == [record, ("test", {"loss": 0.25, "f/1": 1.0}, 2), RESULT]
    heard.raise_failure("unused")  # nothing has failed


def test_hooks_are_called_outside_of_the_run() -> None:
    places: list[str] = []

    @contextlib.contextmanager
    def outside() -> Iterator[None]:
        places.append("out")
        yield
        places.append("back")

    class Notes(Callback):
        def on_log(self, record: dict[str, float]) -> None:
            places.append("hook")
            raise KeyError("a slip")

    heard = Callbacks([Notes()])
    heard.outside = outside
    heard.listener("log", {"step": 1})
    assert places == ["out", "hook", "back"]  # also after a failure


class Foreign(BaseException):
    """As a debugger or a test runner ends a program."""


@pytest.mark.parametrize("kind", [KeyError, SystemExit, KeyboardInterrupt, Foreign])
def test_after_a_failure_none_is_called_and_the_run_is_told_to_stop(kind: type[BaseException]) -> None:
    class Fails(Hears):
        def on_evaluation(self, split: str, metrics: dict[str, float], step: int) -> None:
            super().on_evaluation(split, metrics, step)
            raise kind("a slip")

    one, other = Fails(), Hears()
    heard = Callbacks([one, other])
    record = {"split": "test", "step": 2, "eval/test/loss": 0.25}
    for _ in range(2):
        assert heard.listener("evaluation", record) == (
            f"the callback Fails.on_evaluation() has raised {kind.__name__}"
        )
    heard.end(RESULT)
    assert len(one.heard) == 1 and other.heard == []
    with pytest.raises(CallbackError if kind in (KeyError, SystemExit) else kind) as caught:
        heard.raise_failure("The run was stopped.")
    if kind is KeyboardInterrupt:  # the user's
        assert str(caught.value) == "The run was stopped."
    elif kind is not Foreign:
        said = f"The callback Fails.on_evaluation() has raised {kind.__name__}: {kind('a slip')}\nThe run was stopped."
        assert str(caught.value) == said and isinstance(caught.value.__cause__, kind)


class Typo(Callback):
    def on_logs(self, record: dict[str, float]) -> None: ...


class OfAnotherLibrary:
    def on_epoch_end(self) -> None: ...


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Hears, "callbacks[1] is the class Hears. Give an object: Hears()."),
        (3, "callbacks[1] is a int, which has none of the methods on_log, on_evaluation, on_end."),
        (Typo(), 'callbacks[1]: Typo.on_logs is no hook. Did you mean "on_log"?'),
        (OfAnotherLibrary(), "callbacks[1]: OfAnotherLibrary.on_epoch_end is no hook. "),
    ],
)
def test_what_is_no_callback(callback: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        Callbacks([Hears(), callback])
    assert words in str(caught.value)


def test_an_object_may_have_hooks_for_others_too() -> None:
    class Both(OfAnotherLibrary):
        def on_log(self, record: dict[str, float]) -> None: ...

    Callbacks([Both()])
