"""Completion: what a shell is answered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.commands import completion
from trainer.commands.cli import COMMAND, main

ROOT = Path(__file__).resolve().parents[2]
# As the installed program. It fails if torch is there when it ends.
PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {COMMAND!r}
from trainer.commands.cli import main
ended = os._exit
os._exit = lambda code: ended(code or len({{"torch", "numpy", "deepspeed"}} & set(sys.modules)))
main()
"""


def answers(line: str, folder: Path) -> set[str]:
    variables = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "out"), "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": f"{COMMAND} {line}", "COMP_POINT": str(len(COMMAND) + 1 + len(line)), "COMP_TYPE": "9",
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, env=os.environ | variables, check=True, timeout=60)
    return {word.strip() for word in (folder / "out").read_text().split("\n")}


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("", {"plan", "verify", "keys", "init"}),
        ("plan --wor", {"--world_sizes"}),
        ("plan --ds_config ", {"mine.json", "strong.json"}),
        ("study st", {"study.json", "study_text.json"}),
        ("plan --set trainer.ch", {"trainer.checkpoint.every_steps=", "trainer.checkpoint.keep="}),
        ("verify --set trainer.device=c", {"trainer.device=cpu", "trainer.device=cuda"}),
        ("plan --task di", {"digits"}),
    ],
)
def test_what_may_follow(tmp_path: Path, line: str, among: set[str]) -> None:
    (tmp_path / "mine.json").touch()
    assert among <= answers(line, tmp_path)


def test_behind_a_flag_of_a_choice_are_its_values() -> None:
    assert completion.settings("trainer.compile=") == ["trainer.compile=true", "trainer.compile=false"]
    assert completion.settings("trainer.epochs=") == []
    assert not [word for word in completion.settings("") if word in ("trainer=", "fp16=")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_its_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert COMMAND in script and "_ARGCOMPLETE" in script
    assert ("complete -c" in script.replace("--command", "-c")) == (shell == "fish")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install argcomplete" in capsys.readouterr().err
