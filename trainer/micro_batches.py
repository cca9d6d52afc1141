"""A run's global batches, and the losses of their micro-batches: gather, augment, seed, forward, loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .batching import micro_batch_bounds
from .build import Pieces
from .errors import UserError
from .monitor import PhaseTimer
from .order import SampleRandom, by_length, epoch_order, key, seed_generators
from .progress import Progress, TaskCalls
from .splits import Batch


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


def global_batches(pieces: Pieces, first_step: int = 0) -> Iterator[GlobalBatch]:
    """The batches of a run from a step on, in order: a function of the seed and the plan, not of the world size."""
    split, B = pieces.host_splits["train"], pieces.plan.global_batch_size
    # A compiled model is compiled for each shape: it sees one, of the longest sample there is.
    lengths = None if pieces.config.trainer.compile else split.lengths
    # Full rows, as of packed text, have nothing to gain from it.
    uneven = lengths if lengths is not None and lengths.double().mean() < 0.98 * lengths.max() else None
    step = first_step
    for epoch in range(first_step // pieces.steps_per_epoch, -(-pieces.total_steps // pieces.steps_per_epoch)):
        order = epoch_order(pieces.config.trainer.seed, epoch, len(split))
        if uneven is not None:
            order = by_length(order, uneven, B, pieces.plan.micro_batch_size)
        on_device = order.to(pieces.device)
        for start in range(step % pieces.steps_per_epoch * B, pieces.steps_per_epoch * B, B):
            if step == pieces.total_steps:
                return
            samples = order[start : start + B]
            bounds = micro_batch_bounds(len(samples), pieces.plan.micro_batch_size)
            # The count is known before anything is computed: from the indices, on the host.
            count = split.count_of(samples)
            if count == 0:
                raise UserError(
                    f"None of the {len(samples)} samples of step {step + 1} counts: their counts (valid tokens, "
                    "weights) add up to 0, by which their loss would be divided.\nLeave such samples out of the "
                    "training split, or use a larger train_batch_size.",
                    agreed=True,
                )
            yield GlobalBatch(
                Progress(step, epoch, pieces.total_steps),
                on_device[start : start + B],
                bounds,
                count,
                None if lengths is None else split.longest(samples, bounds),
                split.tokens(samples),
                split.counts_of(samples, bounds) if pieces.measures_noise else None,
            )
            step += 1


# Samples are gathered many micro-batches at a time, up to so many bytes of them.
CHUNK_BYTES = 64 << 20
# Memory from torch's allocators starts at a multiple of this. A piece of a chunk that does too is as good
# as a fresh tensor; any other is copied, since a math library may choose its kernel by alignment.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 512}


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
    """

    def __init__(self, pieces: Pieces, timer: PhaseTimer) -> None:
        self._engine, self._device, self._timer = pieces.engine, pieces.device, timer
        self._split = pieces.splits["train"]
        self._calls = TaskCalls(pieces.task)
        self._seed = pieces.config.trainer.seed
        self._random = SampleRandom(self._seed, len(self._split), pieces.device)
        self._alignment = ALIGNMENT_BYTES[pieces.device.type]
        sample_bytes = sum(array[0].numel() * array.element_size() for array in self._split.arrays.values())
        self._chunk = max(1, CHUNK_BYTES // max(1, sample_bytes * pieces.plan.micro_batch_size))
        # The task's word; the rehearsal looks whether it is true (see `chunks`).
        self.augments_in_chunks = bool(getattr(pieces.task, "augment_in_chunks", False))

    def losses(self, batch: GlobalBatch, block: range) -> Iterator[Tensor]:
        """The summed losses of a block of micro-batches, each with its graph: () on the device."""
        model = self._engine.forward_module
        for first in range(block.start, block.stop, self._chunk):
            chunk = range(first, min(first + self._chunk, block.stop))
            loaded = self.load(batch, chunk, self.augments_in_chunks)
            self._timer.mark("data")
            for j, arrays in zip(chunk, loaded):
                yield self._forward(model, batch, j, arrays).result[0]

    def compute(self, batch: GlobalBatch, j: int) -> Computed:
        """Computes one micro-batch alone, as `losses` does among others. Not for the step: for looking at the task."""
        (arrays,) = self.load(batch, range(j, j + 1), self.augments_in_chunks)
        return self._forward(self._engine.forward_module, batch, j, arrays)

    def _forward(self, model: Any, batch: GlobalBatch, j: int, arrays: Batch) -> Computed:
        # Dropout and the like draw from these: a function of the step and the micro-batch.
        seed_generators(key(self._seed, "forward", batch.step, j), self._device)
        with self._engine.autocast():
            outputs = self._calls.forward(model, arrays, batch.progress)
            return Computed(arrays, outputs, self._calls.loss(outputs, arrays, batch.progress))

    def load(self, batch: GlobalBatch, chunk: range, together: bool) -> list[Batch]:
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
