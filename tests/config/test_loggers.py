"""The blocks of loggers: off by default, checked like all keys, and no logger without its package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.config.keys import Config, parse
from trainer.config.loggers import refuse_missing
from trainer.errors import UserError


def config(**blocks: Any) -> Config:
    return parse({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, **blocks})


def test_nothing_is_sent_unless_the_config_says_so() -> None:
    plain = config()
    assert not any(block.enabled for block in (plain.wandb, plain.comet, plain.csv_monitor, plain.mlflow))
    quiet = config(wandb={"enabled": True}, mlflow={"enabled": True}).unlogged()
    assert not quiet.wandb.enabled and not quiet.mlflow.enabled and not quiet.tensorboard.enabled


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()  # wandb makes such a folder; it is no package
    with pytest.raises(UserError) as caught:
        refuse_missing(config(wandb={"enabled": True}))
    assert str(caught.value) == (
        '"wandb.enabled" is true, but the package wandb is not installed: pip install "strong-scaling-trainer[wandb]"'
    )
    refuse_missing(config(wandb={"enabled": False}, csv_monitor={"enabled": True}))


def test_their_keys_are_checked() -> None:
    for block, words in (
        ({"wandb": {"projekt": "a"}}, 'unknown key "wandb.projekt". Did you mean "project"?'),
        ({"wandb": {"mode": "off"}}, '"wandb.mode" is "off". It must be one of'),
        ({"comet": {"samples_log_interval": 500}}, '"comet.samples_log_interval" has no effect here'),
        ({"mlflow": {"tracking_uri": 3}}, '"mlflow.tracking_uri" must be a string'),
    ):
        with pytest.raises(UserError) as caught:
            config(**block)
        assert words in str(caught.value)
