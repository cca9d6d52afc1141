"""What the tests run in ranks that have pretended GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
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
    """As `train`, on GPUs; "waits" and "launches" have each step's, "backend" what torch.distributed was asked for."""
    from trainer.exact.step import ExactStep

    use_caches_beside(config)
    waits: list[dict[tuple[str, str], int]] = []
    launched: list[dict[str, int]] = []
    make_step = ExactStep.__call__

    with PretendedGpu(gpus) as gpu:

        def counted(self: ExactStep, *arguments: Any, **named: Any) -> Any:
            gpu.reset()
            result = make_step(self, *arguments, **named)
            waits.append(dict(gpu.waits + gpu.copies))
            launched.append(dict(+gpu.launches))
            return result

        ExactStep.__call__ = counted  # type: ignore[method-assign]
        return jobs.train(ranks, config) | {"waits": waits, "launches": launched, "backend": gpu.backend}


class _Chosen(dict[Any, int]):
    """What trials would have found out where the first rule of every layer is exact; or where only the last is."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self._last = last

    def get(self, key: Any, default: Any = None) -> int:
        from trainer.exact.packs import rules

        if not self._last:
            return 0
        name = {"mul": "broadcast", "add": "broadcast"}.get(key[0], "convolution" if "conv" in key[0] else key[0])
        return len(getattr(rules, name.upper())) - 1


@fresh
def launches(ranks: Ranks, config: Config, singly: bool, graph: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """The kernels, by operation, of a step with packs of `trainer.pack` micro-batches and of a plain loop's step.

    A trial notes the calls of the first step. What it would find depends on the CPU, so all rules hold.

    Args:
        ranks, config: of the run.
        singly: whether a convolution's weight has its gradient made one micro-batch at a time.
        graph: whether a pack is a CUDA graph.
    """
    from trainer.exact.optional.graphs import TRIALS, Graphs
    from trainer.exact.packs import packs, sites, together

    use_caches_beside(config)
    packs.TRIALS = 1
    packs.difference = lambda *_: None
    together.Together._is_alone = lambda *_: False  # type: ignore[method-assign]
    sites.Sites.holds = lambda *_: True  # type: ignore[method-assign]
    with PretendedGpu(1) as gpu:
        pieces, step = jobs.built(ranks, config)
        size, engine = config.trainer.pack, pieces.engine
        assert isinstance(size, int)
        engine.model.train()
        step.own_block.packs = packs.Packs(
            step.micro_batches, engine.parameters, engine.model, step.statistics, pieces.device, size, 1000
        )
        step.own_block.packs._findings.sites = _Chosen(last=singly)
        batch = pieces.batches.at(0)
        if graph:
            step.own_block.graphs = Graphs(
                [*engine.model.parameters(), *engine.model.buffers()], follows_progress=False
            )
        for number in range(2 + (TRIALS if graph else 0)):  # the first steps have more to do
            gpu.reset()
            step(replace(batch, progress=replace(batch.progress, step=number)))
        assert not step.own_block.packs.refusals(), step.own_block.packs.refusals()
        assert not graph or step.own_block.graphs.summary() == {"shapes": 1}, step.own_block.graphs.summary()
        ours = dict(+gpu.launches)
        optimizer = torch.optim.AdamW(engine.parameters, fused=True)
        for _ in range(2):  # likewise: it makes the optimizer's state
            gpu.reset()
            _plain_step(pieces, batch, optimizer, step)
        return ours, dict(+gpu.launches)


def _plain_step(pieces: Any, batch: Any, optimizer: torch.optim.Optimizer, step: Any) -> None:
    """As a user would write it: the samples of the step are one batch."""
    split, task, parameters = pieces.splits["train"], pieces.task, pieces.engine.parameters
    optimizer.zero_grad()
    arrays = split.gather(batch.indices)
    if getattr(task, "augment", None) is not None:
        arrays = step.micro_batches._augmented(arrays, batch.indices, batch.progress)
    if batch.longest is not None:
        arrays = split.cut(arrays, max(batch.longest))
    (task.loss(task.forward(pieces.engine.model, arrays), arrays)[0] / batch.count).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
