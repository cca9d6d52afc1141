"""What a checkpoint every 50 steps costs, and the comparison of ranks every 50 steps.

    python tests/benchmarks/checkpoints.py [--pairs 20] [--world_sizes 1 2] [--minilm FOLDER --data FILE]

A run of the digits CNN (and, where its folder is given, of MiniLM on texts, its lower layers frozen) makes a
checkpoint, or a comparison of ranks, every 100 steps. So of every two neighbouring stretches of 50 steps one bears the
cost and one does not: copying, and what writing beside the steps takes from them. Printed is the time of the one over
that of the other, pair by pair, as median and quartiles. Neighbours in one process have the machine's noise in common;
runs in turn do not.
"""

from __future__ import annotations

import argparse
import itertools
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

STRETCH = 50
VARIANTS = {
    "checkpoint every 50": {"trainer.checkpoint.every_steps": 2 * STRETCH, "trainer.guard_every_steps": 0},
    "guard every 50": {"trainer.checkpoint.every_steps": 0, "trainer.guard_every_steps": 2 * STRETCH},
}


def stretches_s(ranks: Ranks, file: str, overrides: dict[str, Any]) -> list[float]:
    """One run; the seconds of each 50 steps, the first 100 left out."""
    from trainer.run import run

    at_s: list[float] = []

    def watch(step: int, engine: Any, losses: Any) -> None:
        if step % STRETCH == 0:
            at_s.append(time.perf_counter())  # before this step's checkpoint or guard

    run(load(file, overrides), ranks, config_name="benchmark", started_at_s=time.time(), trace=watch)
    return [later - earlier for earlier, later in itertools.pairwise(at_s[1:])]


def measure(file: Path, extra: dict[str, Any], pairs: int, world_size: int) -> list[str]:
    """The table's cells for one workload."""
    cells, plain = [], []
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as scratch:
        for name, changes in VARIANTS.items():
            overrides = {
                "trainer.epochs": 10_000,
                "trainer.max_steps": 2 * STRETCH * (pairs + 1),
                "trainer.learning_rate.warmup_epochs": 0,
                "trainer.evaluate_every_epochs": 0,
                "tensorboard.enabled": False,
                "trainer.output_dir": f"{scratch}/{name}",
                **extra,
                **changes,
            }
            times = run_ranks(stretches_s, world_size, str(file), overrides, timeout_s=7200.0)[0]
            ratios = [bears / other for bears, other in zip(times[::2], times[1::2])]
            plain += times[1::2]
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
    return [f"{statistics.median(plain) / STRETCH * 1e3:.1f}", *cells]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="of stretches of 50 steps; of MiniLM a third of them")
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--minilm", help="folder of a pretrained MiniLM, to measure it as well")
    parser.add_argument("--data", help="texts for it, as text_classification reads them")
    flags = parser.parse_args()
    rows = []
    for world_size in flags.world_sizes:
        cells = measure(ROOT / "ds_configs" / "strong.json", {}, flags.pairs, world_size)
        rows.append(["digits CNN", str(world_size), *cells])
        if flags.minilm:
            extra = {
                "trainer.task_options.model": flags.minilm,
                "trainer.task_options.data": flags.data,
                "trainer.freeze": ["bert.embeddings.*", "bert.encoder.layer.[0-3].*"],
            }
            file = ROOT / "ds_configs" / "text_classification.json"
            rows.append(["MiniLM", str(world_size), *measure(file, extra, max(3, flags.pairs // 3), world_size)])
    say("time of 50 steps with it over 50 without: median (quartiles)", "")
    say(table(rows, ("model", "ranks", "without, ms a step", *VARIANTS)))


if __name__ == "__main__":
    main()
