"""The benchmark scripts still run: what they print is looked at by people, and only when somebody measures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("throughput.py --rounds 2 --world_sizes 2 --packs 1 auto", "mlp\n"),
        ("exchange.py --rounds 2", "38.15 MiB"),
        ("checkpoints.py --pairs 2 --world_sizes 2", "cnn"),
        ("study.py --runs 4 --launched 2", "the same parameters"),
        ("startup.py --rounds 2", "minimal"),
    ],
)
def test_a_benchmark_runs(command: str, says: str) -> None:
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, f"tests/benchmarks/{script}", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout, done.stdout
