"""Where a config file is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config import ready
from trainer.errors import UserError


def test_a_file_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told: list[str] = []
    own = ready.folder() / "strong.json"
    assert ready.find("strong.json", told.append) == own
    assert told == [f"strong.json is not in this folder, so the trainer's own is used: {own}"]
    (tmp_path / "strong.json").write_text("{}")
    assert ready.find("strong.json", told.append) == Path("strong.json") and len(told) == 1


@pytest.mark.parametrize(
    ("given", "name"),
    [("stong.json", "strong.json"), ("there/strong.json", "strong.json"), ("weak_sqr.jsn", "weak_sqrt.json")],
)
def test_a_name_that_is_near_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{given} does not exist.* type {name}$"):
        ready.find(given)


def test_other_names_are_left_to_who_reads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ready.find("mine.json") == Path("mine.json")
    (tmp_path / "string.json").write_text("{}")
    assert ready.find("stong.json") == Path("stong.json")


def test_the_schema_is_no_config() -> None:
    assert "strong.json" in ready.names() and Path(ready.SCHEMA).name not in ready.names()
