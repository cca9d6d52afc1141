"""How fast a step is: this trainer and three loops without it, in turn.

    python tests/benchmarks/throughput.py                    # digits: CNN and MLP, at one rank and two
    python tests/benchmarks/throughput.py --packs 1 auto --set train_micro_batch_size_per_gpu=32
    python tests/benchmarks/throughput.py --ds_config ds_configs/causal_lm.json --set trainer.task_options.data=a.txt

The rivals: the loop that a user would write without us (one batch of B / W samples on each rank), and a hand-written
loop and a plain DeepSpeed loop over the same micro-batches. All do the same (gather, augmentation, forward, loss,
backward, clipping, AdamW, a schedule) with the task's own functions and resident tensors, in the same processes, a few
steps each in turn, so that a noisy machine slows all of them. Printed are samples/s as ratios, round by round: median
and quartiles. Ours is the whole loop as a user runs it: logging, guard and TensorBoard included.

Beside them stands the number of operators of a step, which no noise disturbs: all that torch dispatches, and in
parentheses those that compute something. Views do not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.commands.cli import parse_override
from trainer.config.keys import Config, load_config
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS_A_TURN = 5
WARM_UP_ROUNDS = 12  # packs of all sizes are tried in the first 50 steps or so
DIGITS: list[dict[str, Any]] = [{"trainer.task_options": {"model": model}} for model in ("cnn", "mlp")]


class Operators:
    """Counts what torch dispatches while it is active: all, and what computes something."""

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        outer = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(
                self,
                func: Any,
                types: Sequence[type],
                args: Sequence[Any] = (),
                kwargs: Mapping[str, Any] | None = None,
            ) -> Any:
                outer.all += 1
                outer.computing += not (func.is_view or "split" in str(func) or func.namespace == "profiler")
                return func(*args, **(kwargs or {}))

        self.all = self.computing = 0
        self.mode = Mode()


def plain_deepspeed(config: Config, ranks: Ranks) -> Callable[[], None]:
    """One step of DeepSpeed's documented loop at stage 0: engine(x), engine.backward, engine.step."""
    import deepspeed
    import torch

    from trainer.commands.doctor.plain_loop import Samples, autocast

    cpu = torch.device("cpu")
    samples, plan, context = Samples(config, ranks, cpu), config.plan(ranks.world_size), autocast(config, cpu)
    task = samples.task
    engine, *_ = deepspeed.initialize(
        model=task.model(),
        config={
            "train_batch_size": plan.global_batch_size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
        },
        model_parameters=None,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.5 + 0.5 * math.cos(s / 1e5)),
        dist_init_required=False,
    )

    def step() -> None:
        for arrays, count in samples.next_step(whole=False):
            with context():
                loss = task.loss(task.forward(engine, arrays), arrays)[0] / count * plan.micro_batches
            engine.backward(loss)
            engine.step()

    return step


