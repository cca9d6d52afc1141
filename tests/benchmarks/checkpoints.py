"""What a checkpoint, the guard and the audit every 50 steps cost, and the rehearsal once.

    python tests/benchmarks/checkpoints.py [--pairs 100] [--world_sizes 1 2]
    python tests/benchmarks/checkpoints.py --models minilm --minilm FOLDER --data FILE --pairs 25

A run of the digits CNN or MLP, or of MiniLM on texts with its lower layers frozen, makes a checkpoint, a comparison of
ranks, or an audit, every 20 steps. So of every two neighbouring stretches of 10 steps one bears the cost, the copy and
whatever the writing takes from the steps beside it, and one does not: a pair has the machine's noise in common, which
runs in turn do not. Printed is what the cost is of the time of 50 steps, in per cent: the median over pairs, and its
95 % bootstrap interval. The rehearsal is printed in steps: its seconds over those of a plain step, median of the runs.
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

from trainer.ranks.distributed import Ranks  # noqa: E402

from trainer.config.keys import load_config  # noqa: E402
from trainer.ranks.workers import run_ranks  # noqa: E402
from trainer.record.console import say, table  # noqa: E402

STRETCH, INTERVAL = 10, 50
NONE = {"trainer.checkpoint.every_steps": 0, "trainer.guard_every_steps": 0, "trainer.audit_every_steps": 0}
VARIANTS = {
    "checkpoint": {"trainer.checkpoint.every_steps": 2 * STRETCH},
    "guard": {"trainer.guard_every_steps": 2 * STRETCH},
    "audit": {"trainer.audit_every_steps": 2 * STRETCH},
}


def stretches_s(ranks: Ranks, file: str, overrides: dict[str, Any]) -> tuple[list[float], float]:
    """One run; the seconds of each 10 steps, the first 20 left out, and those of its rehearsal."""
    from trainer.run.run import run

    at_s: list[float] = []

    def watch(step: int, engine: Any, losses: Any) -> None:
        if step % STRETCH == 0:
            at_s.append(time.perf_counter())  # before this step's checkpoint or guard

    summary = run(load_config(file, overrides), ranks, config_name="benchmark", started_at_s=time.time(), trace=watch)
    return [later - earlier for earlier, later in itertools.pairwise(at_s[1:])], summary["rehearsal_s"]


def measure(file: Path, extra: dict[str, Any], pairs: int, world_size: int) -> list[str]:
    """The table's cells for one workload."""
    cells: list[str] = []
    plain: list[float] = []
    rehearsals: list[float] = []
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
                **NONE,
                **changes,
            }
            times, rehearsal_s = run_ranks(stretches_s, world_size, str(file), overrides, timeout_s=7200.0)[0]
            # An audit is part of its step, so it lies before the mark; checkpoint and guard come after it.
            bears, bare = (times[1::2], times[::2]) if name == "audit" else (times[::2], times[1::2])
            plain += bare
            rehearsals.append(rehearsal_s)
            shares = [100 * (a - b) / b * STRETCH / INTERVAL for a, b in zip(bears, bare)]
            chosen = np.random.default_rng(0).choice(shares, (2000, len(shares)))
            low, high = np.quantile(np.median(chosen, axis=1), (0.025, 0.975))
            cells.append(f"{statistics.median(shares):+.2f} % ({low:+.2f} to {high:+.2f})")
    step_s = statistics.median(plain) / STRETCH
    return [f"{step_s * 1e3:.1f}", *cells, f"{statistics.median(rehearsals) / step_s:.2f} steps"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="of stretches of 10 steps")
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=("cnn", "mlp", "minilm"), default=["cnn"])
    parser.add_argument("--minilm", help="folder of a pretrained MiniLM")
    parser.add_argument("--data", help="texts for it, as text_classification reads them")
    flags = parser.parse_args()
    workloads: dict[str, tuple[str, dict[str, Any]]] = {
        "cnn": ("strong.json", {}),
        "mlp": ("strong.json", {"trainer.task_options.model": "mlp"}),
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
    say(table(rows, ("model", "ranks", "without, ms a step", *VARIANTS, "rehearsal")))


if __name__ == "__main__":
    main()
