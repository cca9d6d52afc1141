"""One run from top to bottom: claim a folder, build, loop, evaluate, save.

`run` is called by every rank with the same config. The loop is `_train`; a step of it is
`step.ExactStep`, where the design's promise is kept.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .best import BestModel
from .build import Pieces, build, refuse_inexact
from .config import Config
from .console import DeepSpeedLog, Progress, say
from .distributed import Ranks, gather_objects
from .errors import NonFiniteError, UserError
from .evaluate import evaluate
from .guard import compare_ranks, state_sha256
from .monitor import Pace, Window, Writer, memory_gib
from .output import OutputFolder
from .report import banner, result_table
from .saving import save_card, save_model
from .splits import Batch
from .step import ExactStep, ZeroStep, global_batches, non_finite, unordered_buffers
from .tasks import Outputs

if TYPE_CHECKING:
    from .engine import Engine

# Called after every step with (steps made, engine, loss sums of all micro-batches): how `verify` and the
# benchmarks watch a run.
Trace = Callable[[int, "Engine", Tensor], None]


def run(
    config: Config, ranks: Ranks, *, config_name: str, started_at_s: float, trace: Trace | None = None
) -> dict[str, Any]:
    """Runs a config to its end. Collective: every rank.

    Args:
        config: checked already.
        ranks: this rank's place.
        config_name: names the output folder where the config names none.
        started_at_s: time.time() at which this process began.
        trace: called after every step.

    Returns:
        The summary, as in summary.json, on every rank (files are rank 0's alone).

    Raises:
        TrainerError: for the user; `agreed` if every rank raises it.
    """
    plan = config.plan(ranks.world_size)
    folder = OutputFolder.claim(config.trainer.output_dir, config_name) if ranks.first else None
    log = DeepSpeedLog(keep=ranks.first)
    log.install()
    try:
        pieces = build(config, ranks, plan, log)
        return _train(pieces, folder, log, started_at_s, trace)
    except BaseException:
        # A run that ends before its first step leaves nothing behind; later, the folder is not empty.
        if folder is not None:
            folder.release()
        raise
    finally:
        log.close()


def _train(
    pieces: Pieces, folder: OutputFolder | None, log: DeepSpeedLog, started_at_s: float, trace: Trace | None
) -> dict[str, Any]:
    p, engine, options, device = pieces, pieces.engine, pieces.config.trainer, pieces.device
    window = Window(options.log_every_steps, max(p.micro_batch_counts()), device)
    make_step = (ExactStep if engine.zero_stage == 0 else ZeroStep)(p, window.timer)
    record = _Recorder(p, window)
    buffers_before = unordered_buffers(p)
    validation_steps = options.evaluate_every_epochs * p.steps_per_epoch if "validation" in p.splits else 0
    best = _best_model(p)
    time_to_first_step_s = math.nan
    done = 0  # optimizer steps made
    if p.ranks.first:
        say(*banner(p))
    if best is not None and options.best.metric != "auto":
        best.check(record.evaluate("validation", 0, quiet=True))  # a misspelt metric, found before any training

    try:
        for batch in global_batches(p):
            window.begin_step()
            rate = engine.learning_rate
            losses, norm = make_step(batch)
            window.end_step(losses, norm, batch.count, len(batch.indices), rate, batch.tokens)
            done = batch.step + 1
            record.pace.step(done, len(batch.indices), batch.tokens)

            if done == 1:
                # Rank 0's files appear only now that the task has shown that it works.
                _check_buffers(p, buffers_before)
                time_to_first_step_s = time.time() - started_at_s
                if folder is not None:
                    record.open(folder, log)
            if trace is not None:
                trace(done, engine, losses)
            if options.guard_every_steps and done % options.guard_every_steps == 0 and engine.zero_stage == 0:
                compare_ranks(p.common_state(), done)
            if window.full:
                if make_step.deferred:
                    _check_window(window, done)
                record.window(done)
            if validation_steps and done % validation_steps == 0 and done < p.total_steps:
                validation = record.evaluate("validation", done)
                if best is not None and not best.offer(engine, validation, done) and best.enough:
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
                _conclude(p, folder, record, {"status": str(failure), "steps": failure.good_steps})
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
    metrics: dict[str, dict[str, float]] = {}
    if "validation" in p.splits:
        metrics["validation"] = validation if best is not None and best.enough else record.evaluate("validation", done)
    if best is not None:
        best.offer(engine, metrics["validation"], done)
        if best.step not in (0, done):
            best.restore(engine)
            metrics["validation"] = best.metrics
            with engine.whole_parameters():
                if folder is not None:
                    save_model(p, folder)
        summary["best"] = best.summary()
    if "test" in p.splits:
        metrics["test"] = record.evaluate("test", done)  # once, on the model that is kept
    record.close()
    summary |= {
        "status": "finished" if best is None or not best.enough else "stopped early",
        "exactness": p.exactness,
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
    }
    summary["wall_time_s"] = time.time() - started_at_s
    if folder is not None:
        save_card(p, folder, summary)
        _conclude(p, folder, record, summary)
        say("", result_table(summary, folder.path, p.config.tensorboard.enabled))
    return summary


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


class _Recorder:
    """Sends what is measured to its readers: files and console on rank 0, nowhere on the others."""

    def __init__(self, pieces: Pieces, window: Window) -> None:
        self._pieces, self._window = pieces, window
        self._writer: Writer | None = None
        self._pending: Callable[[], dict[str, float]] | None = None
        self._eval_s = 0.0
        self.progress = Progress(pieces.total_steps, pieces.ranks.first)
        self.pace = Pace(pieces.total_steps)

    def open(self, folder: OutputFolder, log: DeepSpeedLog) -> None:
        p = self._pieces
        manifest = p.manifest() | {"command": shlex.join(sys.argv)}
        folder.write_json("manifest.json", manifest)
        log.open(folder.path / "logs" / "deepspeed.log")
        self._writer = Writer(folder.path, p.config.tensorboard.enabled)
        self._writer.describe(
            {"config": f"```json\n{json.dumps(p.config.as_dict(), indent=2)}\n```", "exactness": p.exactness},
            {"run/world_size": p.plan.world_size, "run/global_batch_size": p.plan.global_batch_size},
        )

    def window(self, step: int, last: bool = False) -> None:
        """Ends the logging window. On a GPU it is read when the next one ends, so that nothing waits for it."""
        closed = self._window.close(step, -(-step // self._pieces.steps_per_epoch))
        lagging = self._pieces.device.type == "cuda" and not last
        for read in (self._pending, None if lagging else closed):
            if read is None:
                continue
            record = read() | {"throughput/eval_ms": self._eval_s * 1e3} | memory_gib(self._pieces.device)
            self.progress.logged(record)
            if self._writer is not None:
                self._writer.write(record)
        self._pending = closed if lagging else None
        if last:
            self.pace.stop()

    def evaluate(self, name: str, step: int, quiet: bool = False) -> dict[str, float]:
        """Measures a split and writes it down, unless `quiet`. Collective: every rank."""
        p = self._pieces
        pictures = getattr(p.task, "pictures", None)

        def look(outputs: Outputs, arrays: Batch) -> None:
            if pictures is not None and self._writer is not None:
                self._writer.draw({f"{name}/{n}": picture for n, picture in pictures(outputs, arrays).items()}, step)

        with self._window.pause():
            began_s = time.perf_counter()
            metrics = evaluate(
                p.task,
                p.engine,
                p.splits[name],
                p.host_splits[name],
                p.ranks,
                p.config.trainer.evaluate_micro_batch_size,
                p.config.trainer.seed,
                look,
            )
            if quiet:
                return metrics
            self._eval_s = time.perf_counter() - began_s
            record: dict[str, float] = {"step": step, "epoch": -(-step // p.steps_per_epoch)}
            record |= {f"eval/{name}/{metric}": value for metric, value in metrics.items()}
            if self._writer is not None:
                self._writer.write(record)
            self.progress.evaluated(step, name, metrics)
            self.pace.pause(time.perf_counter() - began_s)
        return metrics

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _check_buffers(p: Pieces, before: dict[str, str]) -> None:
    """Labels or refuses a model whose forward changes a buffer of its own. Collective: every rank."""
    now = unordered_buffers(p)
    changed = sorted(set().union(*gather_objects([name for name in now if before.get(name) != now[name]])))
    if not changed:
        return
    reasons = [f"the model's buffer {changed[0]} changes in its forward, so micro-batches depend on one another"]
    refuse_inexact(p.config, reasons)
    p.inexact += reasons
    p.own_buffers.update(changed)
    if p.ranks.first:
        say(f"exactness: tolerance, because {reasons[0]}; each rank keeps its own, and rank 0's is saved")


def _check_window(window: Window, done: int) -> None:
    """Raises NonFiniteError for the first bad step of the window. Waits for the device."""
    bad = window.first_non_finite()
    if bad is not None:
        offset, losses, norm = bad
        raise non_finite(done - window.filled + offset, losses, norm)


def _conclude(p: Pieces, folder: OutputFolder, record: _Recorder, summary: dict[str, Any]) -> None:
    record.close()
    # Again, in case the first step changed the label.
    folder.write_json("manifest.json", p.manifest() | {"command": shlex.join(sys.argv)})
    folder.write_json("summary.json", summary)
