"""The step at ZeRO stages 1 to 3, with DeepSpeed's forward, backward and reduction. Its runs are labelled tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..exact.batch_norm import RunningStatistics
from ..exact.checks.audit import Audit
from ..exact.checks.non_finite import non_finite
from ..exact.micro_batches import GlobalBatch, MicroBatches, ignore_phase
from ..exact.plan import rank_block
from ..exact.record import RecordLayout, Records
from ..exact.step import StepResult
from ..ranks.collectives import message_device
from ..ranks.place import Ranks

if TYPE_CHECKING:
    from .deepspeed_engine import Engine


class ZeroStep:
    """Makes steps as `exact.step.ExactStep` does, but in DeepSpeed's order of adding.

    Args:
        engine: with ZeRO.
        micro_batches, statistics, ranks, device, mark: as for `ExactStep`.
    """

    def __init__(
        self,
        engine: Engine,
        micro_batches: MicroBatches,
        statistics: RunningStatistics,
        *,
        ranks: Ranks,
        device: torch.device,
        mark: Callable[[str], None] = ignore_phase,
    ) -> None:
        self._engine, self.micro_batches, self.statistics = engine, micro_batches, statistics
        self._ranks, self._device, self._mark = ranks, device, mark
        self.audit: Audit | None = None  # stays None: no rank holds a whole gradient to compare
        self.deferred = False

    def __call__(self, batch: GlobalBatch, rate_factor: float | None = 1.0, asks_to_stop: bool = False) -> StepResult:
        """Makes the step. Collective: every rank. As `ExactStep.__call__`."""
        statistics, W, M = self.statistics, self._ranks.world_size, len(batch.bounds)
        block = rank_block(M, W, self._ranks.rank)
        most = -(-M // W)
        layout = RecordLayout(statistics.size)
        rows = torch.zeros(most, layout.size, device=self._device)
        own = Records(rows, layout)
        own.flags.fill_(float(asks_to_stop))

        def losses_of_block() -> Iterator[Tensor]:
            # DeepSpeed's reduction is collective, at stages 2 and 3 in every micro-step. So all ranks must make the
            # same number of micro-steps. A rank with fewer micro-batches adds some with weight 0.
            statistics.begin()
            try:
                for i, loss in enumerate(self.micro_batches.losses(batch, block)):
                    yield loss * (W / batch.count)  # times W: DeepSpeed averages over ranks. It runs the backward here
                    own.losses[i] = loss.detach()
                    if statistics.size:
                        statistics.collect(own.statistics[i])
                for _ in range(most - len(block)):
                    (loss,) = self.micro_batches.losses(batch, range(1))
                    yield loss * 0.0
                statistics.check(batch.step)
            finally:
                statistics.settle()  # after an error, too, as in the exact step
            self._mark("compute")

        rate = self._engine.set_learning_rate(rate_factor)
        norm = self._engine.zero_step(losses_of_block())
        records = Records(torch.cat([rows] if W == 1 else _gather(rows, W, M))[:M], layout)
        if statistics.size:
            statistics.apply(records.statistics)
        self._mark("optimizer")
        if not math.isfinite(float(records.losses.sum())):
            raise non_finite(batch.step, records.losses.tolist(), float(norm), kept=False, statistics=statistics.size)
        return StepResult(records.losses, norm, rate, None, bool(records.flags.any()))


def _gather(rows: Tensor, world_size: int, micro_batches: int) -> list[Tensor]:
    staged = rows.to(message_device(rows.device))
    everyone = [torch.empty_like(staged) for _ in range(world_size)]
    dist.all_gather(everyone, staged)
    blocks = [rank_block(micro_batches, world_size, r) for r in range(world_size)]
    return [rows_of[: len(block)].to(rows.device) for rows_of, block in zip(everyone, blocks)]
