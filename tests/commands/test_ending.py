"""The end of a process that has made a run: all is written, and nothing is cleaned up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_what_was_printed_is_there_and_no_clean_up_is_made() -> None:
    code = (
        "import atexit\nfrom trainer.commands.ending import end\n"
        "atexit.register(print, 'clean-up')\nprint('half a line', end='')\nend(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (5, "half a line", "")
