"""One optimizer step, exact: the same bits at every number of ranks.

Read `__call__` from top to bottom: this rank's micro-batches, the exchange, the checks, the clipping, the update.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import NonFiniteError
from ..ranks.collectives import meetings
from ..ranks.place import Ranks
from .audit import Audit
from .batch_norm import RunningStatistics
from .exchange import Exchange, most_local
from .gradient_sum import GradientSum, norm_of
from .micro_batches import GlobalBatch, MicroBatches, ignore_phase
from .record import OwnRecords, RecordLayout


class Updates(Protocol):
    """What applies a gradient: in a run DeepSpeed's engine, see `engine.deepspeed_engine`."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The trained ones, in order."""
        ...

    def use_gradient(self, flat: Tensor, views: list[Tensor]) -> None:
        """Makes a flat buffer the place where `update` finds gradients: one view a parameter, in order."""
        ...

    def skip_update_where(self, flag: Tensor) -> bool:
        """Lets updates be skipped on the device wherever `flag`, a scalar, is not 0. False where it cannot."""
        ...

    def set_learning_rate(self, factor: float | None) -> float:
        """Sets the rate of the next update, as a multiple of the configured one. Returns the rate."""
        ...

    def update(self, unused: Sequence[int] = ()) -> None:
        """Updates the parameters, but for those at the places `unused`."""
        ...


class StepResult(NamedTuple):
    """What a step found, the same on every rank.

    Attributes:
        losses: (M,) the summed loss of each micro-batch in order.
        norm: () of the gradient before clipping.
        learning_rate: of this step.
        norms: (M,) of the micro-batches' gradients, where they are measured.
        stop: whether a rank has asked all to stop.
    """

    losses: Tensor
    norm: Tensor
    learning_rate: float
    norms: Tensor | None
    stop: bool


