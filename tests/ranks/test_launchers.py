"""The launcher that started a rank, and that it is gone."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.ranks import launchers as module
from trainer.ranks.launchers import Launchers, launch_name, launcher

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
    program = tmp_path / "torchrun.py"  # known by its name
    program.write_text(
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, {str(tmp_path / 'rank.py')!r}], stdout=subprocess.PIPE, text=True)\n"
        "print(rank.stdout.readline(), end='', flush=True)\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 False\n", done
    deadline_s = time.monotonic() + 30
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    assert file.read_text() == "True"


@pytest.mark.parametrize(
    ("between", "found"),
    [
        ({20: (30, b"timeout\0" + b"100\0python"), 30: (1, b"python\0-u\0/venv/bin/deepspeed\0--num_gpus")}, 30),
        ({20: (30, b"/bin/bash\0wrapper.sh"), 30: (40, b"slurmstepd: [77.0]"), 40: (1, b"slurmstepd: [77.batch]")}, 30),
        ({20: (30, b"hydra_pmi_proxy"), 30: (1, b"mpiexec")}, 20),
        ({20: (30, b"bash\0-c\0for r in 0 1; do deepspeed; done"), 30: (1, b"sshd")}, None),
        ({20: (1, b"python\0train.py\0--a\0b\0/data/deepspeed")}, None),
    ],
    ids=["a program between", "a script between", "mpich", "by hand", "a name among arguments"],
)
def test_what_started_all_ranks_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, between: dict[int, tuple[int, bytes]], found: int | None
) -> None:
    """Ranks know one another by it. A parent may be each rank's own."""
    monkeypatch.setattr(module.os, "getpid", lambda: 10)
    monkeypatch.setattr(module, "_parent", lambda process: 20 if process == 10 else between[process][0])
    monkeypatch.setattr(module, "_command", lambda process: between[process][1])
    assert launcher() == found
    if found is not None:
        assert launch_name().startswith(f"{found}-")


@pytest.mark.parametrize(
    ("hosts", "above", "gone"),
    [
        ({"localhost": [0, 1]}, b"systemd", True),
        ({"localhost": [0, 1]}, b"python\0/venv/bin/deepspeed\0--num_gpus", False),
        ({"node1": [0], "node2": [0]}, b"sshd", False),
        (None, b"systemd", False),
    ],
    ids=["the runner has ended", "it is there", "over ssh", "torchrun"],
)
def test_a_runner_that_ended_before_this_rank_looked_is_missed(
    monkeypatch: pytest.MonkeyPatch, hosts: dict[str, list[int]] | None, above: bytes, gone: bool
) -> None:
    """DeepSpeed's runner hands a SIGTERM on to nobody. In its first seconds, ranks have not looked yet."""
    info = base64.urlsafe_b64encode(json.dumps(hosts).encode())
    launch = b"python\0-u\0-m\0deepspeed.launcher.launch\0--world_info=" + info + b"\0--master_port=1\0main.py"
    parents, commands = {10: 20, 20: 30, 30: 1}, {20: launch if hosts else b"torchrun\0main.py", 30: above}
    monkeypatch.setattr(module.os, "getpid", lambda: 10)
    monkeypatch.setattr(module, "_parent", lambda process: parents[process])
    monkeypatch.setattr(module, "_command", lambda process: commands.get(process, b""))
    assert Launchers().gone() == gone
