"""One optimizer step: the exact one, and the one that leaves the reduction to DeepSpeed's ZeRO."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from .batch_norm import RunningStatistics
from .batching import micro_batch_bounds, rank_block
from .build import Pieces
from .distributed import raise_together
from .errors import NonFiniteError, UserError
from .evaluate import check_outputs
from .gradient_noise import Noise, estimate
from .guard import digest
from .monitor import PhaseTimer
from .order import SampleRandom, by_length, epoch_order, key, seed_generators
from .splits import Batch
from .summation import TreeSum
from .watch import Watch


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


class ExactStep:
    """The step at ZeRO stage 0: the same bits at every world size."""

    def __init__(self, pieces: Pieces, timer: PhaseTimer, watch: Watch | None = None) -> None:
        self._engine, self._ranks, self._device, self._timer = pieces.engine, pieces.ranks, pieces.device, timer
        self._watch = watch
        self._micro_batches = MicroBatches(pieces, timer)
        self._statistics = RunningStatistics(pieces.engine.model)
        self._flags = _Flags(pieces.device)
        self.asked_to_stop = False
        # (M,) of the last step, where they are measured: the norms of the micro-batches' gradients.
        self.micro_batch_norms: Tensor | None = None
        self._adascale, self._measures_noise = pieces.adascale, pieces.measures_noise
        self._tree = TreeSum(
            self._engine.parameters,
            leaves=pieces.micro_batch_counts(),
            statistics_size=self._statistics.size,
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
            UserError: at the first step, on every rank, if the task's loss cannot be right.
            NonFiniteError: on every rank; the parameters are those before this step.
        """
        engine, statistics, tree = self._engine, self._statistics, self._tree
        if self._watch is not None:
            self._watch.at(batch.step, "compute")
            if self._watch.stop_reason is not None:
                tree.raise_flag()
        # d(sum / count) = d(sum) * 1 / count: given to autograd as the gradient of the loss, it costs nothing.
        self._scale.fill_(1.0 / batch.count)
        error: UserError | None = None
        statistics.begin()
        try:
            # A rank adds its own block of the M micro-batches along the tree ...
            for loss in self._micro_batches.losses(batch, tree.start(len(batch.bounds))):
                gradients = torch.autograd.grad(loss, engine.parameters, self._scale, allow_unused=True)
                if statistics.size:
                    statistics.collect(tree.statistics)
                tree.add(gradients, loss)
                self._timer.mark("compute")
        except UserError as own:
            error = own
        finally:
            statistics.settle()
        if batch.step == 0:
            raise_together(error)
        elif error is not None:
            raise error

        # ... the ranks exchange what is left of it ...
        if self._watch is not None:
            self._watch.at(batch.step, "exchange")
        records = tree.reduce()  # (M, 1 + statistics.size)
        self.asked_to_stop = self._flags.read(tree.flags)
        if self._watch is not None:
            self._watch.at(batch.step, "compute")
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
        self._micro_batches = MicroBatches(pieces, timer)
        self._statistics = RunningStatistics(pieces.engine.model)
        self.deferred = False
        self.asked_to_stop = False
        self.micro_batch_norms: Tensor | None = None  # the config refuses to measure them here

    def __call__(self, batch: GlobalBatch) -> tuple[Tensor, Tensor]:
        """Makes the step. Collective: every rank. Returns losses (M,) and the gradient norm () as ExactStep does."""
        statistics, W = self._statistics, self._ranks.world_size
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
            for i, loss in enumerate(self._micro_batches.losses(batch, block)):
                yield loss * (W / batch.count)  # DeepSpeed averages over ranks, and goes backward before it returns
                records[i, 0] = loss.detach()
                if statistics.size:
                    statistics.collect(records[i, 1:-1])
            for _ in range(most - len(block)):
                (loss,) = self._micro_batches.losses(batch, range(1))
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


def unordered_buffers(pieces: Pieces) -> dict[str, str]:
    """Name -> digest of every buffer that nobody updates in micro-batch order.

    A buffer that changes in a forward carries state from one micro-batch to the next, which makes the
    result depend on who computed what; compare before and after a step.
    """
    model = pieces.engine.model
    ordered = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
    return {n: digest(b) for n, b in model.named_buffers() if id(b) not in ordered}
