"""The training loop: batch, step, validation, checkpoint and end, in this order."""

from __future__ import annotations

import shlex
import time

import torch

from ..errors import Stopped, TrainerError
from ..exact.gradient_noise import Noise, estimate
from ..exact.micro_batches import GlobalBatch
from ..exact.step import StepResult
from ..ranks.collectives import broadcast_object, gather_objects, raise_together
from ..record.window import StepNumbers
from ..rehearsal.flops import ModelFlops
from .course import Course


def train(c: Course) -> None:
    """Makes the steps of a run. Collective: every rank.

    Raises:
        NonFiniteError: on every rank: a loss or a gradient is not finite.
        RanksDifferError: on every rank: the guard or the audit found a difference.
        Stopped: on every rank: a signal or the wall-time budget has ended the run, after a checkpoint.
    """
    p, options = c.pieces, c.pieces.config.trainer
    adascale = p.rates.adascale
    validation_steps = options.evaluate_every_epochs * p.steps_per_epoch if "validation" in p.splits else 0
    checkpoint_steps = options.checkpoint.every_steps

    def validate() -> None:
        validation = c.record.evaluate("validation", c.done)
        if c.best is not None:
            c.best.offer(p.engine, validation, c.done)

    if c.owes_validation and c.done < p.total_steps and validation_steps and c.done % validation_steps == 0:
        validate()
    for batch in p.batches.starting_at(c.first_step):
        if (c.best is not None and c.best.enough) or (adascale is not None and adascale.finished):  # early stopping
            break
        c.watch.step = batch.step
        c.window.begin_step()
        # A signal may reach one rank only. Its request travels with the step, so all ranks stop after the same one.
        result = c.step(batch, p.rates.factor(batch.step), c.watch.stop_reason is not None)
        c.done = batch.step + 1
        if adascale is not None:
            adascale.observe(_noise(batch, result))  # sets the gain of the next step
        ends = c.done == p.total_steps or (adascale is not None and adascale.finished)

        samples = len(batch.indices)
        numbers = StepNumbers(len(batch.bounds), batch.count, samples, result.learning_rate, batch.tokens)
        flops = c.flops.of(batch) if isinstance(c.flops, ModelFlops) else 0.0
        c.window.end_step(numbers, result.losses, result.norm, result.norms, batch.counts, flops)
        c.record.pace.step(c.done - c.first_step, samples, batch.tokens, flops)
        if p.changing:  # each rank's forward has changed these in its own way: rank 0's replace them
            p.follow_first()
        if c.done == c.first_step + 1:
            c.time_to_first_step_s = time.monotonic() - c.began_s
        if c.trace is not None:
            c.trace(c.done, p.engine, result.losses)

        # First compare, then write: a checkpoint or a log line of a step comes after its checks.
        if options.guard_every_steps and c.done % options.guard_every_steps == 0:
            c.compare_ranks()
        if c.window.full:
            c.check_window()
            c.record.window(c.done)
            c.tell()
        if validation_steps and c.done % validation_steps == 0 and not ends:
            validate()
        stops = result.stop and not ends  # after the last step there is nothing left to stop
        if stops or (checkpoint_steps and (ends or c.done % checkpoint_steps == 0)):
            c.checkpoint(ended=ends)
        if stops:
            _stop(c)
        if ends:
            break
    c.check_window()
    c.record.window(c.done, last=True)
    c.tell()
    c.compare_ranks()


def _noise(batch: GlobalBatch, result: StepResult) -> Noise | None:
    assert batch.counts is not None and result.norms is not None
    *norms, whole = torch.cat([result.norms, result.norm.reshape(1)]).tolist()  # device to host
    return estimate(norms, batch.counts, whole, len(batch.indices))


def _stop(c: Course) -> None:
    """Raises Stopped on all ranks, once the checkpoint is written. Collective: every rank."""
    error: TrainerError | None = None
    try:
        c.saver.wait()
    except TrainerError as own:
        error = own
    raise_together(error)
    reasons = [reason for reason in gather_objects(c.watch.stop_reason) if reason is not None]
    where = broadcast_object(shlex.quote(str(c.folder.path)) if c.folder is not None else None)
    reason = reasons[0] if reasons else "asked to"
    stopped = Stopped(
        f"stopped after step {c.done:,} of {c.pieces.total_steps:,}: {reason}. Nothing "
        f"is lost. To continue on any number of ranks, start the same command with --resume auto --output_dir {where}",
        agreed=True,
    )
    stopped.reason = reason
    raise stopped
