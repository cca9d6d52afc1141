"""What a process of a search does: it looks at the task before any trial, and makes runs that leave no files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.search.small import BASE, write_own
from trainer.config.keys import Config, parse
from trainer.errors import NonFiniteError, Stopped, UserError
from trainer.ranks.place import Ranks
from trainer.run import run as runs
from trainer.search.runner import search
from trainer.search.trial import PRUNED, _declared, make

ALONE = Ranks()


@pytest.fixture
def config() -> Config:
    return parse({key: value for key, value in BASE.items() if key != "search"})


def stopped(reason: str) -> Stopped:
    error = Stopped(reason)
    error.reason = reason
    return error


def pretended(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Takes the place of a run. It gets the folder, and who listens."""

    def instead(config: Config, ranks: Ranks, *, listener: Any, tested: bool, **_: Any) -> dict[str, Any]:
        folder = Path(str(config.trainer.output_dir))
        folder.mkdir()
        (folder / "manifest.json").write_text('{"samples": {"train": 64, "validation": 24}}')
        result: dict[str, Any] = run(listener)
        return result | {"tested": tested}

    monkeypatch.setattr(runs, "run", instead)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"search.parameters": {"trainer.task_options.hiden": [1, 2]}}, 'Did you mean "hidden"?'),
        ({"search.parameters": {"trainer.task_options.hidden": ["a", "b"]}}, "must be a whole number"),
    ],
)
def test_an_option_that_the_task_does_not_take_is_said_before_a_trial(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        search(str(write_own(tmp_path)), changed)
    assert said in str(caught.value)


def test_a_task_without_validation_is_refused(tmp_path: Path) -> None:
    path = write_own(tmp_path)
    task = tmp_path / "task.py"
    task.write_text(task.read_text().replace('"validation": slice', '"test": slice'))
    with pytest.raises(UserError, match="has no validation split"):
        search(str(path))


def test_validations_are_told_and_kept_as_curves_and_the_folder_is_gone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []

    def run(listener: Any) -> dict[str, Any]:
        for epoch, accuracy in ((1, 0.5), (2, 0.75)):
            listener("log", {"train/loss": 1.0})
            record = {"split": "validation", "epoch": epoch, "step": 8, "eval/validation/accuracy": accuracy}
            assert listener("evaluation", record) is None
        listener("evaluation", {"split": "test", "epoch": 2, "step": 8, "eval/test/accuracy": 0.9})
        return {"status": "finished", "metrics": {}}

    pretended(monkeypatch, run)
    found = make(ALONE, config, str(tmp_path / "trial"), False, heard.append)
    assert heard == [{"epoch": 1, "metrics": {"accuracy": 0.5}}, {"epoch": 2, "metrics": {"accuracy": 0.75}}]
    assert found["curves"] == {"accuracy": {"epoch": [1, 2], "value": [0.5, 0.75]}}
    assert (found["validation_samples"], found["tested"]) == (24, False)
    assert not (tmp_path / "trial").exists()


def test_with_several_ranks_every_record_asks_whether_to_stop(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer to a validation comes only with a later question."""
    heard: list[Any] = []

    def run(listener: Any) -> dict[str, Any]:
        listener("log", {"train/loss": 1.0})
        return {"metrics": {}}

    pretended(monkeypatch, run)
    make(Ranks(0, 2), config, str(tmp_path / "two"), False, heard.append)
    assert heard == [None]


def test_a_run_that_is_pruned_or_not_finite_is_a_result_and_a_signal_is_none(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(error: Exception) -> dict[str, Any]:
        def run(listener: Any) -> dict[str, Any]:
            raise error

        pretended(monkeypatch, run)
        return make(ALONE, config, str(tmp_path / "trial"), False, lambda event: None)

    assert made(stopped(PRUNED))["status"] == "pruned"
    infinite = NonFiniteError("the loss is nan")
    infinite.good_steps = 5
    found = made(infinite)
    assert (found["status"], found["steps"], found["reason"]) == ("not finite", 5, "the loss is nan")
    with pytest.raises(Stopped):
        made(stopped("SIGTERM"))
    assert not (tmp_path / "trial").exists()


def test_the_type_that_a_task_declares_for_an_option() -> None:
    """It decides whether a range such as 0 to 1 is of whole numbers."""

    class Plain:
        def __init__(self, dropout: float = 0.1, hidden: int = 8) -> None: ...

    @dataclasses.dataclass
    class Options:
        width: float = 1.0

    class Declaring:
        def __init__(self, **options: Any) -> None: ...

    Declaring.Options = Options  # type: ignore[attr-defined]
    assert [_declared(Plain, name) for name in ("dropout", "hidden", "other")] == [float, int, None]
    assert [_declared(Declaring, name) for name in ("width", "other")] == [float, None]
