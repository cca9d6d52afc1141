"""A rank's own block of micro-batches: each is computed, alone or in a pack, and added along the tree.

`step.ExactStep` calls `OwnBlock.add`. One micro-batch at a time (`_add_singly`) is the reference. Packs and CUDA graphs
(`_add_pack`) replace it only where a comparison has shown that no bit changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import TrainerError
from .batch_norm import RunningStatistics
from .checks.audit import Audit
from .checks.foreign_draws import ForeignDraws
from .checks.hashes import hash64
from .gradient_sum import GradientSum, norm_of
from .micro_batches import GlobalBatch, MicroBatches
from .optional.early_exchange import EarlyExchange
from .optional.graphs import Computed, Graphs, OneStream, Work
from .packs.leaves import Kept
from .packs.pack_sum import PackSum, given_up, taking
from .packs.packs import Packs
from .packs.streams import Streams
from .packs.verdicts import Packed, RefusedError, Single, out_of_memory
from .record import OwnRecords
from .splits import Batch


class OwnBlock:
    """Computes this rank's micro-batches of a step, and adds their gradients along the tree.

    Attributes:
        packs: set where several micro-batches may be computed in one forward; None to compute them one by one.
        graphs: set where CUDA graphs may be used.

    Args:
        micro_batches: computes the losses of micro-batches.
        statistics: of the model's normalisation layers.
        parameters: the trained ones, in order.
        scale: () the gradient of each loss: 1 / the count of the global batch.
        added: the sum of the gradients.
        records: takes what a micro-batch tells all ranks.
        early: sends buckets of the gradient under the last backward; None where nothing is sent before its end.
        foreign: notices if another thread draws random numbers.
        device: of the model.
        measures_norms: whether to measure the norm of each micro-batch's gradient.
        mark: called at the end of each phase of the step.
    """

    def __init__(
        self,
        micro_batches: MicroBatches,
        statistics: RunningStatistics,
        parameters: Sequence[Tensor],
        *,
        scale: Tensor,
        added: GradientSum,
        records: OwnRecords,
        early: EarlyExchange | None,
        foreign: ForeignDraws,
        device: torch.device,
        measures_norms: bool,
        mark: Callable[[str], None],
    ) -> None:
        self._micro_batches, self._statistics, self._parameters = micro_batches, statistics, parameters
        self._scale, self._sum, self._records, self._early, self._foreign = scale, added, records, early, foreign
        self._device, self._measures_norms, self._mark = device, measures_norms, mark
        self.packs: Packs | None = None
        self.graphs: Graphs | None = None
        self._one_stream = OneStream(device)
        self._streams: dict[int, Streams] = {}
        self._look: Callable[[int, Tensor, Tensor, Sequence[Tensor | None]], None] | None = None

    def add(self, batch: GlobalBatch, block: range, audit: Audit | None) -> None:
        """Computes the micro-batches `block` of a global batch, and adds them.

        Args:
            batch: of this step.
            block: this rank's micro-batches.
            audit: set in an audited step; it is told what was added of the micro-batch that it has chosen.
        """
        if self.graphs is not None:
            self.graphs.begin()
        packs = self.packs
        # Each rank may choose its own size, because no size changes a bit.
        if packs is None or packs.begin(batch, block) == 1:
            self._add_singly(batch, block, block, audit)
        else:
            for part in packs.parts(batch, block):
                if len(part) == 1 or not self._add_pack(packs, batch, block, part, audit):
                    self._add_singly(batch, block, part, audit)
        if packs is not None:
            packs.end()

    def compute_again(self, batch: GlobalBatch, audit: Audit, j: int) -> None:
        """Computes micro-batch j, another rank's or an own one, a second time, and tells the audit.

        Call it between `begin` and `settle` of the statistics.
        """
        try:
            audit.note_again(*self._again(batch, j))
        except Exception as error:
            # A TrainerError says itself what is wrong, and memory that runs out says nothing about the task. Any other
            # error does: the owner has computed this micro-batch.
            if isinstance(error, TrainerError) or out_of_memory(error):
                raise
            raise audit.failed(error) from error

    def _add_singly(self, batch: GlobalBatch, block: range, part: Sequence[int], audit: Audit | None) -> None:
        """Computes and adds some of this rank's micro-batches one by one."""
        own = self._records
        for j, arrays in self._micro_batches.loaded(batch, part):
            sender, number, last = self._sender(1), j - block.start, None
            if sender is not None:
                last = PackSum(self._sum, len(batch.bounds), (j,), self._measures_norms, None, sender)
            collected = own.statistics(number)
            loss, gradients = self._single(batch, j, arrays, collected, last)
            # Noted before it is added: `add` works in place, and afterwards the sum holds no single micro-batch.
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

        If `last` is given, it takes each gradient as soon as it is there, so that complete buckets can be sent.
        """
        statistics, parameters = self._statistics, self._parameters
        # In a trial of packs (`_look`), calls are noted. A graph makes none: it only launches kernels.
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
        loss: Tensor = self._micro_batches.forward(batch, j, arrays).result[0]
        self._foreign.after_one(self._micro_batches.forward_key(batch, j))
        with contextlib.nullcontext() if last is None else taking(parameters, last):
            own = self._gradients(loss)
        if last is not None:
            last.check(own)
        # Before the next micro-batch's forward, which writes to the same scratch memory.
        if statistics.size:
            statistics.collect(collected)
        return loss, own

    def _one(self, batch: GlobalBatch, j: int) -> Work:
        """A micro-batch as work that may have a CUDA graph."""

        def compute(arrays: Batch) -> Computed:
            loss: Tensor = self._micro_batches.seeded_forward(batch, arrays).result[0]
            gradients = self._gradients(loss)
            row = torch.empty(self._statistics.size, device=self._device)
            if self._statistics.size:
                self._statistics.collect(row)
            return Computed(loss.detach(), row, [(i, g, None) for i, g in enumerate(gradients) if g is not None])

        keys = [self._micro_batches.forward_key(batch, j)]
        return Work(("one",), compute, self._one_stream, keys, batch.step)

    def _several(self, packs: Packs, batch: GlobalBatch, part: Sequence[int]) -> Work:
        """A pack as work that may have a CUDA graph."""
        streams = self._streams.setdefault(len(part), Streams(len(part), self._device))

        def compute(arrays: Batch) -> Computed:
            kept = Kept()
            packed = packs.compute_samples(batch, part, self._scale, kept, arrays, streams)
            return Computed(packed.losses, packed.statistics, kept.taken)

        return Work(("pack", len(part)), compute, streams, packs.keys(batch, part), batch.step)

    def _add_pack(
        self, packs: Packs, batch: GlobalBatch, block: range, part: Sequence[int], audit: Audit | None
    ) -> bool:
        """Computes and adds micro-batches as a pack. False if that cannot be done: then the sum has not changed."""
        known = packs.known(batch, part)
        if known is None:  # a trial: the micro-batches are computed singly, which is what is added, and as a pack
            packs.try_out(batch, part, self._scale, lambda own: self._add_noted(batch, block, own, audit))
            return True
        if not known:
            return False
        try:
            self._add_known_pack(packs, batch, block, part, audit)
            packs.packed += len(part)
            return True
        except RefusedError as error:  # with these values; a pack with other values may be possible
            if self._early is not None and self._early.sent:
                raise given_up(batch.step, error) from error
            if error.untried and packs.may_try_more():
                packs.try_out(batch, part, self._scale, lambda own: self._add_noted(batch, block, own, audit))
                return True
            packs.refuse(batch, part, error)
        except Exception as error:  # a task's code may raise anything when it gets more samples than in a trial
            if out_of_memory(error):
                packs.shrink(len(part))  # buckets that were sent are complete, and they are not sent again
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
            arrays = self._micro_batches.pack_samples(batch, part)
            packed = self.graphs.compute(self._several(packs, batch, part), arrays)
            for place, rows, present in packed.gradients:
                added.take(place, rows, present)
        added.close()
        if audit is not None and audited is not None:
            audit.note_summed(packed.losses[audited], packed.statistics[audited], added.audited)
        self._records.add_pack([j - block.start for j in part], packed.losses, packed.statistics, added.norms)
        self._mark("compute")

    def _sender(self, count: int) -> EarlyExchange | None:
        """What sends buckets under the next `count` micro-batches: None unless they are the rank's last ones."""
        # Only the last ones complete the rank's sum.
        return self._early if self._sum.left == count and self._look is None else None

    def _add_noted(self, batch: GlobalBatch, block: range, part: Sequence[int], audit: Audit | None) -> list[Single]:
        """As `_add_singly`; returns hashes of what was computed."""
        found: list[Single] = []
        generator = torch.default_generator

        def look(j: int, loss: Tensor, statistics: Tensor, gradients: Sequence[Tensor | None]) -> None:
            # Whether it drew at all: another state than that of a fresh generator of its seed.
            drawn = generator.get_state()
            generator.manual_seed(self._micro_batches.forward_key(batch, j))
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

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the loss times the scale, one tensor a parameter; None if the loss does not use it."""
        # Not backward(): it would add to `parameter.grad`, in an order that depends on the rank's own block.
        return torch.autograd.grad(loss, self._parameters, self._scale, allow_unused=True)

    def _again(self, batch: GlobalBatch, j: int) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Loss, statistics and gradients of any micro-batch."""
        loss: Tensor = self._micro_batches.compute(batch, j).result[0]
        gradients = self._gradients(loss)
        row = torch.empty(self._statistics.size, device=self._device)
        if self._statistics.size:
            self._statistics.collect(row)
        self._mark("compute")
        return loss, row, gradients
