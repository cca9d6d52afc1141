"""The scripts in launch/, with stand-ins for pip and nvidia-smi."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Notes what pip is asked for. The rest is this very Python.
PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m pip" ]; then echo "$*" >> {log}; exit; fi
exec {python} "$@"
"""
NVIDIA_SMI = """#!/bin/bash
case $1 in -L) echo "GPU 0: NVIDIA A100 (UUID: GPU-1)" ;; --query-gpu=driver_version,compute_cap) echo "{gpu}" ;; esac
"""


@pytest.mark.parametrize(
    ("gpu", "build"),
    [
        (None, None),
        ("580.65.06, 9.0", None),
        ("535.104.05, 8.0", "cu126"),
        ("Failed to initialize NVML: Driver/library version mismatch", None),
    ],
)
def test_setup_takes_a_torch_build_that_the_driver_can_run(gpu: str | None, build: str | None, tmp_path: Path) -> None:
    environment, log = tmp_path / "environment" / "bin", tmp_path / "pip.log"
    environment.mkdir(parents=True)
    programs = {"python": PYTHON.format(log=log, python=sys.executable), "deepspeed": ""}
    if gpu is not None:
        programs["nvidia-smi"] = NVIDIA_SMI.format(gpu=gpu)
    for name, text in programs.items():
        (environment / name).write_text(text)
        (environment / name).chmod(0o755)
    variables = {"VIRTUAL_ENV": str(environment.parent), "PATH": f"{environment}:{os.environ['PATH']}"}
    script = f"set -euo pipefail; . {ROOT}/launch/setup.sh; set_up; echo ready $DS_ACCELERATOR"
    if gpu is not None:
        script = script.replace("$DS_ACCELERATOR", "")
    done = subprocess.run(["bash", "-c", script], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == (["ready", "cpu"] if gpu is None else ["ready"])
    (asked,) = [line for line in log.read_text().splitlines() if " install " in line]
    pinned = (ROOT / "launch" / "constraints.txt").read_text().split("\ntorch==")[1].split()[0]
    index = f"torch=={pinned}+{build} --extra-index-url https://download.pytorch.org/whl/{build} "
    assert (index in asked) == (build is not None)
    assert ("torch==" in asked) == (build is not None)
