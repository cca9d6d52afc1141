"""What the exact sum costs: the tree's exchange against one all_reduce of the same gradient.

    python tests/benchmarks/exchange.py [--rounds 30] [--early]

First the step of the digits models at two ranks, with the tree's exchange and with one all_reduce in its
place, a few steps each in turn: the ratio of step times. Then the collectives alone over gradient sizes
and world sizes, for both ways the tree exchanges (whole nodes in one collective, shards in two), which is
where exact.exchange.DIRECT_LIMIT_BYTES comes from; and gloo's all-gather against the one made of sends.
With --early, only this: the exchange in buckets under the backward against the one after it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.config.keys import Config, load_config
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS_A_TURN = 10


def _steps(ranks: Ranks, config: Config, rounds: int) -> list[float]:
    """Ratios of step time, tree to all_reduce, turn by turn."""
    import torch.distributed as dist

    from trainer.exact.record import Records
    from trainer.record.console import DeepSpeedLog
    from trainer.run.build import build
    from trainer.run.course import make_step

    pieces = build(config, ranks, config.plan(ranks.world_size), DeepSpeedLog(keep=False))
    step: Any = make_step(pieces)
    exact, gradient_sum = step._exchange, step._sum

    def inexact(leaves: int) -> Any:
        dist.all_reduce(gradient_sum.gradient)
        # The ranks' losses are not exchanged. As many rows as the step asks for, of zeros.
        return Records(exact._all_records[:leaves], exact._layout)

    batches = iter(pieces.batches.starting_at(0))
    ratios = []
    for turn in range(rounds + 3):
        seconds = {}
        for name, exchange in (
            (("exact", exact), ("inexact", inexact)) if turn % 2 else (("inexact", inexact), ("exact", exact))
        ):
            step._exchange = exchange
            dist.barrier()
            began_s = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                step(next(batches))
            seconds[name] = time.perf_counter() - began_s
        ratios.append(seconds["exact"] / seconds["inexact"])
    return ratios[3:]


def _early_steps(ranks: Ranks, config: Config, rounds: int, pack: int) -> tuple[int, list[float], list[float]]:
    """Buckets; ratios of step time, in buckets to in one piece, turn by turn; and seconds of the latter."""
    import torch.distributed as dist

    from trainer.exact.exchange import Exchange
    from trainer.exact.packs.packs import Packs
    from trainer.record.console import DeepSpeedLog
    from trainer.run.build import build
    from trainer.run.course import make_step

    pieces = build(config, ranks, config.plan(ranks.world_size), DeepSpeedLog(keep=False))
    step: Any = make_step(pieces)
    early, leaves = step._early, pieces.batches.micro_batch_counts()
    place = {"rank": ranks.rank, "world_size": ranks.world_size}
    whole = Exchange(step._sum, early._layout, leaves=leaves, **place)
    if pack > 1:
        model, parameters = pieces.engine.model, pieces.engine.parameters
        step.own_block.packs = Packs(step.micro_batches, parameters, model, step.statistics, pieces.device, pack, 10**6)
    batches = iter(pieces.batches.starting_at(0))
    for _ in range(10):  # trials of packs, and warming up
        step(next(batches))
    ratios, whole_s = [], []
    for turn in range(rounds):
        seconds = {}
        for name in ("early", "whole") if turn % 2 else ("whole", "early"):
            step._early, step._exchange = (early, early) if name == "early" else (None, whole)
            step.own_block._early = step._early
            dist.barrier()
            began_s = time.perf_counter()
            for _ in range(STEPS_A_TURN // 2):
                step(next(batches))
            seconds[name] = (time.perf_counter() - began_s) / (STEPS_A_TURN // 2)
        ratios.append(seconds["early"] / seconds["whole"])
        whole_s.append(seconds["whole"])
    return len(early.buckets), ratios, whole_s


def _early(rounds: int) -> None:
    print(f"step time, in buckets / in one piece, {rounds} rounds of {STEPS_A_TURN // 2} steps: median (quartiles)\n")
    print(f"{'model':22}{'ranks':>6}{'packs of':>9}{'buckets':>8}{'ms in one piece':>17}   ratio")
    wide = {"model": "mlp", "width": 1024}
    for name, options, W, pack, mib in (
        ("mlp, width 1024", wide, 2, 1, 2.0),
        ("mlp, width 1024", wide, 2, 16, 2.0),
        ("mlp, width 1024", wide, 4, 8, 2.0),
        ("cnn", {"model": "cnn"}, 2, 16, 0.05),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            overrides = {
                "trainer.task_options": options,
                "trainer.epochs": 100_000,
                "trainer.output_dir": scratch,
                "trainer.exchange_bucket_mib": mib,
            }
            config = load_config(ROOT / "ds_configs" / "strong.json", overrides)
            buckets, ratios, whole_s = run_ranks(_early_steps, W, config, rounds, pack, timeout_s=3600)[0]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ms = statistics.median(whole_s) * 1e3
        print(f"{name:22}{W:>6}{pack:>9}{buckets:>8}{ms:>17.1f}   {middle:.3f}  ({low:.3f} to {high:.3f})", flush=True)


def _collectives(ranks: Ranks, numel: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way to sum a gradient of `numel` float32, one node a rank."""
    import torch
    import torch.distributed as dist

    from trainer.exact.exchange import Exchange
    from trainer.exact.gradient_sum import GradientSum
    from trainer.exact.record import RecordLayout
    from trainer.ranks.collectives import all_gather_flat
    from trainer.ranks.rendezvous import start

    torch.set_num_threads(1)
    start(ranks, "gloo", 600.0)
    W, layout = ranks.world_size, RecordLayout(0)
    gradient_sum = GradientSum([torch.zeros(numel)], leaves=[W], rank=ranks.rank, world_size=W, head_size=layout.size)
    exchange = Exchange(gradient_sum, layout, leaves=[W], rank=ranks.rank, world_size=W)
    gradient = torch.ones(numel)

    def tree_way(direct: bool) -> None:
        gradient_sum.add(gradient_sum.start(W).start, [gradient])
        (exchange._direct if direct else exchange._by_shards)(W)

    piece, everyone = torch.ones(numel), torch.empty(ranks.world_size * numel)
    ways = {
        "gloo's gather": lambda: dist.all_gather(list(everyone.view(ranks.world_size, -1)), piece),
        "our gather": lambda: all_gather_flat(everyone, piece),
        "all_reduce": lambda: dist.all_reduce(gradient.clone()),
        "direct": lambda: tree_way(True),
        "shards": lambda: tree_way(False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            dist.barrier()
            began_s = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(values[2:]) * 1e3 for name, values in times.items()}


def main() -> None:
    """Runs both parts and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--early", action="store_true", help="only the exchange under the backward")
    flags = parser.parse_args()
    rounds = flags.rounds
    if flags.early:
        _early(rounds)
        return
    print(
        f"step time at 2 ranks, exact / one all_reduce, {rounds} rounds of {STEPS_A_TURN} steps: median (quartiles)\n"
    )
    for model in ("cnn", "mlp"):
        with tempfile.TemporaryDirectory() as scratch:
            overrides = {
                "trainer.task_options": {"model": model},
                "trainer.epochs": 100_000,
                "trainer.output_dir": scratch,
            }
            config = load_config(ROOT / "ds_configs" / "strong.json", overrides)
            ratios = run_ranks(_steps, 2, config, rounds, timeout_s=3600)[0]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{model:6}{middle:.3f}  ({low:.3f} to {high:.3f})", flush=True)
    names = ("all_reduce", "direct", "shards", "gloo's gather", "our gather")
    print("\nthe collective alone, median ms\n")
    print(f"{'ranks':>5}{'gradient':>12}" + "".join(f"{name:>15}" for name in names))
    for world_size in (2, 4, 8):
        for numel in (10_000, 100_000, 300_000, 1_000_000, 10_000_000):
            ms = run_ranks(_collectives, world_size, numel, max(6, rounds), timeout_s=3600)[0]
            size = f"{numel * 4 / 2**20:.2f} MiB"
            print(f"{world_size:>5}{size:>12}" + "".join(f"{ms[name]:15.2f}" for name in names), flush=True)


if __name__ == "__main__":
    main()
