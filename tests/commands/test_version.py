"""`--version`."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from trainer import __version__
from trainer.commands import version as module
from trainer.commands.cli import main
from trainer.record.made_by import Commit


@pytest.mark.parametrize("changed", [False, True])
def test_versions_and_the_commit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    monkeypatch.setattr(module, "commit", lambda: Commit("0123456789abcdef" * 3, changed))
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"strong-scaling-trainer {__version__} (commit 0123456789ab")
    assert ("not committed" in said) == changed
    assert f"torch {version('torch')}, deepspeed {version('deepspeed')}, Python 3." in said


def test_an_installed_package_has_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "commit", lambda: None)
    assert module.versions().startswith(f"strong-scaling-trainer {__version__}, torch ")
