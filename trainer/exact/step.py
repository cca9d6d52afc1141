"""One optimizer step, exact: the same bits at every number of ranks.

Read `__call__` from top to bottom: this rank's micro-batches, the exchange, the checks, the clipping, the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ..ranks.collectives import meetings, message_device
from ..ranks.place import Ranks
from .batch_norm import RunningStatistics
from .checks.audit import Audit
from .checks.foreign_draws import ForeignDraws
from .checks.non_finite import non_finite
from .exchange import Exchange, most_local
from .flags import Flags
from .gradient_sum import GradientSum
from .micro_batches import GlobalBatch, MicroBatches, ignore_phase
from .optional.early_exchange import EarlyExchange
from .own_block import OwnBlock
from .record import OwnRecords, RecordLayout
from .updates import Updates


class StepResult(NamedTuple):
    """The results of a step, the same on every rank.

    Attributes:
        losses: (M,) the summed loss of each micro-batch in order.
        norm: () of the gradient before clipping.
        learning_rate: of this step.
        norms: (M,) of the micro-batches' gradients; None if they are not measured.
        stop: whether a rank has asked all ranks to stop.
    """

    losses: Tensor
    norm: Tensor
    learning_rate: float
    norms: Tensor | None
    stop: bool


class ExactStep:
    """The step at ZeRO stage 0.

    Attributes:
        audit: set in a bitwise run: in an audited step, a micro-batch is computed a second time.
        broken: () on the device; not 0 after a step whose loss or gradient was not finite. Used if `deferred`.
        deferred: whether the host learns of such a step only later, as on a GPU.
        own_block: computes this rank's micro-batches. Packs and CUDA graphs are set there.

    Args:
        optimizer: applies the gradient.
        micro_batches: computes the losses of micro-batches.
        statistics: of the model's normalisation layers.
        ranks: this rank, and how many.
        leaves: every M that a step may have.
        device: of the model.
        max_norm: the norm to which the gradient is clipped; 0 for no clipping.
        measures_norms: whether to measure the norm of each micro-batch's gradient.
        bucket_bytes: the least size of the buckets in which ranks exchange the gradient under the last backward. None
            to exchange it whole, after the backward.
        mark: called at the end of each phase of the step, so that phases can be timed.
    """

    def __init__(
        self,
        optimizer: Updates,
        micro_batches: MicroBatches,
        statistics: RunningStatistics,
        *,
        ranks: Ranks,
        leaves: Collection[int],
        device: torch.device,
        max_norm: float = 0.0,
        measures_norms: bool = False,
        bucket_bytes: int | None = None,
        mark: Callable[[str], None] = ignore_phase,
    ) -> None:
        self._optimizer, self.micro_batches, self.statistics = optimizer, micro_batches, statistics
        self._device, self._max_norm, self._mark = device, max_norm, mark
        self.audit: Audit | None = None
        layout = RecordLayout(statistics.size, measures_norms)
        rank, W = ranks.rank, ranks.world_size
        most = most_local(leaves, W)
        self._sum = GradientSum(
            optimizer.parameters, leaves=leaves, rank=rank, world_size=W, head_size=most * layout.size
        )
        # Records lie in front of the gradient and travel with it, so a step needs no collective of its own for them.
        self._own = OwnRecords(self._sum.head[: most * layout.size].view(most, layout.size), layout)
        self._exchange = Exchange(
            self._sum, layout, leaves=leaves, rank=rank, world_size=W, staging=message_device(device)
        )
        self._early: EarlyExchange | None = None
        if W > 1 and bucket_bytes is not None:
            early = EarlyExchange(self._sum, layout, leaves=leaves, rank=rank, world_size=W, bucket_bytes=bucket_bytes)
            if len(early.buckets) > 1:  # a single bucket would be sent at the end, as without buckets
                self._exchange = self._early = early
        optimizer.use_gradient(self._sum.gradient, self._sum.gradient_views)
        self._scale = torch.zeros((), device=device)  # made once: a new tensor a step would be copied to the GPU
        self._flags = Flags(device)
        self._foreign = ForeignDraws(device)
        self.own_block = OwnBlock(
            micro_batches,
            statistics,
            optimizer.parameters,
            scale=self._scale,
            added=self._sum,
            records=self._own,
            early=self._early,
            foreign=self._foreign,
            device=device,
            measures_norms=measures_norms,
            mark=mark,
        )
        self._look_for_unused = True
        # On the CPU the host reads each loss, and finds a bad one before the update. On a GPU it does not wait: from
        # the bad step on, a flag on the device makes the optimizer skip every update. The host reads it with the log.
        self.broken = torch.zeros((), device=device)
        self.deferred = device.type == "cuda" and optimizer.skip_update_where(self.broken)

    def __call__(self, batch: GlobalBatch, rate_factor: float | None = 1.0, asks_to_stop: bool = False) -> StepResult:
        """Makes the step. Collective: every rank.

        Args:
            batch: the samples of the step.
            rate_factor: the learning rate as a multiple of the configured one; None if the optimizer sets it.
            asks_to_stop: whether this rank asks all ranks to stop after this step.

        Raises:
            NonFiniteError: on every rank; the parameters are those before this step.
            RanksDifferError: on every rank, with the parameters of before this step, if the audit finds two results for
                one micro-batch. On this rank alone, after the step, if another thread draws from torch's generators.
        """
        statistics, own = self.statistics, self._own
        if asks_to_stop:
            own.raise_flag()
        # The loss is sum / count. Autograd takes 1 / count as the gradient of the result with respect to the sum, so
        # the division costs nothing. The count is the global batch's: gradients of micro-batches then just add up.
        self._scale.fill_(1.0 / batch.count)
        M = len(batch.bounds)  # smaller in an epoch's last batch, where some ranks may have no micro-batch at all
        block = self._sum.start(M)
        if self._early is not None:
            self._early.begin(M)
        audit = self.audit if self.audit is not None and self.audit.due(batch.step) else None
        if audit is not None:
            audit.choose(batch.step, M)
        statistics.begin()  # until `settle`, the layers write to scratch memory
        try:
            # A rank adds its own block of the M micro-batches along the tree ...
            self.own_block.add(batch, block, audit)
            # After this rank's own block: what the second computation leaves in random generators changes nothing then.
            if audit is not None and audit.other is not None:
                self.own_block.compute_again(batch, audit, audit.other)
            statistics.check(batch.step)
        finally:
            statistics.settle()  # after an error, too: the model must not keep the scratch buffers
        self._foreign.begin()  # from here to `end`, nothing of the step draws random numbers
        # ... the ranks exchange the nodes of the tree, and finish the sum ...
        with meetings:  # where a rank waits for others: a watching thread measures for how long
            records = self._exchange(M)
            stop = self._flags.read(records.flags)
        if audit is not None:
            audit.compare()  # before the update, so that a wrong gradient is never applied
        # Of the whole gradient, after the sum is complete: a sum of the shards' norms would depend on W.
        norm = torch.linalg.vector_norm(self._sum.gradient)
        self._mark("reduce")

        # ... and each rank makes the same update.
        # One number tells whether all are finite: nan and infinity survive every addition.
        health = records.losses.sum() + norm
        if self.deferred:
            # 0 times a finite number is 0; of NaN and infinity it is NaN. Fewer kernels than `isfinite`.
            # The maximum keeps the flag set: after a bad step, no later step is applied either.
            torch.maximum(self.broken, health.mul_(0.0).ne_(0.0), out=self.broken)
        elif not math.isfinite(health.item()):  # device to host; on the CPU it is there already
            raise non_finite(batch.step, records.losses.tolist(), float(norm), statistics=self.statistics.size)
        if self._max_norm > 0.0:
            # As torch.nn.utils.clip_grad_norm_ (the 1e-6 is from there), on the flat gradient. Always multiplied, as
            # there: the host would have to wait for the device to learn whether norm > max_norm.
            self._sum.gradient.mul_((self._max_norm / (norm + 1e-6)).clamp_(max=1.0))
        rate = self._optimizer.set_learning_rate(rate_factor)
        self._optimizer.update(self._unused())
        # After the update: a step that raises must leave the running statistics as they were, too.
        if statistics.size:
            statistics.apply(records.statistics, self.broken if self.deferred else None)
        self._foreign.end(batch.step)
        self._mark("optimizer")
        return StepResult(records.losses, norm, rate, records.norms, stop)

    @property
    def gradient_views(self) -> list[Tensor]:
        """The reduced gradient of the last step, one tensor a parameter."""
        return self._sum.gradient_views

    def _unused(self) -> list[int]:
        """Positions of the parameters that no micro-batch of this step used. The optimizer leaves them alone.

        On a GPU, the host has to wait to learn this. So if the first step used all parameters, later steps do not
        look.
        """
        if not self._look_for_unused:
            return []
        unused = self._sum.unused()
        found = unused.nonzero().flatten().tolist() if unused.any() else []  # device to host
        self._look_for_unused = self._device.type == "cpu" or bool(found)
        return found
