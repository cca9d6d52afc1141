"""The end of a run: keeps a model, makes the last evaluations, writes the summary."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

from ..errors import NonFiniteError, TrainerError
from ..exact.checks.hashes import state_sha256
from ..exact.step import ExactStep
from ..ranks.collectives import broadcast_object, raise_together
from ..record import earlier
from ..record.console import say
from ..record.folder import RAW
from .banner import result_table
from .card import save_card
from .course import Course
from .failures import of_the_folder
from .reload import problems
from .saving import save_model


def finish(c: Course) -> dict[str, Any]:
    """Ends a run: restores its best model, evaluates it, writes the last files. Collective: every rank.

    Returns:
        The summary, on every rank.
    """
    p, engine, best, done = c.pieces, c.pieces.engine, c.best, c.done
    summary: dict[str, Any] = {}
    with engine.whole_parameters():
        # The hashes are of the last step, even if an earlier model is kept: they are compared with those of other runs.
        summary["parameters_sha256"] = state_sha256({n: q.detach() for n, q in engine.model.named_parameters()})
        summary["model_sha256"] = state_sha256(engine.model_state())
    _settle_checkpoint(c)
    failure = _save(c)  # before the last evaluations: if a task's metrics fail, the trained model is saved already
    stopped_early = best is not None and best.enough
    metrics: dict[str, dict[str, float]] = {}
    if "validation" in p.splits and not stopped_early:
        metrics["validation"] = c.record.evaluate("validation", done)
    if best is not None:
        if not stopped_early:
            best.offer(engine, metrics["validation"], done)
        if best.step not in (0, done):
            best.restore(engine)
            metrics["validation"] = best.metrics
            failure = _save(c)
        summary["best"] = best.summary()
    if c.noise is not None:
        summary["gradient_noise"] = c.noise.summary()
    if p.rates.adascale is not None:
        summary["adascale"] = p.rates.adascale.summary()
    if "test" in p.splits:
        metrics["test"] = c.record.evaluate("test", done)  # only once, and on the model that is kept
    pace = c.record.pace
    summary |= {
        "status": "stopped early" if stopped_early else "finished",
        "exactness": p.exactness,
        "inexact": p.inexact,
        "world_size": p.plan.world_size,
        "global_batch_size": p.plan.global_batch_size,
        "micro_batch_size": p.plan.micro_batch_size,
        "steps": done,
        "metrics": metrics,
        "samples_per_s": pace.samples_per_s,
        "tokens_per_s": pace.tokens_per_s,
        "step_time_s": pace.step_time_s,
        "started_at_s": c.started_at_s,
        "time_to_first_step_s": c.time_to_first_step_s,
        "rehearsal_s": c.rehearsal_s,
    }
    if isinstance(c.step, ExactStep) and c.step.own_block.packs is not None:
        summary["pack"] = c.step.own_block.packs.summary()
    if isinstance(c.step, ExactStep) and c.step.own_block.graphs is not None:
        summary["cuda_graph"] = c.step.own_block.graphs.summary()
    summary |= _work(c) | _scaling(c, summary)
    c.record.conclude(_results(summary), done)
    _leave(c, summary)
    _check_saved(c, summary, failure)  # last: loading a model again needs memory, and all else is written now
    if c.folder is not None:
        say("", result_table(summary, c.folder.path, p.config.tensorboard.enabled))
        say(*_warning(c, summary["saved_model"]))
    raise_together(TrainerError(failure) if failure is not None else None)
    return summary


def _work(c: Course) -> dict[str, Any]:
    """The operations of the model per second, for the summary."""
    found: dict[str, Any] = {"model_tflops_per_s": c.record.pace.model_tflops_per_s, "mfu": c.record.mfu}
    return found | ({"model_flops_not_counted": c.flops} if isinstance(c.flops, str) else {})


def _scaling(c: Course, summary: dict[str, Any]) -> dict[str, Any]:
    """The efficiency against the last run of this config at another world size. Collective: every rank."""
    found: dict[str, Any] = {}
    W, speed, p = c.pieces.plan.world_size, summary["samples_per_s"], c.pieces
    if c.folder is not None and math.isfinite(speed):
        with contextlib.suppress(Exception):  # bad files beside this run must not cost its results
            other = earlier.at_another_size(p.manifest(), W, c.folder.path)
            if other is not None:
                share = earlier.efficiency(W, speed, *other)
                baseline = {"folder": other[1].folder.name, "world_size": other[0]}
                found = {f"{p.plan.scaling}_efficiency": share, "efficiency_baseline": baseline}
    return broadcast_object(found)


def _results(summary: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard's HParams tab shows of a run: numbers by name."""
    results = {f"{split}/{name}": value for split, of in summary["metrics"].items() for name, value in of.items()}
    speeds = ("samples_per_s", "tokens_per_s", "model_tflops_per_s", "mfu", "strong_efficiency", "weak_efficiency")
    return results | {name: summary[name] for name in speeds if summary.get(name) is not None}


