"""Options that tasks on a user's own data and model share: the same names, rules and defaults in each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trainer.config.task_options import read_options
from trainer.errors import UserError
from trainer.tasks.hub_options import HubOptions, TextModelOptions
from trainer.tasks.protocol import load_task

DATA = {"data": "a.csv", "model": {"model_type": "gpt2"}}


def names(options: type) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


def test_code_of_a_model_runs_only_where_the_user_says_so() -> None:
    found = read_options(TextModelOptions, {})
    assert found.trust_remote_code is False
    assert found.pretrained is True
    assert (found.config_name, found.split_column, found.text_column, found.attention) == (None,) * 4
    assert found.split_seed == 0


def test_texts_have_all_that_other_data_has() -> None:
    assert names(TextModelOptions) - names(HubOptions) == {"text_column", "attention", "separator", "encoding"}


def test_every_option_says_what_it_is_for() -> None:
    for field in dataclasses.fields(TextModelOptions):
        assert field.metadata["doc"], field.name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"trust_remote_code": "yes"}, r'trust_remote_code" must be true or false, not "yes"'),
        ({"pretrained": 1}, r'pretrained" must be true or false, not 1'),
        ({"split_seed": -1}, r'split_seed" is -1\. It must be at least 0'),
        ({"split_seed": 0.5}, r'split_seed" must be a whole number, not 0\.5'),
        ({"split_column": ""}, r"split_column\" is ''\. It must be a name, or left out"),
        ({"config_name": ["en"]}, r'config_name" must be a string'),
        ({"trust_remote_cod": True}, r'Did you mean "trust_remote_code"'),
    ],
)
@pytest.mark.parametrize("task", ["text_classification", "image_classification", "audio_classification", "causal_lm"])
def test_the_rules_hold_in_every_task_that_has_them(task: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_task(task, DATA | given)
