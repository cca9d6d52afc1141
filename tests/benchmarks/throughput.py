"""How fast a step is: this trainer and three loops without it, in turn.

    python tests/benchmarks/throughput.py [--rounds 20] [--model cnn mlp] [--world_sizes 1 2] [--micro_batch_size 8]

The rivals are a hand-written PyTorch loop and a plain DeepSpeed loop over the same micro-batches, and the loop that
a user would write without us: one batch of B / W samples on each rank. All do the digits (gather, augmentation,
forward, backward, clipping, AdamW, cosine schedule) in the same processes, a few steps each in turn, so that a noisy
machine slows all of them. Printed are samples/s as ratios, round by round: median and quartiles. Ours is the whole loop
as a user runs it: logging, guard and TensorBoard included.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.config.keys import Config, load_config
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS_A_TURN = 10
WARM_UP_ROUNDS = 3


def micro_batches(config: Config, ranks: Ranks, whole: bool = False) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """What the rivals train on: each call gives this rank's (image, label) micro-batches of the next step.

    With `whole`, all samples of the rank are one.
    """
    import torch
    import torch.nn.functional as F

    from trainer.tasks.digits import Digits, digit_moves

    split, plan = Digits(**config.trainer.task_options).splits()["train"], config.plan(ranks.world_size)
    images, labels, moves = split["image"], split["label"], digit_moves(1)
    B, W = plan.global_batch_size, ranks.world_size
    m = B // W if whole else plan.micro_batch_size
    steps, done, order = len(labels) // B, 0, torch.randperm(len(labels))

    def next_step() -> Iterator[tuple[Any, Any]]:
        nonlocal done, order
        if done % steps == 0:
            order = torch.randperm(len(labels))
        first = (done % steps) * B + ranks.rank * (B // W)
        done += 1
        for start in range(first, first + B // W, m):
            index = order[start : start + m]
            image = images.index_select(0, index)
            move = moves.index_select(0, torch.randint(len(moves), (len(index),)))
            image = F.pad(image, (1, 1, 1, 1)).flatten(1).gather(1, move).view(image.shape)
            yield image, labels.index_select(0, index)

    return next_step


def hand_written(config: Config, ranks: Ranks, whole: bool = False) -> Callable[[], None]:
    """One step of the loop that a careful person writes by hand; its tensors are resident, its all-reduce is one."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    from trainer.tasks.digits import Digits

    task, samples = Digits(**config.trainer.task_options), micro_batches(config, ranks, whole)
    model = task.model().train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 + 0.5 * math.cos(s / 1e5))
    B, W = config.plan(ranks.world_size).global_batch_size, ranks.world_size
    done, running = 0, torch.zeros(())

    def step() -> None:
        nonlocal done
        for image, label in samples():
            loss = F.cross_entropy(model(image), label, reduction="sum") / B
            loss.backward()
            running.add_(loss.detach())
        if W > 1:
            gradient = torch.cat([p.grad.reshape(-1) for p in parameters])  # type: ignore[union-attr]
            dist.all_reduce(gradient)
            for p, g in zip(parameters, gradient.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view(p.shape))  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        done += 1
        if done % 10 == 0:
            running.item()
            running.zero_()

    return step


def plain_deepspeed(config: Config, ranks: Ranks) -> Callable[[], None]:
    """One step of DeepSpeed's documented loop at stage 0: engine(x), engine.backward, engine.step."""
    import deepspeed
    import torch
    import torch.nn.functional as F

    from trainer.tasks.digits import Digits

    task, samples = Digits(**config.trainer.task_options), micro_batches(config, ranks)
    plan = config.plan(ranks.world_size)
    engine, *_ = deepspeed.initialize(
        model=task.model(),
        config={
            "train_batch_size": plan.global_batch_size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True, "fused": True}},
        },
        model_parameters=None,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.5 + 0.5 * math.cos(s / 1e5)),
        dist_init_required=False,
    )

    def step() -> None:
        for image, label in samples():
            engine.backward(F.cross_entropy(engine(image), label))
            engine.step()

    return step


def _measure(ranks: Ranks, config: Config, rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn, by contender; ours runs as a user's run does, and hands over through its trace."""
    import torch.distributed as dist

    from trainer.run.run import run

    times: dict[str, list[float]] = {"ours": [], "hand-written": [], "whole": [], "DeepSpeed": []}
    rivals: dict[str, Callable[[], None]] = {}
    resumed_s = 0.0

    def trace(step: int, engine: Any, losses: Any) -> None:
        nonlocal resumed_s
        if step % STEPS_A_TURN:
            return
        if not rivals:
            rivals["hand-written"] = hand_written(config, ranks)
            rivals["whole"] = hand_written(config, ranks, whole=True)
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

    run(config, ranks, config_name="benchmark", started_at_s=time.time(), trace=trace)
    count = min(map(len, times.values()))
    return {name: values[WARM_UP_ROUNDS:count] for name, values in times.items()}


def _quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f}  ({low:.3f} to {high:.3f})"


def main() -> None:
    """Runs the benchmark and prints one row a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", nargs="+", default=["cnn", "mlp"])
    parser.add_argument("--world_sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--micro_batch_size", type=int, default=8)
    flags = parser.parse_args()
    rounds = flags.rounds + WARM_UP_ROUNDS + 1
    print(f"{flags.rounds} rounds of {STEPS_A_TURN} steps each; samples/s as a ratio: median (quartiles)\n")
    titles = ("ours / one batch a rank", "ours / hand-written", "DeepSpeed / hand-written")
    print(f"{'model':6}{'ranks':>6}  {'ours, ms a step':>16}  {''.join(f'{title:28}' for title in titles)}")
    for model in flags.model:
        for world_size in flags.world_sizes:
            with tempfile.TemporaryDirectory() as scratch:
                config = load_config(
                    ROOT / "ds_configs" / "strong.json",
                    {
                        "train_micro_batch_size_per_gpu": flags.micro_batch_size,
                        "trainer.task_options": {"model": model},
                        "trainer.drop_last": True,
                        "trainer.epochs": 100_000,
                        "trainer.evaluate_every_epochs": 0,
                        "trainer.max_steps": STEPS_A_TURN * (rounds + 1),
                        "trainer.output_dir": f"{scratch}/run",
                    },
                )
                times = run_ranks(_measure, world_size, config, rounds, timeout_s=3600)[0]
            ours, hand, whole, ds = (times[name] for name in ("ours", "hand-written", "whole", "DeepSpeed"))
            print(
                f"{model:6}{world_size:>6}  {statistics.median(ours) / STEPS_A_TURN * 1e3:16.2f}  "
                f"{_quartiles([w / o for w, o in zip(whole, ours)]):28}"
                f"{_quartiles([h / o for h, o in zip(hand, ours)]):28}"
                f"{_quartiles([h / d for h, d in zip(hand, ds)]):28}",
                flush=True,
            )


if __name__ == "__main__":
    main()
