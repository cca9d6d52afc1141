"""How much memory a step needs: single micro-batches, packs, and one batch of all samples by a loop without us.

    python tests/benchmarks/memory.py                                              # the digits' CNN
    python tests/benchmarks/memory.py --ds_config ds_configs/causal_lm.json --set trainer.task_options.data=a.txt

Each contender has a process of its own, at one rank. Printed is by how many MiB its resident set grows within a step,
the most of some steps: of the first, in which packs are tried, and of later ones. Between steps, memory that is free is
given back to the system. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.commands.cli import parse_override
from trainer.config.keys import Config, load_config
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks

ROOT = Path(__file__).resolve().parents[2]
FIRST, STEPS = 4, 8  # packs are tried in three, and used from then on


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


class Growth:
    """By how much the resident set grows between two calls, at most."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL("libc.so.6")
        self._start()

    def _start(self) -> None:
        self._libc.malloc_trim(0)
        self._before = _resident_mib()
        Path("/proc/self/clear_refs").write_text("5")  # resets the largest

    def since_mib(self) -> float:
        """Since the last call."""
        largest = int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 2**10
        grown = largest - self._before
        self._start()
        return grown


def _measure(ranks: Ranks, config: Config, whole: bool) -> tuple[float, float]:
    """By how many MiB the resident set grows in a step: the most of the first steps, and of the others."""
    import deepspeed  # noqa: F401
    import torch

    from trainer.commands.doctor.plain_loop import plain_loop
    from trainer.run.run import run

    grown: list[float] = []
    growth = Growth()

    def trace(step: int, engine: Any = None, losses: Any = None) -> None:
        grown.append(growth.since_mib())

    if whole:
        make_step = plain_loop(config, ranks, torch.device("cpu"))
        for step in range(STEPS):
            make_step()
            trace(step + 1)
    else:
        run(config, ranks, config_name="benchmark", started_at_s=time.time(), trace=trace)
    return max(grown[1:FIRST]), max(grown[FIRST:])  # the first makes the optimizer's state


def main() -> None:
    """Runs the benchmark and prints one row a contender."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs" / "strong.json"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    flags = parser.parse_args()
    one: tuple[float, float] | None = None
    print("memory of a step, MiB (as a share of that of one batch)   first steps    later steps")
    for name in ("one batch", "single micro-batches", "a pack of all"):
        with tempfile.TemporaryDirectory() as scratch:
            changes: dict[str, Any] = {
                "trainer.drop_last": True,
                "trainer.epochs": 1000,
                "trainer.max_steps": STEPS,
                "trainer.evaluate_every_epochs": 0,
                "trainer.checkpoint.every_steps": 0,
                "trainer.audit_every_steps": 0,
                "trainer.output_dir": f"{scratch}/run",
                "trainer.pack": 1_000_000 if name == "a pack of all" else 1,
            }
            own = dict(parse_override(text) for text in flags.set)
            config = load_config(Path(flags.ds_config), own | changes)
            found = run_ranks(_measure, 1, config, name == "one batch", timeout_s=3600)[0]
        one = one or found
        shown = (f"{size:8.0f} ({size / of:.2f})" for size, of in zip(found, one))
        print(f"{name:52} {'  '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
