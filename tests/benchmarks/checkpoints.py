"""What a checkpoint every 50 steps costs, and the comparison of ranks every 50 steps.

    python tests/benchmarks/checkpoints.py [--rounds 9] [--steps 300] [--world_sizes 1 2] [--minilm FOLDER --data FILE]

Each round runs the digits CNN (and, where its folder is given, MiniLM on texts) three times in turn, in fresh forked
ranks: plain, with checkpoints, with the guard. Printed are step times as a ratio to the plain run of the same round,
median and quartiles. The time is that of the whole loop without its first steps; writing goes on beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.config import load  # noqa: E402
from trainer.console import say, table  # noqa: E402
from trainer.distributed import Ranks  # noqa: E402
from trainer.workers import run_ranks  # noqa: E402

VARIANTS = {
    "plain": {"trainer.checkpoint.every_steps": 0, "trainer.guard_every_steps": 0},
    "checkpoint every 50": {"trainer.checkpoint.every_steps": 50, "trainer.guard_every_steps": 0},
    "guard every 50": {"trainer.checkpoint.every_steps": 0, "trainer.guard_every_steps": 50},
}


def step_time_s(ranks: Ranks, file: str, overrides: dict[str, Any]) -> float:
    """One run; its mean step time."""
    from trainer.run import run

    summary = run(load(file, overrides), ranks, config_name="benchmark", started_at_s=time.time())
    return float(summary["step_time_s"])


def measure(file: Path, extra: dict[str, Any], rounds: int, steps: int, world_size: int) -> list[str]:
    """The table's cells for one workload."""
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as scratch:
        for n in range(rounds):
            for name, changes in VARIANTS.items():
                overrides = {
                    "trainer.epochs": 10_000,
                    "trainer.max_steps": steps,
                    "trainer.evaluate_every_epochs": 0,
                    "tensorboard.enabled": False,
                    "trainer.output_dir": f"{scratch}/{n}-{name}",
                    **extra,
                    **changes,
                }
                times[name].append(run_ranks(step_time_s, world_size, str(file), overrides)[0])
    cells = [f"{statistics.median(times['plain']) * 1e3:.2f}"]
    for name in list(VARIANTS)[1:]:
        ratios = [t / plain for t, plain in zip(times[name], times["plain"])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
    return cells


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--minilm", help="folder of a pretrained MiniLM, to measure it as well")
    parser.add_argument("--data", help="texts for it, as text_classification reads them")
    flags = parser.parse_args()
    rows = []
    for world_size in flags.world_sizes:
        cells = measure(ROOT / "ds_configs" / "strong.json", {}, flags.rounds, flags.steps, world_size)
        rows.append(["digits CNN", str(world_size), *cells])
        if flags.minilm:
            extra = {
                "trainer.task_options.model": flags.minilm,
                "trainer.task_options.data": flags.data,
                "trainer.freeze": ["bert.embeddings.*", "bert.encoder.layer.[0-3].*"],
            }
            file = ROOT / "ds_configs" / "text_classification.json"
            cells = measure(file, extra, max(3, flags.rounds // 3), min(flags.steps, 110), world_size)
            rows.append(["MiniLM", str(world_size), *cells])
    say("step time as a ratio to the plain run: median (quartiles)", "")
    say(table(rows, ("model", "ranks", "plain, ms a step", *list(VARIANTS)[1:])))


if __name__ == "__main__":
    main()
