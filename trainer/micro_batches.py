"""A run's global batches, and the losses of their micro-batches: gather, augment, seed, forward, loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .batching import micro_batch_bounds
from .build import Pieces
from .errors import UserError
from .evaluate import check_outputs
from .monitor import PhaseTimer
from .order import SampleRandom, by_length, epoch_order, key, seed_generators
from .splits import Batch


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one step, the same on every rank.

    Attributes:
        step: optimizer steps made before this one.
        epoch: passes begun before this one.
        indices: (n,) int64 into the training split, on the device.
        bounds: its M micro-batches, as positions in `indices`.
        count: what the summed loss is divided by: samples, or valid tokens.
        longest: the longest sample of each micro-batch, for samples of different lengths.
        tokens: the summed lengths of the samples; 0 where they have none.
        counts: what each micro-batch adds to `count`, in a run that looks at the gradient's noise.
    """

    step: int
    epoch: int
    indices: Tensor
    bounds: list[tuple[int, int]]
    count: float
    longest: list[int] | None = None
    tokens: int = 0
    counts: list[float] | None = None


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
            yield GlobalBatch(
                step,
                epoch,
                on_device[start : start + B],
                bounds,
                split.count_of(samples),
                None if lengths is None else split.longest(samples, bounds),
                split.tokens(samples),
                split.counts_of(samples, bounds) if pieces.measures_noise else None,
            )
            step += 1


# Samples are gathered and augmented many micro-batches at a time, up to so many bytes of them.
CHUNK_BYTES = 64 << 20
# Memory from torch's allocators starts at a multiple of this. A piece of a chunk that does too is as good
# as a fresh tensor; any other is copied, since a math library may choose its kernel by alignment.
ALIGNMENT_BYTES = {"cpu": 64, "cuda": 512}


class MicroBatches:
    """Computes micro-batches: gather, augment, seed, forward, loss."""

    def __init__(self, pieces: Pieces, timer: PhaseTimer) -> None:
        self._pieces, self._timer = pieces, timer
        self._split = pieces.splits["train"]
        self._augment = getattr(pieces.task, "augment", None)
        self._seed = pieces.config.trainer.seed
        self._random = SampleRandom(self._seed, len(self._split), pieces.device)
        self._alignment = ALIGNMENT_BYTES[pieces.device.type]
        sample_bytes = sum(array[0].numel() * array.element_size() for array in self._split.arrays.values())
        self._chunk = max(1, CHUNK_BYTES // max(1, sample_bytes * pieces.plan.micro_batch_size))

    def losses(self, batch: GlobalBatch, block: range) -> Iterator[Tensor]:
        """The summed losses of a block of micro-batches, each with its graph: () on the device."""
        p, task, engine, device = self._pieces, self._pieces.task, self._pieces.engine, self._pieces.device
        model = engine.forward_module
        for first in range(block.start, block.stop, self._chunk):
            chunk = range(first, min(first + self._chunk, block.stop))
            for j, arrays in zip(chunk, self._load(batch, chunk)):
                # Dropout and the like draw from these: a function of the step and the micro-batch.
                seed_generators(key(self._seed, "forward", batch.step, j), device)
                with engine.autocast():
                    outputs = task.forward(model, arrays)
                    result = task.loss(outputs, arrays)
                if batch.step == 0:
                    start, stop = batch.bounds[j]
                    check_outputs(outputs, stop - start)  # now, rather than in the first evaluation
                    expected = p.host_splits["train"].count_of(batch.indices[start:stop].cpu())
                    _check_first_loss(type(task).__name__, result, expected, j)
                yield result[0]

    def _load(self, batch: GlobalBatch, chunk: range) -> list[Batch]:
        """The samples of some micro-batches, gathered and augmented at once: one dictionary each."""
        bounds = batch.bounds[chunk.start : chunk.stop]
        indices = batch.indices[bounds[0][0] : bounds[-1][1]]
        arrays = self._augmented(batch.epoch, indices)
        sizes = [stop - start for start, stop in bounds]
        if batch.step == 0 and self._augment is not None:
            self._check_augment(batch.epoch, indices[: sizes[0]], {n: a[: sizes[0]] for n, a in arrays.items()})
        pieces: list[Batch] = [{} for _ in bounds]
        for name, array in arrays.items():
            split = array.split(sizes)
            row_bytes = array[0].numel() * array.element_size()
            if any(size * row_bytes % self._alignment for size in sizes[:-1]) or not array.is_contiguous():
                split = tuple(piece.clone() for piece in split)
            for piece, tensor in zip(pieces, split):
                piece[name] = tensor
        if batch.longest is not None:
            pieces = [self._split.cut(piece, batch.longest[j]) for j, piece in zip(chunk, pieces)]
        self._timer.mark("data")
        return pieces

    def _augmented(self, epoch: int, indices: Tensor) -> Batch:
        arrays = self._split.gather(indices)
        if self._augment is None:
            return arrays
        if epoch != self._random.epoch:
            self._random.start_epoch(epoch)
        return self._augment(arrays, self._random.of(indices))

    def _check_augment(self, epoch: int, indices: Tensor, among_others: Batch) -> None:
        task = type(self._pieces.task).__name__
        alone = self._augmented(epoch, indices)
        for name, array in alone.items():
            if not torch.equal(array, among_others[name]):
                raise UserError(
                    f"{task}.augment() gives other values for {name!r} when the same samples come among more samples. "
                    "It must treat each sample on its own, with random numbers from its `random` argument.\n"
                    "Mixing samples of a micro-batch (mixup, statistics) belongs into forward(), which sees one "
                    "micro-batch at a time."
                )


def _check_first_loss(task: str, result: object, expected: float, j: int) -> None:
    """Raises UserError if the loss of a micro-batch of the first step cannot be a summed loss with its count."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise UserError(
            f"{task}.loss() must return two things, (summed loss, count); it returned a {type(result).__name__}."
        )
    loss, count = result
    value = float(loss.detach()) if isinstance(loss, Tensor) and loss.ndim == 0 else 0.0
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise UserError(
            f"{task}.loss() must return (summed loss, count), the loss a scalar tensor; it returned {got}.\n"
            'Sum over the micro-batch, for example F.cross_entropy(..., reduction="sum").'
        )
    if not loss.requires_grad:
        raise UserError(
            f"{task}.loss() returned a loss without a graph: nothing in it depends on the model's parameters."
        )
    if (isinstance(count, Tensor) and count.ndim != 0) or not isinstance(count, (int, float, Tensor)):
        got = f"a tensor of shape {tuple(count.shape)}" if isinstance(count, Tensor) else f"a {type(count).__name__}"
        raise UserError(f"{task}.loss() must return (summed loss, count), the count a number; it returned {got}.")
    if not math.isclose(float(count), expected, rel_tol=1e-5):
        raise UserError(
            f"{task}.loss() counted {float(count):g} for micro-batch {j}, but its samples' counts add up to "
            f"{expected:g}.\nThe count is the number of samples, unless the split says otherwise: "
            "Split(arrays, counts=...) (valid tokens, or weights, of each sample)."
        )
    if not math.isfinite(value):
        raise UserError(f"{task}.loss() is {value} for micro-batch {j} of the first step. It must be finite.")
