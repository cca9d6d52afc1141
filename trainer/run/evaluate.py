"""Evaluation: outputs gathered in sample order, metrics computed once, sums in a fixed order.

A split is cut into micro-batches of `trainer.evaluate_micro_batch_size`, which do not depend on the world size. Each
rank computes a contiguous block of them, as in training.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..exact.order import key, seed_generators, seed_python
from ..exact.plan import micro_batch_bounds, rank_block
from ..exact.progress import Progress, TaskCalls
from ..exact.splits import Batch, Split
from ..ranks.collectives import all_gather_flat, broadcast_object, gather_objects
from ..ranks.place import Ranks
from ..tasks.contract import check_outputs, metrics_problem
from ..tasks.protocol import Outputs, Task


class Evaluated(Protocol):
    """What an evaluation needs of an engine: `deepspeed_engine.Engine`, or a saved model without an optimizer."""

    @property
    def forward_module(self) -> nn.Module:
        """The model that a task's forward is called with."""

    @property
    def device(self) -> torch.device:
        """Where it is."""

    @property
    def compiled(self) -> bool:
        """Whether every micro-batch must have one shape."""

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision context of forward and loss."""


def evaluate(
    task: Task,
    engine: Evaluated,
    split: Split,
    host_split: Split,
    ranks: Ranks,
    micro_batch_size: int,
    seed: int,
    progress: Progress,
    look: Callable[[Outputs, Batch], None] | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Loss and metrics of a split, the same bits at every world size. Collective: every rank.

    Args:
        task: gives forward, loss and metrics.
        engine: holds the model. It is in evaluation mode meanwhile, and in training mode afterwards.
        split, host_split: the same data on the device and on the CPU.
        ranks: decides which micro-batches this rank computes.
        micro_batch_size: samples of one forward.
        seed: for models that draw random numbers in evaluation, too.
        progress: of the run, for tasks that ask for it.
        look: called on rank 0 with the outputs and the arrays of the whole split, on the CPU.
        tick: called after every forward with how many this rank has made, and how many it has to make.

    Returns:
        {"loss": ..., and the task's metrics}, on every rank.
    """
    bounds = micro_batch_bounds(len(split), micro_batch_size)
    block = list(rank_block(len(bounds), ranks.world_size, ranks.rank))
    sums, parts = _own_outputs(task, engine, split, host_split, ranks, bounds, block, seed, progress, tick)
    described = {name: (value.dtype, tuple(value.shape[1:])) for name, value in parts.items()}
    said = gather_objects((sums, described, sum(bounds[j][1] - bounds[j][0] for j in block)))
    # fsum rounds once, at the end, so the number of ranks does not matter.
    loss_sum = math.fsum(value for values, _, _ in said for value in values)
    # From a rank that has computed rows: one without a micro-batch cannot describe its outputs.
    description = next(d for _, d, rows in said if rows)
    rows = [r for _, _, r in said]
    outputs_in_order = {
        name: _gather_rows(parts.get(name), dtype, shape, rows) for name, (dtype, shape) in description.items()
    }
    result: dict[str, float] | str | None = None  # a text describes a problem with the task's metrics
    if ranks.first:
        whole = outputs_in_order.get("") if list(outputs_in_order) == [""] else outputs_in_order
        metrics = task.metrics(whole, host_split.arrays)
        if look is not None:
            look(whole, host_split.arrays)
        count = host_split.count_of(torch.arange(len(host_split)))
        result = metrics_problem(type(task).__name__, metrics)
        if result is None:
            result = {"loss": loss_sum / count, **{name: float(value) for name, value in metrics.items()}}
    found: Any = broadcast_object(result)
    if isinstance(found, str):
        raise UserError(found, agreed=True)
    return found


def _own_outputs(
    task: Task,
    engine: Evaluated,
    split: Split,
    host_split: Split,
    ranks: Ranks,
    bounds: Sequence[tuple[int, int]],
    block: list[int],
    seed: int,
    progress: Progress,
    tick: Callable[[int, int], None],
) -> tuple[list[float], dict[str, Tensor]]:
    """Computes this rank's micro-batches. Collective at ZeRO stage 3: every rank. Waits for the device, once.

    Args:
        bounds: (start, stop) of every micro-batch of the split.
        block: the numbers of this rank's micro-batches.
        task, engine, split, host_split, ranks, seed, progress, tick: as for `evaluate`.

    Returns:
        The loss sum of each micro-batch, and name -> (rows, ...) outputs on the device, in the order of the samples.
    """
    longest = None if engine.compiled else host_split.longest(torch.arange(len(split)), bounds)
    # At ZeRO stage 3 a forward is collective. So ranks with fewer micro-batches repeat one, and drop its result.
    most = -(-len(bounds) // ranks.world_size)
    repeats = [0] * (most - len(block)) if engine.zero_stage == 3 else []
    sums: list[Tensor] = []
    pieces: dict[str, list[Tensor]] = {}
    calls, model = TaskCalls(task), engine.forward_module
    model.eval()
    # Not inference_mode: a model may keep a table that it makes here (of positions, say), and use it in training.
    with torch.no_grad(), engine.autocast():
        for position, j in enumerate(block + repeats):
            start, stop = bounds[j]
            batch = split.gather(torch.arange(start, stop, device=engine.device))
            batch = split.cut(batch, longest[j] if longest is not None else None)
            # By the number of the micro-batch, so that any rank that computes it draws the same numbers.
            seed_generators(key(seed, "evaluation", j), engine.device)
            seed_python(key(seed, "evaluation", j))
            outputs = calls.forward(model, batch, progress)
            loss, _ = calls.loss(outputs, batch, progress)
            tick(position + 1, len(block) + len(repeats))
            if position >= len(block):
                continue
            sums.append(loss.detach().float())
            for name, value in check_outputs(outputs, stop - start).items():
                pieces.setdefault(name, []).append(value.detach())
    model.train()
    # Device to host, once for all micro-batches.
    local_sums = torch.stack(sums).tolist() if sums else []
    return local_sums, {name: torch.cat(values) for name, values in pieces.items()}


def _gather_rows(part: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], rows: list[int]) -> Tensor:
    """The ranks' rows one after the other, on the CPU: (sum of rows, *shape)."""
    if len(rows) == 1:
        assert part is not None
        return part.cpu()
    padded = torch.zeros(max(rows), *shape, dtype=dtype)
    if part is not None:
        padded[: len(part)].copy_(part)  # device to host
    # As bytes: a collective only moves them, and not every backend knows every type.
    received = torch.empty(len(rows), *padded.shape, dtype=dtype)
    all_gather_flat(received.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8))
    return torch.cat([received[r, :count] for r, count in enumerate(rows)])
