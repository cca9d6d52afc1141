"""What a slot finds out before any run, and how it makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folds.small import STRONG, overrides
from trainer.config.keys import Config, parse
from trainer.errors import NonFiniteError, UserError
from trainer.exact.splits import Split
from trainer.folds.declaration import load
from trainer.folds.work import _check_batch, _own_note, _validation_fraction, make
from trainer.ranks.place import Ranks
from trainer.run import run as runs

TASK = """
import dataclasses

import torch


class Three:
    def splits(self):
        return {name: {"x": torch.zeros(n, 2)} for name, n in (("train", 60), ("validation", 20), ("test", 20))}

    def model(self):
        raise AssertionError("nobody needs it")

    forward = loss = metrics = model


class Two(Three):
    def splits(self):
        return {name: data for name, data in super().splits().items() if name != "validation"}


@dataclasses.dataclass
class Options:
    validation_fraction: float = 0.15


class Declaring(Three):
    Options = Options

    def __init__(self, **options):
        pass

    def splits(self):
        raise AssertionError("nobody needs them")


class Cutting(Three):
    def splits(self, cut=None):
        return super().splits()
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    """The file of a user's tasks."""
    (tmp_path / "tasks.py").write_text(TASK)
    return f"{tmp_path}/tasks.py"


@pytest.mark.parametrize(("task", "fraction"), [("Three", 0.25), ("Two", 0.0)])
def test_a_run_holds_out_as_much_for_validation_as_an_ordinary_one(
    own: str, tmp_path: Path, task: str, fraction: float
) -> None:
    """Of 60 and 20 samples, a quarter. The test split has no part in it."""
    changes: dict[str, Any] = {"trainer.task": f"{own}:{task}", "trainer.task_options": {}}
    assert _validation_fraction(load(STRONG, overrides(tmp_path, **changes))) == fraction
    changes["cross_validation.validation_fraction"] = 0.1
    assert _validation_fraction(load(STRONG, overrides(tmp_path, **changes))) == 0.1


def test_an_option_of_the_task_decides_and_else_its_default(own: str, tmp_path: Path) -> None:
    """As ready tasks have it. Then the splits need not be read to know it."""
    changes: dict[str, Any] = {"trainer.task": f"{own}:Declaring", "trainer.task_options": {}}
    assert _validation_fraction(load(STRONG, overrides(tmp_path, **changes))) == 0.15
    changes["trainer.task_options"] = {"validation_fraction": 0.3}
    assert _validation_fraction(load(STRONG, overrides(tmp_path, **changes))) == 0.3


@pytest.mark.parametrize(
    ("train", "fold_of", "enough"),
    [
        (8, [[0, 1, 2, 0, 1, 2]], True),
        (7, [[0, 1, 2, 0, 1, 2]], False),
        # The first fold tests two samples, the second three: its run trains on one less than the 8 of the first.
        (8, [[0, 0, 1, 1, 1]], False),
        (9, [[0, 0, 1, 1, 1]], True),
        (8, [[0, 0, 1, 1], [0, 1, 1, 1]], False),  # of a later repeat
    ],
)
def test_every_fold_has_to_fill_a_global_batch(train: int, fold_of: list[list[int]], enough: bool) -> None:
    config = parse({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8})
    split = Split({"x": torch.zeros(train, 1)})
    if enough:
        _check_batch(config, split, fold_of)
        return
    with pytest.raises(UserError, match=r"has 7 samples to train on, which is less than the global batch of 8\."):
        _check_batch(config, split, fold_of)


def test_a_task_whose_splits_know_nothing_of_the_fold_is_warned_of_a_leak(own: str, tmp_path: Path) -> None:
    from trainer.tasks.protocol import load_task

    declared = load(STRONG, overrides(tmp_path))
    (note,) = _own_note(load_task(f"{own}:Three", {}), declared)
    assert "what is tested has leaked into it" in note
    assert _own_note(load_task(f"{own}:Cutting", {}), declared) == []


def test_a_run_continues_where_it_was_and_one_that_is_not_finite_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one bad fold would end the slot, and with it the other runs."""
    resumed: list[str] = []

    def run(config: Config, ranks: Ranks, *, resume: Any, **_: Any) -> dict[str, Any]:
        resumed.append(resume.mode)
        if config.trainer.seed == 1:
            error = NonFiniteError("the loss is nan")
            error.good_steps = 4
            raise error
        return {"status": "finished"}

    monkeypatch.setattr(runs, "run", run)
    configs = [load(STRONG, {"trainer.seed": seed}).config for seed in (0, 1)]
    assert make(Ranks(), configs[0]) == {"status": "finished"}
    assert make(Ranks(), configs[1]) == {"status": "not finite", "reason": "the loss is nan", "steps": 4}
    assert resumed == ["auto", "auto"]
