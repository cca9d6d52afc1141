"""What a checkpoint every 50 steps costs, and the comparison of ranks every 50 steps.

    python tests/benchmarks/checkpoints.py [--pairs 100] [--world_sizes 1 2]
    python tests/benchmarks/checkpoints.py --models minilm --minilm FOLDER --data FILE --pairs 25

A run of the digits CNN, or of MiniLM on texts with its lower layers frozen, makes a checkpoint, or a comparison of
ranks, every 20 steps. So of every two neighbouring stretches of 10 steps one bears the cost, the copy and whatever
the writing takes from the steps beside it, and one does not: a pair has the machine's noise in common, which runs in
turn do not. Printed is what the cost is of the time of 50 steps, in per cent: the median over pairs, and its 95 %
bootstrap interval.
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

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from trainer.config import load  # noqa: E402
from trainer.console import say, table  # noqa: E402
from trainer.distributed import Ranks  # noqa: E402
from trainer.workers import run_ranks  # noqa: E402

STRETCH, INTERVAL = 10, 50
VARIANTS = {
    "checkpoint": {"trainer.checkpoint.every_steps": 2 * STRETCH, "trainer.guard_every_steps": 0},
    "guard": {"trainer.checkpoint.every_steps": 0, "trainer.guard_every_steps": 2 * STRETCH},
}


def stretches_s(ranks: Ranks, file: str, overrides: dict[str, Any]) -> list[float]:
    """One run; the seconds of each 10 steps, the first 20 left out."""
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
            plain += times[1::2]
            shares = [100 * (a - b) / b * STRETCH / INTERVAL for a, b in zip(times[::2], times[1::2])]
            chosen = np.random.default_rng(0).choice(shares, (2000, len(shares)))
            low, high = np.quantile(np.median(chosen, axis=1), (0.025, 0.975))
            cells.append(f"{statistics.median(shares):+.2f} % ({low:+.2f} to {high:+.2f})")
    return [f"{statistics.median(plain) / STRETCH * 1e3:.1f}", *cells]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="of stretches of 10 steps")
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=("cnn", "minilm"), default=["cnn"])
    parser.add_argument("--minilm", help="folder of a pretrained MiniLM")
    parser.add_argument("--data", help="texts for it, as text_classification reads them")
    flags = parser.parse_args()
    workloads: dict[str, tuple[str, dict[str, Any]]] = {
        "cnn": ("strong.json", {}),
        "minilm": (
            "text_classification.json",
            {
                "trainer.task_options.model": flags.minilm,
                "trainer.task_options.data": flags.data,
                "trainer.freeze": ["bert.embeddings.*", "bert.encoder.layer.[0-3].*"],
            },
        ),
    }
    rows = []
    for model, world_size in itertools.product(flags.models, flags.world_sizes):
        config, extra = workloads[model]
        rows.append([model, str(world_size), *measure(ROOT / "ds_configs" / config, extra, flags.pairs, world_size)])
    say(f"of the time of {INTERVAL} steps, for one of them in it: median (95 % interval of it)", "")
    say(table(rows, ("model", "ranks", "without, ms a step", *VARIANTS)))


if __name__ == "__main__":
    main()
