"""One run from top to bottom: claim a folder, build, loop, evaluate, save.

`run` is called by every rank with the same config. The loop is `_train`; a step of it is
`step.ExactStep`, where the design's promise is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import audit
from .batching import BatchPlan
from .best import BestModel
from .build import Pieces, build, refuse_inexact
from .checkpoint import Snapshot
from .config import Config
from .console import DeepSpeedLog, say
from .distributed import Ranks, broadcast_object, gather_objects, raise_together
from .errors import NonFiniteError, Stopped, TrainerError, UserError
from .gradient_noise import NoiseScale
from .guard import compare_ranks, state_sha256
from .micro_batches import global_batches
from .monitor import Window
from .output import OutputFolder
from .recorder import Recorder
from .rehearsal import rehearse
from .report import banner, result_table
from .resume import Resume, Saver, claim, finished_summary, restore
from .saving import save_card, save_model
from .step import ExactStep, ZeroStep, non_finite
from .watch import Watch

if TYPE_CHECKING:
    from .engine import Engine

# Called after every step with (steps made, engine, loss sums of all micro-batches): how `verify` and the
# benchmarks watch a run.
Trace = Callable[[int, "Engine", Tensor], None]

NO_RESUME = Resume()


def run(
    config: Config,
    ranks: Ranks,
    *,
    config_name: str,
    started_at_s: float,
    trace: Trace | None = None,
    resume: Resume = NO_RESUME,
) -> dict[str, Any]:
    """Runs a config to its end. Collective: every rank.

    Args:
        config: checked already.
        ranks: this rank's place.
        config_name: names the output folder where the config names none.
        started_at_s: time.time() at which this process began.
        trace: called after every step.
        resume: whether to go on from a checkpoint.

    Returns:
        The summary, as in summary.json, on every rank (files are rank 0's alone).

    Raises:
        TrainerError: for the user; `agreed` if every rank raises it. `Stopped` if the run was asked to stop.
    """
    plan = config.plan(ranks.world_size)
    folder, source = claim(resume, config, config_name) if ranks.first else (None, None)
    log = DeepSpeedLog(keep=ranks.first)
    log.install()
    watch: Watch | None = None

    def met() -> None:
        nonlocal watch
        deadline_s = None if config.trainer.max_wall_time_s is None else started_at_s + config.trainer.max_wall_time_s
        watch = Watch(ranks, config.trainer.hang_timeout_s, deadline_s)

    try:
        pieces = build(config, ranks, plan, log, met)
        assert watch is not None
        done = broadcast_object((finished_summary(folder.path) if folder is not None and resume.wanted else None,))[0]
        if done is not None:
            if folder is not None:
                say(f"The run in {folder.path} has come to its end already: nothing to do.")
            return done
        snapshot = restore(pieces, source, resume)
        watch.begin()
        return _train(pieces, folder, log, started_at_s, trace, watch, snapshot)
    except TrainerError as error:
        if watch is not None and not error.agreed and error.speaks is None:
            watch.tell_failure(error)
        _release(folder)
        raise
    except BaseException as error:
        # A run that ends before its first step leaves nothing behind; later, the folder is not empty.
        _release(folder)
        known = _explained(error, plan, folder)
        if known is None and watch is not None and _of_a_collective(error):
            known = watch.explain(error)
        if watch is not None and (known is None or known.speaks is None):
            watch.tell_failure(known or error)
        if known is not None:
            raise known from error
        raise
    finally:
        if watch is not None:
            watch.close()
        log.close()


def _train(
    pieces: Pieces,
    folder: OutputFolder | None,
    log: DeepSpeedLog,
    started_at_s: float,
    trace: Trace | None,
    watch: Watch,
    snapshot: Snapshot | None,
) -> dict[str, Any]:
    p, engine, options, device = pieces, pieces.engine, pieces.config.trainer, pieces.device
    noise = NoiseScale() if options.gradient_noise else None
    window = Window(options.log_every_steps, max(p.micro_batch_counts()), device, noise=noise)
    make_step = (ExactStep if engine.zero_stage == 0 else ZeroStep)(p, window.timer, watch)
    best = _best_model(p)
    done = first_step = 0  # optimizer steps made, and made before this process began
    history: list[dict[str, Any]] = []
    if snapshot is not None:
        done = first_step = snapshot.step
        history = snapshot.facts["history"]
        window.load(snapshot.facts["window"])
        if p.adascale is not None and snapshot.facts["adascale"] is not None:
            p.adascale.load(snapshot.facts["adascale"])
        if best is not None and snapshot.facts["best"] is not None:
            best.load(snapshot.tensors.get("best", {}), snapshot.facts["best"], engine)
    history.append({"started_at_s": started_at_s, "from_step": first_step, "world_size": p.plan.world_size})
    record = Recorder(p, window, first_step, history)
    saver = Saver(p, window, best, history, folder)
    rehearsal_s, notes = _rehearse(p, make_step, first_step) if first_step < p.total_steps else (0.0, [])
    validation_steps = options.evaluate_every_epochs * p.steps_per_epoch if "validation" in p.splits else 0
    checkpoint_steps = options.checkpoint.every_steps
    time_to_first_step_s = math.nan
    if p.ranks.first:
        say(*banner(p, make_step.audit), *(f"note: {note}" for note in notes))
        if first_step:
            before = history[-2]["world_size"]
            say(f"going on after step {first_step:,} from a checkpoint of {before} rank{'s' * (before > 1)}")
    if best is not None and options.best.metric != "auto":
        best.check(record.evaluate("validation", 0, quiet=True))  # a misspelt metric, found before any training

    if folder is not None:
        record.open(folder, log)  # only now: the rehearsal has shown that the task works
    try:
        for batch in global_batches(p, first_step):
            if best is not None and best.enough:
                break
            window.begin_step()
            rate = engine.learning_rate
            losses, norm = make_step(batch)
            of_noise = (make_step.micro_batch_norms, batch.counts)
            window.end_step(losses, norm, batch.count, len(batch.indices), rate, batch.tokens, *of_noise)
            done = batch.step + 1
            ends = done == p.total_steps or (p.adascale is not None and p.adascale.finished)
            record.pace.step(done - first_step, len(batch.indices), batch.tokens)

            if p.changing:
                p.follow_first()
            if done == first_step + 1:
                time_to_first_step_s = time.time() - started_at_s
            if trace is not None:
                trace(done, engine, losses)
            if options.guard_every_steps and done % options.guard_every_steps == 0 and engine.zero_stage == 0:
                compare_ranks(p.common_state(), done)
            if window.full:
                if make_step.deferred:
                    _check_window(window, done)
                record.window(done)
            if validation_steps and done % validation_steps == 0 and not ends:
                validation = record.evaluate("validation", done)
                if best is not None:
                    best.offer(engine, validation, done)
            stops = make_step.asked_to_stop and not ends
            if stops or (checkpoint_steps and done % checkpoint_steps == 0 and not ends):
                if make_step.deferred:
                    _check_window(window, done)
                record.flush()
                record.checkpointed(saver.save(done))
            if stops:
                _stop(p, saver, folder, done, watch)
            if ends:
                break
        if make_step.deferred:
            _check_window(window, done)
        record.window(done, last=True)
        if engine.zero_stage == 0:
            compare_ranks(p.common_state(), done)
    except NonFiniteError as failure:
        record.window(done, last=True)
        with engine.whole_parameters():
            if folder is not None:
                save_model(p, folder)
                _conclude(folder, record, {"status": str(failure), "steps": failure.good_steps})
        raise
    finally:
        record.progress.close()

    summary: dict[str, Any] = {}
    with engine.whole_parameters():
        # Of the last step, whichever model is kept.
        summary["parameters_sha256"] = state_sha256({n: q.detach() for n, q in engine.model.named_parameters()})
        summary["model_sha256"] = state_sha256(engine.model_state())
        if folder is not None:
            # Before the last evaluations: whatever fails in a task's metrics, the trained model is there.
            save_model(p, folder)
    stopped_early = best is not None and best.enough
    metrics: dict[str, dict[str, float]] = {}
    if "validation" in p.splits and not stopped_early:
        metrics["validation"] = record.evaluate("validation", done)
    if best is not None:
        if not stopped_early:
            best.offer(engine, metrics["validation"], done)
        if best.step not in (0, done):
            best.restore(engine)
            metrics["validation"] = best.metrics
            with engine.whole_parameters():
                if folder is not None:
                    save_model(p, folder)
        summary["best"] = best.summary()
    if noise is not None:
        summary["gradient_noise"] = noise.summary()
    if p.adascale is not None:
        summary["adascale"] = p.adascale.summary()
    if "test" in p.splits:
        metrics["test"] = record.evaluate("test", done)  # once, on the model that is kept
    summary |= {
        "status": "stopped early" if stopped_early else "finished",
        "exactness": p.exactness,
        "inexact": p.inexact,
        "world_size": p.plan.world_size,
        "global_batch_size": p.plan.global_batch_size,
        "micro_batch_size": p.plan.micro_batch_size,
        "steps": done,
        "metrics": metrics,
        "samples_per_s": record.pace.samples_per_s,
        "tokens_per_s": record.pace.tokens_per_s,
        "step_time_s": record.pace.step_time_s,
        "started_at_s": started_at_s,
        "time_to_first_step_s": time_to_first_step_s,
        "rehearsal_s": rehearsal_s,
    }
    _leave(p, record, saver, folder, summary)
    if folder is not None:
        say("", result_table(summary, folder.path, p.config.tensorboard.enabled))
    return summary


def _leave(p: Pieces, record: Recorder, saver: Saver, folder: OutputFolder | None, summary: dict[str, Any]) -> None:
    """Writes a finished run's last files. Collective: no rank has finished where rank 0 cannot write them."""
    error: TrainerError | None = None
    try:
        record.close()
        saver.wait()
        summary["wall_time_s"] = time.time() - summary["started_at_s"]
        if folder is not None:
            save_card(p, folder, summary)
            _conclude(folder, record, summary)
    except Exception as own:
        error = own if isinstance(own, TrainerError) else _of_the_folder(own, folder)
        if error is None:
            raise
    raise_together(error)


def _stop(p: Pieces, saver: Saver, folder: OutputFolder | None, done: int, watch: Watch) -> None:
    """Leaves with a checkpoint, all ranks together. Collective: every rank."""
    error: TrainerError | None = None
    try:
        saver.wait()
    except TrainerError as own:
        error = own
    raise_together(error)
    reasons = [reason for reason in gather_objects(watch.stop_reason) if reason is not None]
    where = broadcast_object(str(folder.path) if folder is not None else None)
    raise Stopped(
        f"stopped after step {done:,} of {p.total_steps:,}: {reasons[0] if reasons else 'asked to'}. Nothing is lost: "
        f"to go on, on any number of ranks, start the same command with --resume auto --output_dir {where}",
        agreed=True,
    )


def _release(folder: OutputFolder | None) -> None:
    if folder is not None:
        folder.release()


def _of_a_collective(error: BaseException) -> bool:
    """Whether an exception is what gloo or NCCL raise when another rank is gone."""
    words = ("gloo", "nccl", "connection", "broken pipe", "socket", "timed out", "timeout", "store")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _explained(error: BaseException, plan: BatchPlan, folder: OutputFolder | None) -> TrainerError | None:
    """The message for an error of the machine: no memory, no disk; None for any other."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or isinstance(error, MemoryError):
        m = plan.micro_batch_size
        advice = f"The next smaller micro-batch that halves it is {m // 2}" if m > 1 else "It is 1 sample already"
        return TrainerError(
            f"A micro-batch of {m} samples does not fit into the memory of this device: {text.splitlines()[0][:200]}\n"
            f"{advice} (train_micro_batch_size_per_gpu, or trainer.gradient_checkpointing=true, which keeps the bits). "
            "Another micro-batch is another model: its size changes the bits."
        )
    return _of_the_folder(error, folder)


def _of_the_folder(error: BaseException, folder: OutputFolder | None) -> TrainerError | None:
    """The message for an error in writing to the output folder; None for any other."""
    from safetensors import SafetensorError

    if folder is None:
        return None
    if isinstance(error, SafetensorError) and "while serializing" in str(error):  # as for a full disk
        what, where = str(error), None
    elif isinstance(error, OSError) and error.errno is not None:
        what, where = error.strerror or str(error), error.filename
    else:
        return None
    return TrainerError(
        f"The output folder {folder.path} cannot be written: {what}{f' ({where})' if where else ''}.\n"
        "Make room, or the folder writable again, and start the run again with --resume auto and the same "
        "--output_dir: it goes on from its last checkpoint."
    )


def _best_model(p: Pieces) -> BestModel | None:
    options = p.config.trainer
    if "validation" not in p.splits:
        if options.best.patience_evaluations or options.best.metric not in ("auto", None):
            raise UserError(
                f'"trainer.best" asks for the best model on validation, but the task {options.task} has no validation '
                "split.",
                agreed=True,
            )
        return None
    if options.best.metric is None or not options.evaluate_every_epochs:
        return None
    return BestModel(p.config, getattr(p.task, "best_metric", None))


def _rehearse(p: Pieces, make_step: ExactStep | ZeroStep, first_step: int) -> tuple[float, list[str]]:
    """Rehearses, labels or refuses the run, and begins its audits. Collective: every rank.

    Returns:
        The seconds that it took, and notes for the person who started the run.
    """
    began_s = time.perf_counter()
    found = rehearse(p, make_step.micro_batches, make_step.statistics, first_step)
    reasons = [finding.what for finding in found.findings if finding.what not in p.inexact]
    remedies = list(dict.fromkeys(finding.remedy for finding in found.findings))
    refuse_inexact(p.config, reasons, remedies)
    p.inexact += reasons
    p.changing = found.changing
    every_steps = audit.interval(
        p.config.trainer.audit_every_steps,
        p.config.trainer.guard_every_steps,
        p.plan.micro_batches,
        p.plan.world_size,
    )
    if p.engine.zero_stage == 0 and not found.findings and every_steps:
        make_step.audit = audit.Audit(
            p.ranks,
            p.hosts,
            list(p.engine.names.values()),
            every_steps=every_steps,
            total_steps=p.total_steps,
            seed=p.config.trainer.seed,
            alike=p.alike,
        )
    notes = found.notes + remedies
    if first_step and found.kept and not found.findings:
        notes.append(
            f"{found.kept[0]} changes with micro-batches, and checkpoints do not hold it. If numbers depend on it, the "
            "run that goes on here is not the one that was interrupted."
        )
    return time.perf_counter() - began_s, notes


def _check_window(window: Window, done: int) -> None:
    """Raises NonFiniteError for the first bad step of the window. Waits for the device."""
    bad = window.first_non_finite()
    if bad is not None:
        offset, losses, norm = bad
        raise non_finite(done - window.filled + offset, losses, norm)


def _conclude(folder: OutputFolder, record: Recorder, summary: dict[str, Any]) -> None:
    record.close()
    folder.write_json("summary.json", summary)
