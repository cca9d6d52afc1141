"""One optimizer step: the exact one, and the one that leaves the reduction to DeepSpeed's ZeRO."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .audit import Audit
from .batch_norm import RunningStatistics
from .batching import rank_block
from .build import Pieces
from .errors import NonFiniteError
from .gradient_noise import Noise, estimate
from .micro_batches import GlobalBatch, MicroBatches
from .monitor import PhaseTimer
from .summation import TreeSum
from .watch import Watch


class ExactStep:
    """The step at ZeRO stage 0: the same bits at every world size."""

    def __init__(self, pieces: Pieces, timer: PhaseTimer, watch: Watch | None = None) -> None:
        self._engine, self._ranks, self._device, self._timer = pieces.engine, pieces.ranks, pieces.device, timer
        self._watch = watch
        self.micro_batches = MicroBatches(pieces, timer)
        self.statistics = RunningStatistics(pieces.engine.model)
        # Set for a run that is bitwise: then a micro-batch is computed again now and then.
        self.audit: Audit | None = None
        self._flags = _Flags(pieces.device)
        self.asked_to_stop = False
        # (M,) of the last step, where they are measured: the norms of the micro-batches' gradients.
        self.micro_batch_norms: Tensor | None = None
        self._adascale, self._measures_noise = pieces.adascale, pieces.measures_noise
        self._tree = TreeSum(
            self._engine.parameters,
            leaves=pieces.micro_batch_counts(),
            statistics_size=self.statistics.size,
            norms=pieces.measures_noise,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            staging=torch.device("cpu") if dist.get_backend() == "gloo" else None,
        )
        self._engine.use_gradient(self._tree.gradient, self._tree.gradient_views)
        self._scale = torch.zeros((), device=self._device)
        # On the CPU the loss is at hand, and a bad one is found before the update. On a GPU the host does
        # not wait for it: a flag on the device makes the optimizer's kernel skip every update from the
        # bad step on, and the host reads it at the end of the logging window.
        self.broken = torch.zeros((), device=self._device)
        self._look_for_unused = True
        self.deferred = self._device.type == "cuda" and self._engine.skip_update_where(self.broken)

    def __call__(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Makes the step. Collective: every rank.

        Returns:
            The loss sums of all micro-batches in order, (M,), and the gradient norm before clipping, ().

        Raises:
            NonFiniteError: on every rank; the parameters are those before this step.
            RanksDifferError: likewise, if the audit finds that a micro-batch was computed wrongly.
        """
        engine, statistics, tree = self._engine, self.statistics, self._tree
        if self._watch is not None:
            self._watch.at(batch.step, "compute")
            if self._watch.stop_reason is not None:
                tree.raise_flag()
        # d(sum / count) = d(sum) * 1 / count: given to autograd as the gradient of the loss, it costs nothing.
        self._scale.fill_(1.0 / batch.count)
        block = tree.start(len(batch.bounds))
        audit = self.audit if self.audit is not None and self.audit.due(batch.step) else None
        if audit is not None:
            audit.choose(batch.step, len(batch.bounds))
        statistics.begin()
        try:
            # A rank adds its own block of the M micro-batches along the tree ...
            for j, loss in zip(block, self.micro_batches.losses(batch, block)):
                gradients = self._gradients(loss)
                if statistics.size:
                    statistics.collect(tree.statistics)
                if audit is not None and j == audit.own:
                    audit.note_summed(loss, tree.statistics, gradients)
                tree.add(gradients, loss)
                self._timer.mark("compute")
            if audit is not None and audit.other is not None:
                audit.note_again(*self._again(batch, audit.other))
        finally:
            statistics.settle()

        # ... the ranks exchange what is left of it ...
        if self._watch is not None:
            self._watch.at(batch.step, "exchange")
        records = tree.reduce()  # (M, 1 + statistics.size)
        self.asked_to_stop = self._flags.read(tree.flags)
        if self._watch is not None:
            self._watch.at(batch.step, "compute")
        if audit is not None:
            audit.compare()
        losses, norm = records[:, 0], engine.gradient_norm()
        self._timer.mark("reduce")

        if self._measures_noise:
            self.micro_batch_norms = tree.norms

        # ... and each makes the same update.
        health = losses.sum() + norm
        if self.deferred:
            torch.maximum(self.broken, (~torch.isfinite(health)).float(), out=self.broken)
        elif not math.isfinite(health.item()):  # device to host; on the CPU it is there already
            raise non_finite(batch.step, losses.tolist(), float(norm))
        if self._adascale is not None:
            # The rate of the step after this one follows from it, and `engine.step` asks for that rate.
            self._adascale.observe(self._noise(batch, norm))
        engine.step(self._without_gradient(batch.step))
        if statistics.size:
            statistics.apply(records[:, 1:], self.broken if self.deferred else None)
        self._timer.mark("optimizer")
        return losses, norm

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """One tensor a parameter, of the loss times the scale; None for a parameter that the loss does not use."""
        return torch.autograd.grad(loss, self._engine.parameters, self._scale, allow_unused=True)

    def _again(self, batch: GlobalBatch, j: int) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Loss, statistics and gradients of any micro-batch, between `begin` and `settle` of the statistics."""
        loss: Tensor = self.micro_batches.compute(batch, j).result[0]
        gradients = self._gradients(loss)
        row = torch.empty(self.statistics.size, device=self._device)
        if self.statistics.size:
            self.statistics.collect(row)
        self._timer.mark("compute")
        return loss, row, gradients

    def _noise(self, batch: GlobalBatch, norm: Tensor) -> Noise | None:
        assert batch.counts is not None
        *norms, whole = torch.cat([self._tree.norms, norm.reshape(1)]).tolist()  # device to host
        return estimate(norms, batch.counts, whole, len(batch.indices))

    def _without_gradient(self, step: int) -> list[int]:
        """Places of the parameters that no micro-batch of this step used.

        On a GPU, looking means waiting for it: after the first step only models that had such parameters
        in it are looked at again.
        """
        if not self._look_for_unused:
            return []
        unused = self._tree.without_gradient()
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


class ZeroStep:
    """The step at ZeRO stages 1 to 3, with DeepSpeed's forward, backward and reduction: labelled tolerance."""

    def __init__(self, pieces: Pieces, timer: PhaseTimer, watch: Watch | None = None) -> None:
        self._engine, self._ranks, self._device, self._timer = pieces.engine, pieces.ranks, pieces.device, timer
        self._watch = watch
        self.micro_batches = MicroBatches(pieces, timer)
        self.statistics = RunningStatistics(pieces.engine.model)
        self.audit: Audit | None = None  # its gradients are in one piece on no rank
        self.deferred = False
        self.asked_to_stop = False
        self.micro_batch_norms: Tensor | None = None  # the config refuses to measure them here

    def __call__(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Makes the step. Collective: every rank. Returns losses (M,) and the gradient norm () as ExactStep does."""
        statistics, W = self.statistics, self._ranks.world_size
        if self._watch is not None:
            self._watch.at(batch.step, "compute")
        M = len(batch.bounds)
        block = rank_block(M, W, self._ranks.rank)
        most = -(-M // W)
        records = torch.zeros(most, 2 + statistics.size, device=self._device)
        if self._watch is not None and self._watch.stop_reason is not None:
            records[:, -1] = 1.0

        def losses_of_block() -> Iterator[Tensor]:
            # DeepSpeed's reduction is collective, in stages 2 and 3 at every micro-step, so every rank makes
            # equally many: one with less to do adds micro-batches of weight 0.
            statistics.begin()
            for i, loss in enumerate(self.micro_batches.losses(batch, block)):
                yield loss * (W / batch.count)  # DeepSpeed averages over ranks, and goes backward before it returns
                records[i, 0] = loss.detach()
                if statistics.size:
                    statistics.collect(records[i, 1:-1])
            for _ in range(most - len(block)):
                (loss,) = self.micro_batches.losses(batch, range(1))
                yield loss * 0.0
            statistics.settle()
            self._timer.mark("compute")

        norm = self._engine.zero_step(losses_of_block())
        in_order = torch.cat([records] if W == 1 else _gather(records, W, M))[:M]
        losses = in_order[:, 0]
        if statistics.size:
            statistics.apply(in_order[:, 1:-1])
        self.asked_to_stop = bool(in_order[:, -1].any())
        self._timer.mark("optimizer")
        if not math.isfinite(float(losses.sum())):
            raise non_finite(batch.step, losses.tolist(), float(norm), kept=False)
        return losses, norm


def _gather(records: Tensor, world_size: int, micro_batches: int) -> list[Tensor]:
    staged = records.cpu() if dist.get_backend() == "gloo" else records
    everyone = [torch.empty_like(staged) for _ in range(world_size)]
    dist.all_gather(everyone, staged)
    blocks = [rank_block(micro_batches, world_size, r) for r in range(world_size)]
    return [rows[: len(block)].to(records.device) for rows, block in zip(everyone, blocks)]


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
