"""What the command that makes a study's runs says of them. Whole studies are in tests/distributed/test_study.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.study.many_runs import begin, duration, locked


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 99, 600, 36_000)] == ["4 s", "99 s", "10 min", "10.0 h"]


def test_it_begins_with_a_line_and_never_in_a_folder_of_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "new", "study.json", "digits")
    assert capsys.readouterr().out == "looking at the data and the model of digits; no run is started yet\n"
    (tmp_path / "running").mkdir()  # which a study empties
    (tmp_path / "running" / "log.csv").write_text("mine")
    with pytest.raises(UserError, match=r"no run has written \(running\)"):
        begin(tmp_path, "study.json", "digits")
    (tmp_path / "study.json").write_text("{}")
    begin(tmp_path, "study.json", "digits")


def test_a_folder_that_cannot_be_made_is_named_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be made or used: it is, or lies in, .*file, which is no folder"):
        begin(tmp_path / "file" / "study", "study.json", "digits")
    with pytest.raises(UserError, match="cannot be made: No such file"), locked(Path("/proc/study")):
        pass
