"""The block "search" is checked as strictly as the config, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.search.small import BASE, write
from trainer.config import ready
from trainer.config.keys import load_config
from trainer.errors import UserError
from trainer.search.declaration import load_search

LR = "optimizer.params.lr"


def test_the_ready_search_is_a_search_and_a_config() -> None:
    plan = load_search(str(ready.folder() / "search.json"))
    assert plan.trials == 20
    assert plan.folder == Path("runs/search-search")
    assert plan.space.own_point(plan.values).keys() == plan.search.parameters.keys()
    assert load_config(ready.folder() / "search.json") == plan.base


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"search.paramters": {}}, 'unknown key "search.paramters". Did you mean "parameters"?'),
        ({"search.parameters": {}}, '"search.parameters" is empty'),
        ({"search.parameters": {"optimizer.params.lrr": [1, 2]}}, '"optimizer.params.lrr". Did you mean "lr"?'),
        ({"search.parameters": {"optimzer.params.lr": [1, 2]}}, 'unknown key "optimzer". Did you mean "optimizer"?'),
        ({"search.parameters": {LR: {"low": 2, "high": 1}}}, '"low" (2) must be less than "high" (1)'),
        ({"search.parameters": {LR: {"low": 0, "high": 1, "log": True}}}, '"log" needs a "low" above 0'),
        ({"search.parameters": {LR: {"low": -1, "high": 1}}}, "It must be at least 0"),
        ({"search.parameters": {LR: {"low": 1, "hig": 2}}}, 'a range without "high"'),
        ({"search.parameters": {LR: {"low": 1, "high": 2, "stp": 1}}}, 'Did you mean "step"?'),
        ({"search.parameters": {LR: [0.1]}}, "at least two values"),
        ({"search.parameters": {LR: 0.1}}, "It must be a list of values, or a range"),
        ({"search.parameters": {"train_batch_size": {"low": 4, "high": 32}}}, "is larger than train_batch_size (4)"),
        ({"search.parameters": {"trainer.seed": [1, 2]}}, "the best seed is luck"),
        ({"search.parameters": {"trainer.world_size": [1, 2]}}, "the number of ranks is no key of a config"),
        ({"search.parameters": {"trainer.checkpoint.keep": [1, 2]}}, "changes no bit of the model"),
        ({"search.parameters": {"trainer.task_options.split_seed": [1, 2]}}, "which samples are validated on"),
        ({"search.parameters": {"zero_optimization.stage": [0, 1]}, "trainer.exactness": "bitwise"}, "contradict"),
        ({"search.metric": "test/accuracy"}, "trials see validation only"),
        ({"search.metric": "validation/accuracy"}, 'name the metric alone, "accuracy"'),
        ({"search.trials": None}, "a search needs a budget"),
        ({"search.sampler": "grid"}, "infinitely many values"),
        ({"search.pruner": {"type": "medium"}}, '"search.pruner.type" is "medium"'),
        ({"trainer.evaluate_every_epochs": 0}, "no validations to look at"),
        ({"train_batch_size": None, "gradient_accumulation_steps": 2}, 'a search needs "train_batch_size"'),
        ({"search": None}, 'a search needs a "search" block'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_first(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_search(str(write(tmp_path)), changed)
    assert said in str(caught.value)
    assert str(tmp_path / "search.json") in str(caught.value)


def test_values_that_suit_only_some_of_the_others_are_allowed(tmp_path: Path) -> None:
    """A micro-batch of 32 does not fit the file's batch of 16, but one of 64."""
    parameters = {"train_batch_size": [16, 64], "train_micro_batch_size_per_gpu": [8, 32]}
    plan = load_search(str(write(tmp_path)), {"search.parameters": parameters})
    with pytest.raises(UserError):
        plan.config_of({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 32}).plan(1)


def test_a_trials_config_is_the_files_but_for_its_values(tmp_path: Path) -> None:
    plan = load_search(str(write(tmp_path)))
    config = plan.config_of({LR: 0.5}, seed=7)
    assert (config.optimizer.params["lr"], config.trainer.seed) == (0.5, 7)
    assert plan.values == json.loads(json.dumps({k: v for k, v in BASE.items() if k != "search"}))
    assert set(plan.seeds()).isdisjoint({plan.base.trainer.seed})
