"""A run's global batches, and the losses of their micro-batches: gather, augment, seed, forward, loss."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .order import SampleRandom, by_length, epoch_order, key, seed_generators
from .plan import micro_batch_bounds, steps_per_epoch
from .progress import Progress, TaskCalls
from .splits import Batch, Split


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step, the same on every rank.

    Attributes:
        progress: where the run stands: optimizer steps made, and passes begun, before this one.
        indices: (n,) int64 into the training split, on the device.
        bounds: its M micro-batches, as positions in `indices`.
        count: what the summed loss is divided by: samples, or valid tokens.
        longest: the longest sample of each micro-batch, for samples of different lengths.
        tokens: the summed lengths of the samples; 0 where they have none.
        counts: what each micro-batch adds to `count`, in a run that looks at the gradient's noise.
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
        steps_per_epoch: of the run.
        total_steps: its length.

    Args:
        split: the training split, on the CPU.
        device: where the indices go.
        seed: of the run.
        global_batch_size, micro_batch_size: B and m.
        drop_last: whether an epoch's last, smaller batch is left out.
        total_steps: the length of the run.
        one_shape: give all samples one length, that of the longest there is: for a model that is compiled for each
            shape.
        counted: note what each micro-batch counts.
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
        """Every number of micro-batches that a step has: M, and that of an epoch's last batch."""
        rest = len(self._split) % self._B
        sizes = {self._B, rest} if rest and not self._drop_last else {self._B}
        return {len(micro_batch_bounds(size, self._m)) for size in sizes}

    def at(self, step: int) -> GlobalBatch:
        """The batch of one step."""
        return next(self.starting_at(step))

    def starting_at(self, first_step: int) -> Iterator[GlobalBatch]:
        """The batches from a step on, to the end of the run."""
        split, B, lengths = self._split, self._B, self._lengths
        # Full rows, as of packed text, have nothing to gain from it.
        uneven = lengths if lengths is not None and lengths.double().mean() < 0.98 * lengths.max() else None
        step = first_step
        for epoch in itertools.count(first_step // self.steps_per_epoch):
            order = epoch_order(self._seed, epoch, len(split))
            if uneven is not None:
                order = by_length(order, uneven, B, self._m)
            on_device = order.to(self._device)
            for start in range(step % self.steps_per_epoch * B, self.steps_per_epoch * B, B):
                if step >= self.total_steps:
                    return
                progress = Progress(step, epoch, self.total_steps)
                yield self._batch(progress, order[start : start + B], on_device[start : start + B])
                step += 1

    def _batch(self, progress: Progress, samples: Tensor, on_device: Tensor) -> GlobalBatch:
        bounds = micro_batch_bounds(len(samples), self._m)
        # The count is known before anything is computed: from the indices, on the host.
        count = self._split.count_of(samples)
        if count == 0:
            raise UserError(
                f"None of the {len(samples)} samples of step {progress.step + 1} counts: their counts (valid tokens, "
                "weights) add up to 0, by which their loss would be divided.\nLeave such samples out of the "
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


# Samples are gathered for many micro-batches at a time, up to this many bytes.
CHUNK_BYTES = 64 << 20
# Memory from torch's allocators starts at a multiple of this. A piece of a chunk that does too is as good
# as a fresh tensor; any other is copied, since a math library may choose its kernel by alignment.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 512}


def ignore_phase(phase: str) -> None:
    """For who does not measure where the time goes."""


class Computed(NamedTuple):
    """One micro-batch, computed alone.

    Attributes:
        arrays: the samples as the task's forward got them.
        outputs: what its forward returned.
        result: what its loss returned: for a task that keeps the protocol, (summed loss, count).
    """

    arrays: Batch
    outputs: Any
    result: Any


class MicroBatches:
    """Computes micro-batches: gather, augment, seed, forward, loss.

    How many micro-batches a rank has depends on the world size, so nothing is computed for several of them at once:
    a kernel may give an element other bits in a tensor of another size. Only gathers, which move values, are made
    in chunks, and augmentations that say that they are as harmless (`augment_in_chunks`).

    Args:
        task: as in `tasks.protocol`.
        model: what its forward is called with.
        split: the training split, on the model's device.
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
        # The task's word; the rehearsal looks whether it is true (see `rehearsal.chunks`).
        self.augments_in_chunks = bool(getattr(task, "augment_in_chunks", False))

    def losses(self, batch: GlobalBatch, block: range) -> Iterator[Tensor]:
        """The summed losses of a block of micro-batches, each with its graph: () on the device."""
        for first in range(block.start, block.stop, self._chunk):
            chunk = range(first, min(first + self._chunk, block.stop))
            loaded = self.samples(batch, chunk, self.augments_in_chunks)
            self._mark("data")
            for j, arrays in zip(chunk, loaded):
                yield self._forward(batch, j, arrays).result[0]

    def compute(self, batch: GlobalBatch, j: int) -> Computed:
        """Computes one micro-batch alone, as `losses` does among others. Not for the step: for looking at the task."""
        (arrays,) = self.samples(batch, range(j, j + 1), self.augments_in_chunks)
        return self._forward(batch, j, arrays)

    def augmented(self, batch: GlobalBatch, j: int) -> Any:
        """What a task's augment() returns for one micro-batch, as it is. For looking at the task."""
        start, stop = batch.bounds[j]
        indices = batch.indices[start:stop]
        arrays = self._split.gather(indices)
        return arrays if self._calls.augment is None else self._augmented(arrays, indices, batch.progress)

    def _forward(self, batch: GlobalBatch, j: int, arrays: Batch) -> Computed:
        # Dropout and the like draw from these: a function of the step and the micro-batch.
        seed_generators(key(self._seed, "forward", batch.step, j), self._device)
        with self._autocast():
            outputs = self._calls.forward(self._model, arrays, batch.progress)
            return Computed(arrays, outputs, self._calls.loss(outputs, arrays, batch.progress))

    def samples(self, batch: GlobalBatch, chunk: range, together: bool) -> list[Batch]:
        """The samples of some micro-batches, gathered and augmented: one dictionary each, of fresh tensors.

        Args:
            batch: their global batch.
            chunk: the micro-batches.
            together: augment them at once.
        """
        bounds = batch.bounds[chunk.start : chunk.stop]
        indices = batch.indices[bounds[0][0] : bounds[-1][1]]
        arrays = self._split.gather(indices)
        if self._calls.augment is not None and together:
            arrays = self._augmented(arrays, indices, batch.progress)
        pieces = self._cut(arrays, [stop - start for start, stop in bounds])
        if self._calls.augment is not None and not together:
            for k, (start, stop) in enumerate(bounds):
                # For what draws from torch's generators instead of its `random`.
                seed_generators(key(self._seed, "augment", batch.step, chunk[k]), self._device)
                pieces[k] = self._augmented(pieces[k], batch.indices[start:stop], batch.progress)
        if batch.longest is not None:
            pieces = [self._split.cut(piece, batch.longest[j]) for j, piece in zip(chunk, pieces)]
        return pieces

    def _cut(self, arrays: Batch, sizes: list[int]) -> list[Batch]:
        """Cuts gathered samples into micro-batches, each of which is as good as gathered by itself."""
        pieces: list[Batch] = [{} for _ in sizes]
        for name, array in arrays.items():
            split = array.split(sizes)
            row_bytes = array[0].numel() * array.element_size()
            if any(size * row_bytes % self._alignment for size in sizes[:-1]) or not array.is_contiguous():
                split = tuple(piece.clone() for piece in split)
            for piece, tensor in zip(pieces, split):
                piece[name] = tensor
        return pieces

    def _augmented(self, arrays: Batch, indices: Tensor, progress: Progress) -> Batch:
        assert self._calls.augment is not None
        if progress.epoch != self._random.epoch:
            self._random.start_epoch(progress.epoch)
        return self._calls.augment(arrays, self._random.of(indices), progress)
