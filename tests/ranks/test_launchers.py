"""The launcher that started a rank, and that it is gone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from trainer.ranks.launchers import Launchers

RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from trainer.ranks.launchers import Launchers
launchers = Launchers()
print(len(launchers._chain), launchers.gone(), flush=True)
deadline = time.monotonic() + 20
while not launchers.gone() and time.monotonic() < deadline:
    time.sleep(0.01)
open({file!r}, "w").write(str(launchers.gone()))
"""


def test_a_process_without_a_launcher_misses_none() -> None:
    launchers = Launchers()
    assert not launchers.gone() or launchers._chain


def test_a_launcher_that_ends_is_missed(tmp_path: Path) -> None:
    root, file = str(Path(__file__).resolve().parents[2]), tmp_path / "said"
    (tmp_path / "rank.py").write_text(RANK.format(root=root, file=str(file)))
    launcher = tmp_path / "torchrun.py"  # known by its name
    launcher.write_text(
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, {str(tmp_path / 'rank.py')!r}], stdout=subprocess.PIPE, text=True)\n"
        "print(rank.stdout.readline(), end='', flush=True)\n"
    )
    done = subprocess.run([sys.executable, str(launcher)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 False\n", done
    deadline_s = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert file.read_text() == "True"
