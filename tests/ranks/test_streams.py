"""Commands whose streams are closed run as others do."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from trainer.ranks.streams import open_streams
open_streams()
print("to nobody", flush=True)
print("to nobody", file=sys.stderr, flush=True)
file = open(sys.argv[1], "w")
assert file.fileno() > 2, file.fileno()
assert os.system("true >&1 2>&2 <&0") == 0, "what it starts has them, too"
file.write("ran")
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_lead_nowhere(tmp_path: object, closed: str) -> None:
    command = f"{sys.executable} -c '{PROGRAM}' {tmp_path}/file {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0
    with open(f"{tmp_path}/file") as file:
        assert file.read() == "ran"
