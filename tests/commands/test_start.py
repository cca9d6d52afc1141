"""`init`: the config that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.commands.cli import main
from trainer.config import ready
from trainer.config.keys import load_config
from trainer.tasks.first_look import BUILT_IN


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("task", BUILT_IN)
def test_every_task_has_a_config_to_start_from(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", task]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    # The data of these two come with packages.
    assert f"keys {task}" in first and ('"data"' in first) == (task not in ("digits", "nodules"))
    assert f"plan --ds_config {task}.json" in second and f"train --ds_config {task}.json" in third
    assert load_config(f"{task}.json").trainer.task == task
    assert main(["plan", "--ds_config", f"{task}.json"]) == 0


def test_an_editor_finds_the_schema(tmp_path: Path) -> None:
    """Beside the config, or, inside a checkout, where the ready configs have it."""
    assert main(["init", "digits", "a.json"]) == main(["init", "study_text", "b.json"]) == 0
    for name in ("a.json", "b.json"):
        file = tmp_path / json.loads((tmp_path / name).read_text())["$schema"]
        assert file.read_text() == (ready.folder() / ready.SCHEMA).read_text()
    assert len(list(tmp_path.iterdir())) == 3


def test_inside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "ds_configs").symlink_to(ready.folder())
    monkeypatch.setattr(ready, "folder", lambda: tmp_path / "ds_configs")
    assert main(["init", "digits", "mine/a.json"]) == main(["init", "digits", "b.json"]) == 0
    assert json.loads((tmp_path / "mine" / "a.json").read_text())["$schema"] == "../ds_configs/editor/schema.json"
    assert json.loads((tmp_path / "b.json").read_text())["$schema"] == "./ds_configs/editor/schema.json"
    assert not list(tmp_path.rglob("trainer-schema.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["digit"],
            (
                'no task "digit"',
                'Did you mean "digits"?',
                "The tasks are audio_classification, causal_lm, digits",
                "weak_sqrt",
            ),
        ),
        (["text_classification", "mine.json"], ("mine.json exists, and is not overwritten",)),
        (["digits", "there/a.json"], ("there is no folder there",)),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: tuple[str, ...]
) -> None:
    (tmp_path / "mine.json").write_text("mine")
    assert main(["init", *arguments]) == 2
    said = capsys.readouterr().err
    assert not [word for word in words if word not in said], said
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("mine.json", "mine")]
