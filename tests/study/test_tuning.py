"""Searches for a learning rate, with made-up runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trainer.config.keys import Config, parse
from trainer.errors import UserError
from trainer.study.tuning import FIRST_SEED, Search, Trial, Tuning, best_of


def config_of(lr: float, seed: int) -> Config:
    return parse(
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "SGD", "params": {"lr": lr}},
            "trainer": {"seed": seed},
        }
    )


def search_in(folder: Path, tuning: Tuning, higher: bool = True) -> Search:
    return Search("one", config_of, 0.1, tuning, higher, folder)


def value_at(lr: float, best: float = 0.35) -> float | None:
    """A smooth hill over the logarithm, and no finite run beyond 1.5."""
    return None if lr > 1.5 else 0.9 - 0.05 * math.log(lr / best) ** 2


def carry_on(search: Search, runs: int = 10_000) -> list[str]:
    made = []
    while runs and (wanted := search.next_runs()):
        this = wanted[0]
        value = value_at(search.configs[this].optimizer.params["lr"])
        search.take(this, value, None if value is None else 1 - value)
        made.append(this)
        runs -= 1
    return made


def test_a_search_finds_the_top_of_the_hill(tmp_path: Path) -> None:
    search = search_in(tmp_path, Tuning(trials=15))
    assert search.best is None
    made = carry_on(search)
    rates = [trial.lr for trial in search.trials]
    # First evenly over the range, the centre among them; then what Optuna proposes, inside of the range.
    assert rates[:7] == pytest.approx([0.1 * 32 ** (-1 + k / 3) for k in range(7)], rel=0.01)
    assert all(0.1 / 32.1 <= rate <= 3.21 for rate in rates)
    assert len(set(made)) == len(made) == 15
    assert search.best is not None
    assert 0.2 < search.best < 0.6
    assert search.best in rates
    assert {search.configs[i].trainer.seed for i in made} == {FIRST_SEED}


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = search_in(tmp_path / "whole", Tuning(trials=9, seeds=2))
    carry_on(whole)
    first = search_in(tmp_path / "parts", Tuning(trials=9, seeds=2))
    made = carry_on(first, 13)  # in the midst of the seventh trial
    again = search_in(tmp_path / "parts", Tuning(trials=9, seeds=2))
    for this in made:  # results are kept elsewhere
        value = value_at(again.configs[this].optimizer.params["lr"])
        again.take(this, value, None if value is None else 1 - value)
    rest = carry_on(again)
    assert len(rest) == 18 - 13
    assert [trial.lr for trial in again.trials] == [trial.lr for trial in whole.trials]
    assert again.best == whole.best


def test_equals_are_decided_by_the_loss() -> None:
    def trial(lr: float, value: float | None, loss: float | None) -> Trial:
        return Trial(lr, ["a"], {"a": (value, loss)})

    trials = [trial(0.1, 0.9, 0.5), trial(0.2, 0.9, 0.3), trial(0.3, None, None), trial(0.4, 0.8, 0.1)]
    assert best_of(trials, True) is trials[1]
    assert best_of(trials, False) is trials[3]
    assert best_of([trials[2]], True) is None


def test_nothing_finite(tmp_path: Path) -> None:
    search = search_in(tmp_path, Tuning(trials=5))
    while wanted := search.next_runs():
        search.take(wanted[0], None, None)
    assert search.best == min(trial.lr for trial in search.trials)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{"proposed": [0.1')
    with pytest.raises(UserError, match=r"one\.json is damaged"):
        search_in(tmp_path, Tuning())
    carry_on(search_in(tmp_path / "good", Tuning(trials=3)))
    assert len(json.loads((tmp_path / "good" / "one.json").read_text())["proposed"]) == 3
