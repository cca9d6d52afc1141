"""What a cross-validation declares, and the config of each of its runs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.jobs import ROOT
from trainer.errors import UserError
from trainer.folds.declaration import Declared, Place, load

STRONG = str(ROOT / "ds_configs" / "strong.json")


def declared(**overrides: Any) -> Declared:
    return load(STRONG, {key.replace("__", "."): value for key, value in overrides.items()})


def test_runs_differ_in_fold_seed_and_folder_and_repeats_in_the_cut() -> None:
    d = declared(cross_validation__repeats=2, cross_validation__folds=3, trainer__seed=7)
    configs = [d.run_config(place, 0.2) for place in d.places]
    assert len({c.trainer.output_dir for c in configs}) == 6
    assert [c.trainer.seed for c in configs] == list(range(7, 13))
    folds = [c.trainer.fold for c in configs]
    assert [f.number for f in folds if f] == [0, 1, 2, 0, 1, 2]
    assert len({f.seed for f in folds if f}) == 2
    assert d.run_config(Place(0, 1), 0.2) == declared(cross_validation__folds=3, trainer__seed=7).run_config(
        Place(0, 1), 0.2
    )  # more repeats leave the runs of fewer as they are


def test_the_folder_follows_from_the_config() -> None:
    assert str(declared().folder) == "runs/strong-folds"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cross_validation.folds": 1}, "It must be at least 2"),
        ({"cross_validation.fold": 1}, 'Did you mean "folds"'),
        ({"cross_validation.group_column": "x"}, "the task digits knows no groups"),
        ({"cross_validation.label_column": "x"}, "is for a task of your own"),
        ({"cross_validation.pool": ["trian"]}, "It must name at least one of train, validation and test"),
        ({"trainer.output_dir": "x"}, 'set "cross_validation.output_dir"'),
        ({"trainer.fold": {"folds": 3}}, '"trainer.fold" is set for every run'),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(STRONG, overrides)


def test_the_column_of_groups_reaches_the_task() -> None:
    path = str(ROOT / "ds_configs" / "tabular.json")
    d = load(path, {"cross_validation.group_column": "patient"})
    assert d.run_config(Place(0, 0), 0.0).trainer.task_options["group_column"] == "patient"
    with pytest.raises(UserError, match="Name one of them"):
        load(path, {"cross_validation.group_column": "patient", "trainer.task_options.group_column": "site"})
