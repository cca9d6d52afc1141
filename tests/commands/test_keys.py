"""`keys`: what is found for what is typed."""

from __future__ import annotations

import dataclasses

import pytest

from trainer.commands.cli import main
from trainer.config.deepspeed_keys import REFUSED
from trainer.config.keys import CheckpointOptions, LearningRateOptions


def shown(capsys: pytest.CaptureFixture[str], *pattern: str) -> str:
    assert main(["keys", *pattern]) == 0
    return capsys.readouterr().out


def names(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(" ")]


@pytest.mark.parametrize(
    ("pattern", "block", "options"),
    [
        ("learning_rate", "trainer.learning_rate", LearningRateOptions),
        ("trainer.checkpoint", "trainer.checkpoint", CheckpointOptions),
        ("Trainer.Checkpoint.", "trainer.checkpoint", CheckpointOptions),
    ],
)
def test_a_block(capsys: pytest.CaptureFixture[str], pattern: str, block: str, options: type) -> None:
    assert names(shown(capsys, pattern)) == [f"{block}.{field.name}" for field in dataclasses.fields(options)]


def test_a_key_has_its_values_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "final_fraction") == (
        "trainer.learning_rate.final_fraction\n    number, at least 0, below 1; default 0.0\n"
        "    the last rate of linear and cosine, as a fraction of the highest rate\n"
    )


def test_a_task_and_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "nodules")
    assert names(text)[0] == "trainer.task_options.data (task nodules)"
    assert "number, at least 0, below 1e+06; default 1.0" in text
    assert "    required\n    a model's folder or hub name" in shown(capsys, "text_classification")


def test_arguments_of_optimizers_that_are_alike_stand_once(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "lr")
    assert names(text) == ["optimizer.params.lr (optimizer adam, optimizer adamw, optimizer lion)"]
    assert "number, at least 0\n" in text


def test_a_key_that_is_refused_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert REFUSED["fp16"] in " ".join(shown(capsys, "fp16").split())


def test_a_word_of_the_meaning_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert names(shown(capsys, "exit code 75")) == ["trainer.max_wall_time_s"]


def test_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert "trainer.checkpoint       2 keys  what an interrupted run continues from\n" in text
    for task in ("digits", "causal_lm"):
        assert f"keys  task {task}\n" in text
    assert f"refused               {len(REFUSED):>4} keys" in text


@pytest.mark.parametrize(
    ("pattern", "said"),
    [("learnin_rate", 'Did you mean "learning_rate"?'), ("zzzz", "lists the groups"), ("", "groups")],
)
def test_what_is_like_nothing(capsys: pytest.CaptureFixture[str], pattern: str, said: str) -> None:
    assert main(["keys", pattern]) == 2
    assert said in capsys.readouterr().err
