"""What the tests run in ranks that have pretended GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.distributed import jobs
from tests.pretended_gpu.device import PretendedGpu
from tests.standing import fresh
from trainer.config.keys import Config
from trainer.ranks.place import Ranks


@fresh
def on_gpus(ranks: Ranks, gpus: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(ranks, *arguments)` on a machine with so many GPUs. It may have more ranks."""
    with PretendedGpu(gpus):
        return function(ranks, *arguments)


def use_caches_beside(config: Config) -> None:
    folder = Path(config.trainer.output_dir or "").parent
    os.environ["TRAINER_CACHE"], os.environ["HF_DATASETS_CACHE"] = str(folder / "cache"), str(folder / "datasets")


def train(ranks: Ranks, config: Config) -> dict[str, Any]:
    """As `jobs.train`, with caches in the test's folder."""
    use_caches_beside(config)
    return jobs.train(ranks, config)


@fresh
def train_counted(ranks: Ranks, gpus: int, config: Config) -> dict[str, Any]:
    """As `train`, on GPUs; "waits" has each step's, "backend" what torch.distributed was asked for."""
    from trainer.exact.step import ExactStep

    use_caches_beside(config)
    waits: list[dict[tuple[str, str], int]] = []
    make_step = ExactStep.__call__

    with PretendedGpu(gpus) as gpu:

        def counted(self: ExactStep, *arguments: Any, **named: Any) -> Any:
            gpu.reset()
            result = make_step(self, *arguments, **named)
            waits.append(dict(gpu.waits + gpu.copies))
            return result

        ExactStep.__call__ = counted  # type: ignore[method-assign]
        return jobs.train(ranks, config) | {"waits": waits, "backend": gpu.backend}


@fresh
def launches(ranks: Ranks, config: Config, steps: int) -> tuple[list[int], int, dict[str, int], dict[str, int]]:
    """Kernels of each step with packs, and of a step of the loop that a user would write; both by operation, too."""
    from trainer.exact.packs.packs import Packs

    use_caches_beside(config)
    with PretendedGpu(1) as gpu:
        pieces, step = jobs.built(ranks, config)
        size = config.trainer.pack
        assert isinstance(size, int)
        model = pieces.engine.model.train()
        step.packs = Packs(
            step.micro_batches, pieces.engine.parameters, model, step.statistics, pieces.device, size, 1000
        )
        ours = []
        for batch in pieces.batches.starting_at(0):
            gpu.reset()
            step(batch)
            ours.append(gpu.launches.copy())
            if len(ours) == steps:
                break
        assert not step.packs.refusals(), step.packs.refusals()
        # The plain loop, with its own optimizer.
        optimizer = torch.optim.AdamW(pieces.engine.parameters, fused=True)
        split, indices = pieces.splits["train"], batch.indices
        for _ in range(2):
            optimizer.zero_grad()
            gpu.reset()
            arrays = split.gather(indices)
            if batch.longest is not None:
                arrays = split.cut(arrays, max(batch.longest))
            task = pieces.task
            if getattr(task, "augment", None) is not None:
                arrays = step.micro_batches._augmented(arrays, indices, batch.progress)
            loss = task.loss(task.forward(model, arrays), arrays)[0] / batch.count
            loss.backward()
            torch.nn.utils.clip_grad_norm_(pieces.engine.parameters, 1.0)
            optimizer.step()
        plain = gpu.launches
    return [sum(c.values()) for c in ours], sum(plain.values()), dict(ours[-1]), dict(plain)