def _check_saved(c: Course, summary: dict[str, Any], failure: str | None) -> None:
    """Compares what was saved with what was measured, for the summary. Collective: every rank."""
    found: list[str] = []
    with c.pieces.engine.whole_parameters():
        if c.folder is not None:
            found = [failure] if failure is not None else _problems(c, c.folder.path)
            if not found:
                (c.folder.path / RAW).unlink(missing_ok=True)
    summary["saved_model"] = broadcast_object(found or "as measured")
    if c.folder is not None:
        c.folder.write_json("summary.json", summary)


def _problems(c: Course, folder: Path) -> list[str]:
    try:
        return problems(c.pieces, folder)
    except Exception as error:  # of any kind, such as too little memory for a second model
        return [f"{folder / 'model'} could not be compared with the trained model: {type(error).__name__}: {error}"]


def _warning(c: Course, found: list[str] | str) -> list[str]:
    if isinstance(found, str) or c.folder is None:
        return []
    raw = c.folder.path / RAW
    lines = ["", *(f"WARNING: {problem}." for problem in found)]
    if raw.exists():
        lines.append(f"The trained weights are in {raw}, as the trainer had them: PyTorch's names, in safetensors.")
    return lines


def rescue(c: Course, failure: NonFiniteError) -> None:
    """Keeps the last good parameters of a run that stopped being finite. Collective: every rank."""
    c.record.window(c.done, last=True)
    problem = _save(c)
    if c.folder is not None:
        say(*_warning(c, [problem] if problem is not None else "as measured"))
        if problem is None:
            (c.folder.path / RAW).unlink(missing_ok=True)
        c.record.close()
        c.folder.write_json("summary.json", {"status": str(failure), "steps": failure.good_steps})


def _save(c: Course) -> str | None:
    """Saves the model. Collective at ZeRO stage 3: every rank. Returns what went wrong, on rank 0."""
    with c.pieces.engine.whole_parameters():
        return None if c.folder is None else save_model(c.pieces, c.folder)


def _settle_checkpoint(c: Course) -> None:
    """Waits for the checkpoint of the last step. The run has ended, so a failure only gives a note."""
    try:
        c.saver.wait()
    except TrainerError as error:
        say(f"note: the last checkpoint is missing, so this run cannot be made longer. {str(error).splitlines()[0]}")


def _leave(c: Course, summary: dict[str, Any]) -> None:
    """Writes a finished run's last files. Collective: if rank 0 cannot write them, every rank reports a failure."""
    error: TrainerError | None = None
    try:
        c.record.close()
        summary["wall_time_s"] = time.monotonic() - c.began_s
        if c.folder is not None:
            save_card(c.pieces, c.folder, summary)
            c.folder.write_json("summary.json", summary)
    except Exception as own:
        error = own if isinstance(own, TrainerError) else of_the_folder(own, c.folder)
        if error is None:
            raise
    raise_together(error)
