"""The loop that a user would write without us, as a comparison: one batch of B / W samples on each rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from ...config.keys import Config
from ...exact.micro_batches import GlobalBatches
from ...exact.order import SampleRandom
from ...exact.splits import as_splits
from ...ranks.place import Ranks
from ...run.build import chosen_samples
from ...tasks.protocol import load_task


class Samples:
    """The samples of a rank, step by step, with the task's own data and augmentation.

    Args:
        config: of the run to compare with.
        ranks: this rank.
        device: where the data lies.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device) -> None:
        options, plan = config.trainer, config.plan(ranks.world_size)
        self.task: Any = load_task(options.task, options.task_options)
        on_host = chosen_samples(as_splits(self.task.splits(), "task")["train"], options.train_samples)
        self.split = on_host.to(device)
        self._random = SampleRandom(0, len(self.split), device)
        self._ranks, self._B, self._m = ranks, plan.global_batch_size, plan.micro_batch_size
        batches = GlobalBatches(
            on_host,
            device,
            seed=0,
            global_batch_size=self._B,
            micro_batch_size=self._m,
            drop_last=True,
            total_steps=10**9,
        )
        self._steps = batches.starting_at(0)

    def next_step(self, whole: bool) -> Iterator[tuple[dict[str, Any], float]]:
        """The batches of this rank's part of a step, each with what its loss is divided by.

        Args:
            whole: whether this rank's part is one batch; else micro-batches of the config's size.
        """
        batch = next(self._steps)
        part = self._B // self._ranks.world_size
        size = part if whole else self._m
        first = part * self._ranks.rank
        for start in range(first, first + part, size):
            indices = batch.indices[start : start + size]
            arrays = self.split.gather(indices)
            if getattr(self.task, "augment", None) is not None:
                arrays = self.task.augment(arrays, self._random.of(indices))
            if batch.longest is not None:
                lengths = self.split.lengths
                assert lengths is not None
                arrays = self.split.cut(arrays, int(lengths[indices.cpu()].max()))  # texts: no longer than needed
            yield arrays, batch.count


def autocast(config: Config, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A function that makes the context in which a forward runs: autocast, if the config has it."""
    if not config.torch_autocast.enabled:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def plain_loop(config: Config, ranks: Ranks, device: torch.device, *, whole: bool = True) -> Callable[[], None]:
    """The loop that a careful person writes by hand: tensors on the device, one all-reduce, the loss read now and then.

    Args:
        config: of the run to compare with.
        ranks: this rank. With several ranks, a process group has to be there.
        device: of this rank.
        whole: whether a rank computes one batch a step; else the config's micro-batches.

    Returns:
        A function that makes one step.
    """
    samples, context = Samples(config, ranks, device), autocast(config, device)
    task = samples.task
    model = task.model().to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 + 0.5 * math.cos(s / 1e5))
    done, running = 0, torch.zeros((), device=device)

    def step() -> None:
        nonlocal done
        for arrays, count in samples.next_step(whole):
            with context():
                loss = task.loss(task.forward(model, arrays), arrays)[0] / count
            loss.backward()
            running.add_(loss.detach())
        if ranks.world_size > 1:
            # One all-reduce of the whole gradient: the losses are divided by the global count, so a sum is enough.
            used = [p for p in parameters if p.grad is not None]
            gradient = torch.cat([p.grad.reshape(-1) for p in used])
            dist.all_reduce(gradient)
            for p, g in zip(used, gradient.split([p.numel() for p in used])):
                p.grad.copy_(g.view(p.shape))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        done += 1
        if done % 10 == 0:
            running.item()  # copies to the host, and so waits for the GPU: only now and then, as for a log
            running.zero_()

    return step
