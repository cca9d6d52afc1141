"""A run's global batches, and the losses of their micro-batches: gather, augment, seed, forward, loss."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .order import SampleRandom, by_length, epoch_order, key, seed_generators
from .plan import micro_batch_bounds, steps_per_epoch
from .progress import Progress, TaskCalls
from .splits import Batch, Split

if TYPE_CHECKING:
    from .packs.pack import Pack
    from .packs.trace import Trace


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step, the same on every rank.

    Attributes:
        progress: how far the run is: optimizer steps and epochs before this one.
        indices: (n,) int64 into the training split, on the device.
        bounds: its M micro-batches, as positions in `indices`.
        count: what the summed loss is divided by: samples, or valid tokens.
        longest: the longest sample of each micro-batch, for samples of different lengths.
        tokens: the summed lengths of the samples; 0 if samples have no lengths.
        counts: what each micro-batch adds to `count`, in a run that measures the gradient noise scale; else None.
    """

    progress: Progress
    indices: Tensor
    bounds: list[tuple[int, int]]
    count: float
    longest: list[int] | None = None
    tokens: int = 0
    counts: list[float] | None = None

    @property
    def step(self) -> int:
        """Optimizer steps made before this one."""
        return self.progress.step


class GlobalBatches:
    """The global batches of a run, in order: a function of the data, the seed and the plan, not of the world size.

    Attributes:
        steps_per_epoch: optimizer steps in one epoch.
        total_steps: the length of the run, in optimizer steps.

    Args:
        split: the training split, on the CPU.
        device: where the indices go.
        seed: of the run.
        global_batch_size, micro_batch_size: B and m.
        drop_last: whether an epoch's last, smaller batch is left out.
        total_steps: the length of the run, in optimizer steps.
        one_shape: leave all samples at one length, that of the longest. This is for a compiled model, which would be
            compiled again for each new shape.
        counted: note what each micro-batch adds to the loss's count.
    """

    def __init__(
        self,
        split: Split,
        device: torch.device,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        drop_last: bool,
        total_steps: int,
        one_shape: bool = False,
        counted: bool = False,
    ) -> None:
        self._split, self._device, self._seed, self._counted = split, device, seed, counted
        self._B, self._m, self._drop_last = global_batch_size, micro_batch_size, drop_last
        self.steps_per_epoch = steps_per_epoch(len(split), global_batch_size, drop_last)
        self.total_steps = total_steps
        self._lengths = None if one_shape else split.lengths

    def micro_batch_counts(self) -> set[int]:
        """The numbers of micro-batches that steps have: M, and that of an epoch's last, smaller batch if any."""
        rest = len(self._split) % self._B
        sizes = {self._B, rest} if rest and not self._drop_last else {self._B}
        return {len(micro_batch_bounds(size, self._m)) for size in sizes}

    def at(self, step: int) -> GlobalBatch:
        """The batch of one step."""
        return next(self.starting_at(step))

    def starting_at(self, first_step: int) -> Iterator[GlobalBatch]:
        """The batches from a step on, to the end of the run."""
        split, B, lengths = self._split, self._B, self._lengths
        # Sorting by length saves padding. Rows that are nearly full, such as packed text, have no padding to save.
        uneven = lengths if lengths is not None and lengths.double().mean() < 0.98 * lengths.max() else None
        step = first_step
        for epoch in itertools.count(first_step // self.steps_per_epoch):
            order = epoch_order(self._seed, epoch, len(split))  # the same on every rank: the seed is the run's
            if uneven is not None:
                order = by_length(order, uneven, B, self._m)
            on_device = order.to(self._device)
            # A resumed run starts inside an epoch: the permutation is made again, and its used part is skipped.
            for start in range(step % self.steps_per_epoch * B, self.steps_per_epoch * B, B):
                if step >= self.total_steps:
                    return
                progress = Progress(step, epoch, self.total_steps)
                yield self._batch(progress, order[start : start + B], on_device[start : start + B])
                step += 1

    def _batch(self, progress: Progress, samples: Tensor, on_device: Tensor) -> GlobalBatch:
        bounds = micro_batch_bounds(len(samples), self._m)
        # The count comes from the indices, on the host. So each micro-batch's loss can be divided by the count of
        # the whole global batch before any other micro-batch is computed.
        count = self._split.count_of(samples)
        if count == 0:
            raise UserError(
                f"The counts (valid tokens, or weights) of the {len(samples)} samples of step {progress.step + 1} "
                "add up to 0, so their loss cannot be divided by the count.\nLeave such samples out of the "
                "training split, or use a larger train_batch_size.",
                agreed=True,
            )
        return GlobalBatch(
            progress,
            on_device,
            bounds,
            count,
            None if self._lengths is None else self._split.longest(samples, bounds),
            self._split.tokens(samples),
            self._split.counts_of(samples, bounds) if self._counted else None,
        )


# Samples are gathered for many micro-batches at a time, up to this many bytes, because one large gather costs less than
# many small ones. The limit bounds the memory of a rank with many micro-batches.
CHUNK_BYTES = 64 << 20
# Memory from torch's allocators starts at a multiple of this. A piece of a chunk that starts at such a multiple is
# as good as a fresh tensor. Any other piece is copied, because a math library may choose its kernel by alignment.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 512}


def ignore_phase(phase: str) -> None:
    """The `mark` of a step whose phases are not timed: does nothing."""


class Computed(NamedTuple):
    """One micro-batch, computed alone.

    Attributes:
        arrays: the samples as the task's forward got them.
        outputs: what its forward returned.
        result: what its loss returned: for a task that keeps the protocol, (summed loss, count). For one with
            sample_losses, their sum and the number of samples.
    """

    arrays: Batch
    outputs: Any
    result: Any


class MicroBatches:
    """Computes micro-batches: gather, augment, seed, forward, loss.

    The number of a rank's micro-batches depends on the world size. So nothing is computed for several of them at once:
    a kernel may give an element other bits in a tensor of another size. There are four exceptions:

    - gathers, which only move values;
    - random numbers of samples, which are drawn for the whole split (see `order.SampleRandom`);
    - augmentations of a task that declares them as harmless (`augment_in_chunks`);
    - packs, which have been compared with single micro-batches (see `packs`).

    Args:
        task: as in `tasks.protocol`.
        model: the model that the task's forward is called with.
        split: the training split, on the model's device.
        device: of the model.
        seed: of the run.
        micro_batch_size: m.
        autocast: makes the precision context of forward and loss.
        mark: called with "data" when samples have been gathered and augmented.
    """

    def __init__(
        self,
        task: Any,
        model: Any,
        split: Split,
        *,
        device: torch.device,
        seed: int,
        micro_batch_size: int,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        mark: Callable[[str], None] = ignore_phase,
    ) -> None:
        self._calls, self._model, self._split, self._device = TaskCalls(task), model, split, device
        self._seed, self._autocast, self._mark = seed, autocast, mark
        self._random = SampleRandom(seed, len(split), device)
        self._alignment = ALIGNMENT_BYTES[device.type]
        sample_bytes = sum(array[0].numel() * array.element_size() for array in split.arrays.values())
        self._chunk = max(1, CHUNK_BYTES // max(1, sample_bytes * micro_batch_size))
        # The task claims it; the rehearsal checks the claim (see `rehearsal.chunks`).
        self.augments_in_chunks = bool(getattr(task, "augment_in_chunks", False))
        # Notes what a micro-batch's forward and loss call, for trials of packs.
        self.watch: Callable[[Batch], contextlib.AbstractContextManager[Trace]] | None = None

    def losses(self, batch: GlobalBatch, part: Sequence[int]) -> Iterator[Tensor]:
        """The summed losses of some micro-batches, each with its graph: () on the device."""
        # Only the gather is shared by several. Forward and loss are computed for one micro-batch at a time.
        for j, arrays in self.loaded(batch, part):
            yield self.forward(batch, j, arrays).result[0]

    def loaded(self, batch: GlobalBatch, part: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        """Some micro-batches, each with its samples, gathered and augmented."""
        for first in range(0, len(part), self._chunk):
            chunk = part[first : first + self._chunk]
            loaded = self.samples(batch, chunk, self.augments_in_chunks)
            self._mark("data")
            yield from zip(chunk, loaded)

    def compute(self, batch: GlobalBatch, j: int) -> Computed:
        """Computes one micro-batch alone, with the same bits as `losses`. For the audit and the rehearsal."""
        (arrays,) = self.samples(batch, range(j, j + 1), self.augments_in_chunks)
        return self.forward(batch, j, arrays)

    def forward_key(self, batch: GlobalBatch, j: int) -> int:
        """The seed of what a micro-batch's forward and loss draw."""
        return key(self._seed, "forward", batch.step, j)

    def pack_samples(self, batch: GlobalBatch, part: Sequence[int]) -> Batch:
        """The samples of a pack, gathered and augmented: (g m, ...) each."""
        if self._calls.augment is None or self.augments_in_chunks:
            together = self._gathered(batch, part, self.augments_in_chunks)[0]
            # All micro-batches of a pack have one shape, so the first one's longest sample is as long as any other's.
            return together if batch.longest is None else self._split.cut(together, batch.longest[part[0]])
        pieces = self.samples(batch, part, False)
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    @property
    def follows_progress(self) -> bool:
        """Whether the task's forward or loss takes the run's progress."""
        return self._calls.follow_progress

    @property
    def gives_sample_losses(self) -> bool:
        """Whether the task computes the losses of several micro-batches in one call."""
        return self._calls.sample_losses is not None

    def pack_losses(self, batch: GlobalBatch, pack: Pack, arrays: Batch, *, random: bool, apart: bool) -> Tensor:
        """The summed losses of a pack's micro-batches, while the pack is active: (g,).

        Args:
            batch: their global batch.
            pack: takes micro-batches apart.
            arrays: as from `pack_samples`.
            random: whether losses draw random numbers.
            apart: call the task's loss for one micro-batch at a time even if it can do it in one call.
        """
        with self._autocast():
            outputs = self._calls.forward(self._model, arrays, batch.progress)
            pack.end_of_forward()
            if self._calls.sample_losses is not None and not apart:
                found = self._calls.sample_losses(outputs, arrays, batch.progress)
                return pack.summed(found)
            losses = []
            for k in range(pack.g):
                # A task's loss may look at all samples that it gets, so it gets those of one micro-batch.
                own, piece = pack.outputs_of(outputs, k), pack.samples_of(arrays, k)
                with pack.now(k, random):
                    losses.append(self._result(own, piece, batch.progress)[0])
            return pack.stacked(losses)

    def augmented(self, batch: GlobalBatch, j: int) -> Any:
        """What a task's augment() returns for one micro-batch, unchecked. For the rehearsal."""
        start, stop = batch.bounds[j]
        indices = batch.indices[start:stop]
        arrays = self._split.gather(indices)
        return arrays if self._calls.augment is None else self._augmented(arrays, indices, batch.progress)

    def forward(self, batch: GlobalBatch, j: int, arrays: Batch) -> Computed:
        """Outputs and loss of a micro-batch whose samples have been gathered and augmented. For the step."""
        # Dropout and the like draw from torch's generators. They are seeded for each (step, micro-batch). So they give
        # the same numbers on any rank, whatever that rank computed before.
        seed_generators(self.forward_key(batch, j), self._device)
        return self.seeded_forward(batch, arrays)

    def seeded_forward(self, batch: GlobalBatch, arrays: Batch) -> Computed:
        """As `forward`, if torch's generators have been seeded with `forward_key` already."""
        with self._autocast():
            # Both branches make the same calls. In a trial of packs, `watch` notes them.
            if self.watch is None:
                outputs = self._calls.forward(self._model, arrays, batch.progress)
                return Computed(arrays, outputs, self._result(outputs, arrays, batch.progress))
            with self.watch(arrays) as trace:
                outputs = self._calls.forward(self._model, arrays, batch.progress)
                trace.end_of_forward()
                return Computed(arrays, outputs, self._result(outputs, arrays, batch.progress))

    def _result(self, outputs: Any, arrays: Batch, progress: Progress) -> Any:
        """The summed loss of one micro-batch and its count, as in `Computed`."""
        if self._calls.sample_losses is None:
            return self._calls.loss(outputs, arrays, progress)
        losses, samples = self._calls.sample_losses(outputs, arrays, progress), len(next(iter(arrays.values())))
        if not isinstance(losses, Tensor) or losses.shape != (samples,):
            got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"{losses!r:.60}"
            raise UserError(
                f"sample_losses() must return one number a sample, a tensor of shape ({samples},); it returned {got}."
            )
        # The same operations as for a pack of one micro-batch, see `packs.pack.Pack.summed`: losses.sum() might add in
        # another order.
        return losses.view(1, -1).sum(1)[0], samples

    def loss(self, batch: GlobalBatch, j: int, outputs: Any, arrays: Batch) -> Any:
        """The result of the task's loss for given outputs. Not for the step: for looking at the task."""
        seed_generators(self.forward_key(batch, j), self._device)
        with torch.no_grad(), self._autocast():
            return self._calls.loss(outputs, arrays, batch.progress)

    def trained_loss(self, batch: GlobalBatch, j: int, outputs: Any, arrays: Batch) -> Any:
        """As `loss`, but of the loss that the step takes: the sum of sample_losses if the task has that method."""
        seed_generators(self.forward_key(batch, j), self._device)
        with torch.no_grad(), self._autocast():
            return self._result(outputs, arrays, batch.progress)

    def samples(self, batch: GlobalBatch, chunk: Sequence[int], together: bool) -> list[Batch]:
        """The samples of some micro-batches, gathered and augmented: a dictionary of fresh tensors for each.

        Args:
            batch: their global batch.
            chunk: the micro-batches.
            together: augment all of them in one call.
        """
        arrays, bounds = self._gathered(batch, chunk, together)
        pieces = self._cut(arrays, [stop - start for start, stop in bounds])
        if self._calls.augment is not None and not together:
            for k, (start, stop) in enumerate(bounds):
                # A task may draw from torch's generators instead of the `random` that it is given.
                seed_generators(key(self._seed, "augment", batch.step, chunk[k]), self._device)
                pieces[k] = self._augmented(pieces[k], batch.indices[start:stop], batch.progress)
        # Padding is cut last. So augment() sees all positions, and the forward sees no position that is padding in
        # every sample.
        if batch.longest is not None:
            pieces = [self._split.cut(piece, batch.longest[j]) for j, piece in zip(chunk, pieces)]
        return pieces

    def _gathered(self, batch: GlobalBatch, chunk: Sequence[int], augment: bool) -> tuple[Batch, list[tuple[int, int]]]:
        """The samples of some micro-batches in one tensor each, and the micro-batches' bounds in the global batch."""
        bounds = [batch.bounds[j] for j in chunk]
        if chunk[-1] - chunk[0] == len(chunk) - 1:  # neighbours
            indices = batch.indices[bounds[0][0] : bounds[-1][1]]
        else:
            indices = torch.cat([batch.indices[start:stop] for start, stop in bounds])
        arrays = self._split.gather(indices)
        if self._calls.augment is not None and augment:
            arrays = self._augmented(arrays, indices, batch.progress)
        return arrays, bounds

    def _cut(self, arrays: Batch, sizes: list[int]) -> list[Batch]:
        """Cuts gathered samples into micro-batches, each laid out in memory as if gathered by itself."""
        pieces: list[Batch] = [{} for _ in sizes]
        for name, array in arrays.items():
            split = array.split(sizes)
            row_bytes = array[0].numel() * array.element_size()
            # The last size does not matter: no piece begins behind it.
            if any(size * row_bytes % self._alignment for size in sizes[:-1]) or not array.is_contiguous():
                split = tuple(piece.clone() for piece in split)
            for piece, tensor in zip(pieces, split):
                piece[name] = tensor
        return pieces

    def _augmented(self, arrays: Batch, indices: Tensor, progress: Progress) -> Batch:
        assert self._calls.augment is not None
        # The tables of random numbers belong to one epoch.
        if progress.epoch != self._random.epoch:
            self._random.start_epoch(progress.epoch)
        return self._calls.augment(arrays, self._random.of(indices), progress)