class ExactStep:
    """The step at ZeRO stage 0.

    Attributes:
        audit: set for a run that is bitwise: then a micro-batch is computed again now and then.
        broken: () not 0 on the device from the first step on that was not finite, if `deferred`.
        deferred: whether the host learns of such a step only later, as on a GPU.

    Args:
        optimizer: applies the gradient.
        micro_batches: computes them.
        statistics: of the model's normalisation layers.
        ranks: this rank, and how many.
        leaves: every M that a step may have.
        device: of the model.
        max_norm: to which the gradient is clipped; 0 for none.
        measures_norms: whether the norms of the micro-batches' gradients are wanted.
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
        mark: Callable[[str], None] = ignore_phase,
    ) -> None:
        self._optimizer, self.micro_batches, self.statistics = optimizer, micro_batches, statistics
        self._device, self._max_norm, self._measures_norms, self._mark = device, max_norm, measures_norms, mark
        self.audit: Audit | None = None
        layout = RecordLayout(statistics.size, measures_norms)
        rank, W = ranks.rank, ranks.world_size
        most = most_local(leaves, W)
        self._sum = GradientSum(
            optimizer.parameters, leaves=leaves, rank=rank, world_size=W, head_size=most * layout.size
        )
        # Records lie in front of the gradient, and travel with it.
        self._own = OwnRecords(self._sum.head[: most * layout.size].view(most, layout.size), layout)
        staging = torch.device("cpu") if dist.get_backend() == "gloo" else None
        self._exchange = Exchange(self._sum, layout, leaves=leaves, rank=rank, world_size=W, staging=staging)
        optimizer.use_gradient(self._sum.gradient, self._sum.gradient_views)
        self._scale = torch.zeros((), device=device)
        self._flags = _Flags(device)
        self._look_for_unused = True
        # On the CPU the loss is at hand, and a bad one is found before the update. On a GPU the host does
        # not wait for it: a flag on the device makes the optimizer's kernel skip every update from the
        # bad step on, and the host reads it at the end of the logging window.
        self.broken = torch.zeros((), device=device)
        self.deferred = device.type == "cuda" and optimizer.skip_update_where(self.broken)

    def __call__(self, batch: GlobalBatch, rate_factor: float | None = 1.0, asks_to_stop: bool = False) -> StepResult:
        """Makes the step. Collective: every rank.

        Args:
            batch: its samples.
            rate_factor: its learning rate, as a multiple of the configured one; None if the optimizer sets it.
            asks_to_stop: whether this rank wants all of them to stop after this step.

        Raises:
            NonFiniteError: on every rank; the parameters are those before this step.
            RanksDifferError: likewise, if the audit finds that a micro-batch was computed wrongly.
        """
        statistics, own = self.statistics, self._own
        if asks_to_stop:
            own.raise_flag()
        # d(sum / count) = d(sum) * 1 / count: given to autograd as the gradient of the loss, it costs nothing.
        self._scale.fill_(1.0 / batch.count)
        M = len(batch.bounds)
        block = self._sum.start(M)
        own.start()
        audit = self.audit if self.audit is not None and self.audit.due(batch.step) else None
        if audit is not None:
            audit.choose(batch.step, M)
        statistics.begin()
        try:
            # A rank adds its own block of the M micro-batches along the tree ...
            for j, loss in zip(block, self.micro_batches.losses(batch, block)):
                gradients = self._gradients(loss)
                if statistics.size:
                    statistics.collect(own.statistics)
                if audit is not None and j == audit.own:
                    audit.note_summed(loss, own.statistics, gradients)
                added = self._sum.add(gradients)
                own.add(loss, norm_of(added) if self._measures_norms else None)
                self._mark("compute")
            if audit is not None and audit.other is not None:
                audit.note_again(*self._again(batch, audit.other))
        finally:
            statistics.settle()

        # ... the ranks exchange what is left of it ...
        with meetings:
            records = self._exchange(M)
            stop = self._flags.read(records.flags)
        if audit is not None:
            audit.compare()
        norm = torch.linalg.vector_norm(self._sum.gradient)
        self._mark("reduce")

        # ... and each makes the same update.
        health = records.losses.sum() + norm
        if self.deferred:
            torch.maximum(self.broken, (~torch.isfinite(health)).float(), out=self.broken)
        elif not math.isfinite(health.item()):  # device to host; on the CPU it is there already
            raise non_finite(batch.step, records.losses.tolist(), float(norm))
        if self._max_norm > 0.0:
            # As torch.nn.utils.clip_grad_norm_, in two operations on the flat gradient.
            self._sum.gradient.mul_((self._max_norm / (norm + 1e-6)).clamp_(max=1.0))
        rate = self._optimizer.set_learning_rate(rate_factor)
        self._optimizer.update(self._unused())
        if statistics.size:
            statistics.apply(records.statistics, self.broken if self.deferred else None)
        self._mark("optimizer")
        return StepResult(records.losses, norm, rate, records.norms, stop)

    @property
    def gradient_views(self) -> list[Tensor]:
        """The reduced gradient of the last step, one tensor a parameter."""
        return self._sum.gradient_views

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """One tensor a parameter, of the loss times the scale; None for a parameter that the loss does not use."""
        return torch.autograd.grad(loss, self._optimizer.parameters, self._scale, allow_unused=True)

    def _again(self, batch: GlobalBatch, j: int) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Loss, statistics and gradients of any micro-batch, between `begin` and `settle` of the statistics."""
        loss: Tensor = self.micro_batches.compute(batch, j).result[0]
        gradients = self._gradients(loss)
        row = torch.empty(self.statistics.size, device=self._device)
        if self.statistics.size:
            self.statistics.collect(row)
        self._mark("compute")
        return loss, row, gradients

    def _unused(self) -> list[int]:
        """Places of the parameters that no micro-batch of this step used: the optimizer passes over them.

        On a GPU, looking means waiting for it: after the first step only models that had such parameters
        in it are looked at again.
        """
        if not self._look_for_unused:
            return []
        unused = self._sum.unused()
        found = unused.nonzero().flatten().tolist() if unused.any() else []  # device to host
        self._look_for_unused = self._device.type == "cpu" or bool(found)
        return found


class _Flags:
    """Whether any rank has raised its flag: the same answer on every rank in the same step.

    A GPU is not waited for: the answer is then that of two steps before, which has long been copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._copies: collections.deque[tuple[Tensor, torch.cuda.Event]] = collections.deque()

    def read(self, flags: Tensor) -> bool:
        """Takes the flags of this step's micro-batches, (M,) float32. Returns whether to stop after this step."""
        if not self._cuda:
            return bool(flags.any())
        copied = torch.cuda.Event()
        host = torch.empty((), pin_memory=True).copy_(flags.max(), non_blocking=True)  # device to host, not waited for
        copied.record()
        self._copies.append((host, copied))
        if len(self._copies) < 3:
            return False
        earlier, event = self._copies.popleft()
        event.synchronize()
        return bool(earlier)


def non_finite(step: int, losses: list[float], norm: float, kept: bool = True) -> NonFiniteError:
    """The error for a step whose loss or gradient is not finite; every rank has the same numbers."""
    bad = next((j for j, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        what = f"the loss of micro-batch {bad} is {losses[bad]}"
    else:
        what = f"the losses are finite, but the gradient's norm is {norm}"
    state = (
        "The parameters are kept as they were before it." if kept else "The parameters may have been updated with it."
    )
    error = NonFiniteError(
        f"Step {step + 1} is not finite: {what}. {state}\n"
        "A lower learning rate, warm-up (trainer.learning_rate.warmup_epochs) or gradient_clipping often helps.",
        agreed=True,
    )
    error.good_steps = step
    return error
