"""One optimizer step, exact: the same bits at every number of ranks.

Read `__call__` from top to bottom: this rank's micro-batches, the exchange, the checks, the clipping, the update.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import TrainerError
from ..ranks.collectives import meetings, message_device
from ..ranks.place import Ranks
from .audit import Audit
from .batch_norm import RunningStatistics
from .early_exchange import EarlyExchange
from .exchange import Exchange, most_local
from .flags import Flags
from .foreign_draws import ForeignDraws
from .gradient_sum import GradientSum, norm_of
from .graphs import Computed, Graphs, OneStream, Work
from .hashes import hash64
from .micro_batches import GlobalBatch, MicroBatches, ignore_phase
from .non_finite import non_finite
from .packs.leaves import Kept
from .packs.pack_sum import PackSum, given_up, taking
from .packs.packs import Packs
from .packs.streams import Streams
from .packs.verdicts import Packed, RefusedError, Single, out_of_memory
from .record import OwnRecords, RecordLayout
from .splits import Batch
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
        packs: set where several micro-batches may be computed in one forward; None to compute them one by one.
        graphs: set where CUDA graphs may be used.

    Args:
        optimizer: applies the gradient.
        micro_batches: computes the losses of micro-batches.
        statistics: of the model's normalisation layers.
        ranks: this rank, and how many.
        leaves: every M that a step may have.
        device: of the model.
        max_norm: the norm to which the gradient is clipped; 0 for no clipping.
        measures_norms: whether to measure the norm of each micro-batch's gradient.
        bucket_bytes: ranks exchange the gradient in buckets of this size or more, under the last backward; None: whole,
            after it.
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
        self._device, self._max_norm, self._measures_norms, self._mark = device, max_norm, measures_norms, mark
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
            if len(early.buckets) > 1:  # a single one would be sent at the end, too
                self._exchange = self._early = early
        optimizer.use_gradient(self._sum.gradient, self._sum.gradient_views)
        self._scale = torch.zeros((), device=device)  # made once: a new tensor a step would be copied to the GPU
        self._flags = Flags(device)
        self.packs: Packs | None = None
        self.graphs: Graphs | None = None
        self._foreign = ForeignDraws(device)
        self._one_stream = OneStream(device)
        self._streams: dict[int, Streams] = {}
        self._look: Callable[[int, Tensor, Tensor, Sequence[Tensor | None]], None] | None = None
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
            RanksDifferError: likewise, if the audit finds two results for one micro-batch. Or on this rank, after the
                step: another thread draws from torch's generators.
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
        statistics.begin()
        if self.graphs is not None:
            self.graphs.begin()
        try:
            # A rank adds its own block of the M micro-batches along the tree ...
            packs = self.packs
            if packs is None or packs.begin(batch, block) == 1:
                self._add_singly(batch, block, block, audit)
            else:
                for part in packs.parts(batch, block):
                    if len(part) == 1 or not self._add_pack(packs, batch, block, part, audit):
                        self._add_singly(batch, block, part, audit)
            if packs is not None:
                packs.end()
            # After this rank's own block: what the second computation leaves in random generators changes nothing.
            if audit is not None and audit.other is not None:
                self._compute_again(batch, audit, audit.other)
            statistics.check(batch.step)
        finally:
            statistics.settle()  # after an error, too: the model must not keep the scratch buffers
        self._foreign.begin()
        # ... the ranks exchange the nodes of the tree, and finish the sum ...
        with meetings:  # where a rank waits for others: a watching thread measures for how long
            records = self._exchange(M)
            stop = self._flags.read(records.flags)
        if audit is not None:
            audit.compare()  # before the update, so that a wrong gradient is never applied
        norm = torch.linalg.vector_norm(self._sum.gradient)
        self._mark("reduce")

        # ... and each rank makes the same update.
        # One number tells whether all are finite: nan and infinity survive every addition.
        health = records.losses.sum() + norm
        if self.deferred:
            # The maximum keeps the flag set: after a bad step, no later step is applied either.
            torch.maximum(self.broken, (~torch.isfinite(health)).float(), out=self.broken)
        elif not math.isfinite(health.item()):  # device to host; on the CPU it is there already
            raise non_finite(batch.step, records.losses.tolist(), float(norm), statistics=self.statistics.size)
        if self._max_norm > 0.0:
            # As torch.nn.utils.clip_grad_norm_ (from which the 1e-6 comes), on the flat gradient. Unconditional, as
            # there: asking whether norm > max_norm would wait for the device.
            self._sum.gradient.mul_((self._max_norm / (norm + 1e-6)).clamp_(max=1.0))
        rate = self._optimizer.set_learning_rate(rate_factor)
        self._optimizer.update(self._unused())
        # After the update: a step that raises must leave the running statistics as they were, too.
        if statistics.size:
            statistics.apply(records.statistics, self.broken if self.deferred else None)
        self._foreign.end(batch.step)
        self._mark("optimizer")
        return StepResult(records.losses, norm, rate, records.norms, stop)

    def _add_singly(self, batch: GlobalBatch, block: range, part: Sequence[int], audit: Audit | None) -> None:
        """Computes and adds some of this rank's micro-batches one by one."""
        own = self._own
        for j, arrays in self.micro_batches.loaded(batch, part):
            sender, number, last = self._sender(1), j - block.start, None
            if sender is not None:
                last = PackSum(self._sum, len(batch.bounds), (j,), self._measures_norms, None, sender)
            collected = own.statistics(number)
            loss, gradients = self._single(batch, j, arrays, collected, last)
            # Noted before it is added: `add` works in place, and the sum holds no single micro-batch.
            if audit is not None and j == audit.own:
                audit.note_summed(loss, collected, gradients)
            if self._look is not None:
                self._look(j, loss, collected, gradients)
            if last is None:
                added = self._sum.add(j, gradients)
                norm = norm_of(added) if self._measures_norms else None
            else:
                last.close()
                norm = last.norms[0] if self._measures_norms else None
            own.add(number, loss, norm)
            self._mark("compute")

    def _single(
        self, batch: GlobalBatch, j: int, arrays: Batch, collected: Tensor, last: PackSum | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Loss and gradients of one micro-batch. Its statistics go to `collected`.

        If `last` is given, it takes each gradient as soon as it is there, so that what is complete can be sent.
        """
        statistics, parameters = self.statistics, self._optimizer.parameters
        if self.graphs is not None and self._look is None:
            found = self.graphs.compute(self._one(batch, j), arrays)
            gradients: list[Tensor | None] = [None] * len(parameters)
            for place, gradient, _ in found.gradients:
                gradients[place] = gradient
                if last is not None:
                    last.take(place, gradient[None], None)
            if statistics.size:
                collected.copy_(found.statistics)
            return found.losses, gradients
        loss: Tensor = self.micro_batches.forward(batch, j, arrays).result[0]
        self._foreign.after_one(self.micro_batches.forward_key(batch, j))
        with contextlib.nullcontext() if last is None else taking(parameters, last):
            own = self._gradients(loss)
        if last is not None:
            last.check(own)
        if statistics.size:
            statistics.collect(collected)
        return loss, own

    def _one(self, batch: GlobalBatch, j: int) -> Work:
        """A micro-batch as work that may have a CUDA graph."""

        def compute(arrays: Batch) -> Computed:
            loss: Tensor = self.micro_batches.seeded_forward(batch, arrays).result[0]
            gradients = self._gradients(loss)
            row = torch.empty(self.statistics.size, device=self._device)
            if self.statistics.size:
                self.statistics.collect(row)
            return Computed(loss.detach(), row, [(i, g, None) for i, g in enumerate(gradients) if g is not None])

        keys = [self.micro_batches.forward_key(batch, j)]
        return Work(("one",), compute, self._one_stream, keys, batch.step)

    def _several(self, packs: Packs, batch: GlobalBatch, part: Sequence[int]) -> Work:
        """A pack likewise."""
        streams = self._streams.setdefault(len(part), Streams(len(part), self._device))

        def compute(arrays: Batch) -> Computed:
            kept = Kept()
            packed = packs.compute_samples(batch, part, self._scale, kept, arrays, streams)
            return Computed(packed.losses, packed.statistics, kept.taken)

        return Work(("pack", len(part)), compute, streams, packs.keys(batch, part), batch.step)

    def _add_pack(
        self, packs: Packs, batch: GlobalBatch, block: range, part: Sequence[int], audit: Audit | None
    ) -> bool:
        """Computes and adds micro-batches as a pack. False if that cannot be done: then nothing has changed."""
        known = packs.known(batch, part)
        if known is None:
            packs.try_out(batch, part, self._scale, lambda own: self._add_noted(batch, block, own, audit))
            return True
        if not known:
            return False
        try:
            self._add_known_pack(packs, batch, block, part, audit)
            packs.packed += len(part)
            return True
        except RefusedError as error:  # of these values; others may do
            if self._early is not None and self._early.sent:
                raise given_up(batch.step, error) from error
            if error.untried and packs.may_try_more():
                packs.try_out(batch, part, self._scale, lambda own: self._add_noted(batch, block, own, audit))
                return True
            packs.refuse(batch, part, error)
        except Exception as error:  # whatever a task's code does with more samples than in a trial
            if out_of_memory(error):
                packs.shrink(len(part))  # what has been sent is complete, and it is not sent again
            else:
                if self._early is not None and self._early.sent:
                    raise given_up(batch.step, error) from error
                packs.refuse(batch, part, error)
        return False

    def _add_known_pack(
        self, packs: Packs, batch: GlobalBatch, block: range, part: Sequence[int], audit: Audit | None
    ) -> None:
        audited = part.index(audit.own) if audit is not None and audit.own is not None and audit.own in part else None
        sender = self._sender(len(part))
        added = PackSum(self._sum, len(batch.bounds), part, self._measures_norms, audited, sender)
        packed: Packed | Computed
        if self.graphs is None:
            packed = packs.compute(batch, part, self._scale, added)
        else:
            arrays = self.micro_batches.pack_samples(batch, part)
            packed = self.graphs.compute(self._several(packs, batch, part), arrays)
            for place, rows, present in packed.gradients:
                added.take(place, rows, present)
        added.close()
        if audit is not None and audited is not None:
            audit.note_summed(packed.losses[audited], packed.statistics[audited], added.audited)
        self._own.add_pack([j - block.start for j in part], packed.losses, packed.statistics, added.norms)
        self._mark("compute")

    def _sender(self, count: int) -> EarlyExchange | None:
        """Sends buckets while the next `count` micro-batches are computed, if they are this rank's last ones."""
        return self._early if self._sum.left == count and self._look is None else None

    def _add_noted(self, batch: GlobalBatch, block: range, part: Sequence[int], audit: Audit | None) -> list[Single]:
        """As `_add_singly`; returns hashes of what was computed."""
        found: list[Single] = []
        generator = torch.default_generator

        def look(j: int, loss: Tensor, statistics: Tensor, gradients: Sequence[Tensor | None]) -> None:
            drawn = generator.get_state()
            generator.manual_seed(self.micro_batches.forward_key(batch, j))
            found.append(
                Single(
                    hash64([loss.float()]),
                    hash64([statistics]) if statistics.numel() else None,
                    [None if g is None else hash64([g]) for g in gradients],
                    not torch.equal(drawn, generator.get_state()),
                )
            )

        self._look = look
        try:
            self._add_singly(batch, block, part, audit)
        finally:
            self._look = None
        return found

    @property
    def gradient_views(self) -> list[Tensor]:
        """The reduced gradient of the last step, one tensor a parameter."""
        return self._sum.gradient_views

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the loss times the scale, one tensor a parameter; None if the loss does not use it."""
        # Not backward(): it would add to `parameter.grad`, in an order that depends on the rank's own block.
        return torch.autograd.grad(loss, self._optimizer.parameters, self._scale, allow_unused=True)

    def _compute_again(self, batch: GlobalBatch, audit: Audit, j: int) -> None:
        try:
            audit.note_again(*self._again(batch, j))
        except Exception as error:
            if isinstance(error, TrainerError) or out_of_memory(error):
                raise
            raise audit.failed(error) from error

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
        """Positions of the parameters that no micro-batch of this step used. The optimizer leaves them alone.

        On a GPU, the host has to wait to learn this. So if the first step used all parameters, later steps are
        not asked.
        """
        if not self._look_for_unused:
            return []
        unused = self._sum.unused()
        found = unused.nonzero().flatten().tolist() if unused.any() else []  # device to host
        self._look_for_unused = self._device.type == "cpu" or bool(found)
        return found