def _measure(ranks: Ranks, config: Config, rounds: int) -> dict[str, Any]:
    """Seconds of each turn, by contender, and the operators of a step; ours hands over through its trace."""
    import torch
    import torch.distributed as dist

    from trainer.commands.doctor.plain_loop import plain_loop
    from trainer.exact.packs import packs
    from trainer.run.run import run

    packs.FEWEST_STEPS = 1  # as in a longer run: a short one does not look for packs
    times: dict[str, list[float]] = {"ours": [], "hand-written": [], "whole": [], "DeepSpeed": []}
    counts: dict[str, Operators] = {}
    rivals: dict[str, Callable[[], None]] = {}
    resumed_s = 0.0
    counted = STEPS_A_TURN * (rounds - 1) + 1  # a step of the last round

    def trace(step: int, engine: Any, losses: Any) -> None:
        nonlocal resumed_s
        if step == counted:
            counts["ours"] = Operators()
            counts["ours"].mode.__enter__()
        if step == counted + 1:
            counts["ours"].mode.__exit__(None, None, None)
            counts["whole"] = Operators()
            with counts["whole"].mode:
                rivals["whole"]()
        if step % STEPS_A_TURN:
            return
        if not rivals:
            rivals["hand-written"] = plain_loop(config, ranks, torch.device("cpu"), whole=False)
            rivals["whole"] = plain_loop(config, ranks, torch.device("cpu"))
            rivals["DeepSpeed"] = plain_deepspeed(config, ranks)
        else:
            times["ours"].append(time.perf_counter() - resumed_s)
        for name, rival in rivals.items():
            if ranks.world_size > 1:
                dist.barrier()
            began_s = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                rival()
            times[name].append(time.perf_counter() - began_s)
        if ranks.world_size > 1:
            dist.barrier()
        resumed_s = time.perf_counter()

    summary = run(config, ranks, config_name="benchmark", started_at_s=time.time(), trace=trace)
    last = min(map(len, times.values())) - 1  # in the last round operators are counted
    return {
        "times": {name: values[min(WARM_UP_ROUNDS, last - 2) : last] for name, values in times.items()},
        "operators": {name: (c.all, c.computing) for name, c in counts.items()},
        "pack": summary.get("pack", {}).get("size", 1),
    }


def _quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _row(config: Config, world_size: int, pack: str, rounds: int) -> str:
    found = run_ranks(_measure, world_size, config, rounds, timeout_s=3600)[0]
    ours, hand, whole, ds = (found["times"][name] for name in ("ours", "hand-written", "whole", "DeepSpeed"))
    (all_, computing), (all_whole, computing_whole) = found["operators"]["ours"], found["operators"]["whole"]
    shown = pack if str(found["pack"]) == pack else f"{pack} ({found['pack']})"
    operators = f"{all_:,} / {all_whole:,} = {all_ / all_whole:.2f} ({computing / computing_whole:.2f})"
    return (
        f"{world_size:>5} {shown:>10} {statistics.median(ours) / STEPS_A_TURN * 1e3:10.2f}  "
        f"{_quartiles([w / o for w, o in zip(whole, ours)]):24}{_quartiles([h / o for h, o in zip(hand, ours)]):24}"
        f"{_quartiles([h / d for h, d in zip(hand, ds)]):24}{operators}"
    )


def main() -> None:
    """Runs the benchmark and prints one row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", help="a config of yours; without it the digits, CNN and MLP")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--packs", nargs="+", default=["auto"], help="values of trainer.pack")
    flags = parser.parse_args()
    rounds = flags.rounds + WARM_UP_ROUNDS + 1
    print(f"{flags.rounds} rounds of {STEPS_A_TURN} steps each; samples/s as a ratio: median (quartiles)\n")
    titles = ("ours / one batch a rank", "ours / hand-written", "DeepSpeed / hand-written")
    print(f"ranks   packs of    ours, ms  {''.join(f'{title:24}' for title in titles)}operators, ours / one batch")
    for case in DIGITS if flags.ds_config is None else [{}]:
        print(case.get("trainer.task_options", {}).get("model", flags.ds_config))
        for world_size in flags.world_sizes:
            for pack in flags.packs:
                with tempfile.TemporaryDirectory() as scratch:
                    changes = {
                        "trainer.drop_last": True,
                        "trainer.epochs": 100_000,
                        "trainer.evaluate_every_epochs": 0,
                        "trainer.max_steps": STEPS_A_TURN * (rounds + 1),
                        "trainer.output_dir": f"{scratch}/run",
                        "trainer.pack": int(pack) if pack.isdecimal() else pack,
                        "trainer.checkpoint.every_steps": 0,
                    }
                    own = dict(parse_override(text) for text in flags.set)
                    file = Path(flags.ds_config) if flags.ds_config else ROOT / "ds_configs" / "strong.json"
                    config = load_config(file, case | own | changes)
                    print(_row(config, world_size, pack, rounds), flush=True)


if __name__ == "__main__":
    main()
