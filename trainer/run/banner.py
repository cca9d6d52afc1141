"""What a run prints about itself on the console: the start-up lines, and the table at its end."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from ..colours import painted
from ..data.report import array_lines
from ..engine.adapt import frozen_share
from ..exact.checks.audit import Audit
from ..record import earlier
from ..record.console import table
from .build import Pieces


def banner(p: Pieces, audit: Audit | None, learning_rate: float, first_step: int = 0) -> list[str]:
    """The start-up lines: the batch arithmetic as an equation, the length of the run, its data, and what is exact.

    Args:
        p: of the run.
        audit: of its steps; None if there is none.
        learning_rate: of the next step.
        first_step: steps made before this process began.
    """
    trainer, plan = p.config.trainer, p.plan
    sizes = " / ".join(f"{len(split):,} {name}" for name, split in p.host_splits.items())
    epochs = p.total_steps / p.steps_per_epoch
    precision = "bfloat16 autocast" if p.config.torch_autocast.enabled else "float32"
    if trainer.tf32 and p.device.type == "cuda":
        precision += ", products in TF32"
    clipping = p.config.gradient_clipping
    # With AdaScale the gains decide when the run ends. This is the largest number of steps that it can take.
    most = "at most " if trainer.learning_rate.adascale_steps is not None else ""
    begins = f"step {first_step + 1:,}" if first_step else "the first step"
    lines = [
        f"{plan.scaling} scaling: {plan.equation()}",
        f"task {trainer.task}: {sizes} samples; {p.steps_per_epoch:,} steps an epoch x {epochs:g} "
        f"epoch{'s' * (epochs != 1)} = {most}{p.total_steps:,} steps",
        f"{p.config.optimizer.type}, learning rate {learning_rate:.4g} at {begins}, "
        + (f"gradients clipped at norm {clipping:g}" if clipping else "no clipping")
        + f"; {precision} on {p.facts['device_model']}",
    ]
    # A user's own task need not describe the data that it has read. Then its arrays are described.
    read = getattr(p.task, "data_lines", None) or array_lines({n: s.arrays for n, s in p.host_splits.items()})
    lines[2:2] = [f"data: {line}" for line in read]
    warmup_steps = round(trainer.learning_rate.warmup_epochs * p.steps_per_epoch)
    if warmup_steps >= p.total_steps:
        lines.append(f"note: warm-up ({warmup_steps:,} steps) is as long as the run, so it never reaches the full rate")
    trained, total = frozen_share(p.engine.model)
    if trained < total:
        lines.append(f"{trained:,} of {total:,} parameters are trained, the others are frozen")
    if (trainer.lora is not None or trainer.freeze) and getattr(p.task, "random_weights", False):
        key = "lora" if trainer.lora is not None else "freeze"
        lines.append(
            f"note: trainer.{key} keeps weights as they are, and those of this model are random: it is built from a "
            "configuration. Name a pretrained model"
            + (". adapter/ is of no use without these weights: model/ holds them" if key == "lora" else "")
        )
    lines += [f"note: {note}" for note in getattr(p.task, "notes", ())]
    every = "not audited" if audit is None else f"audited every {audit.every_steps:,} steps and in the last"
    checked = f"rehearsed, {every}"
    if p.inexact:
        lines.append(f"exactness: tolerance, because {'; '.join(p.inexact)}")
    elif plan.scaling == "strong":
        lines.append(
            f"exactness: bitwise ({checked}). Any 1 to {plan.micro_batches} ranks give this very model, on this device "
            "model and these versions"
        )
    else:
        lines.append(
            f"exactness: bitwise ({checked}). One rank with train_batch_size={plan.global_batch_size} and this "
            "learning rate gives this very model, on this device model and these versions"
        )
    return lines


def _pack_row(found: dict[str, Any]) -> list[tuple[str, str]]:
    if found.get("size", 1) == 1:
        return []
    gain = f", {found['speed_up']:.1f} times as fast as single ones" if "speed_up" in found else ""
    return [("packs", f"of {found['size']} micro-batches{gain}")]


def _scaling_row(summary: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """How fast the run was, compared with the run that made the same model on the fewest ranks."""
    others = earlier.of_this_model(summary, folder)
    if not others or not math.isfinite(summary["samples_per_s"]):
        return []
    fewest = min(others)
    return [("speed-up", earlier.compared(summary["world_size"], summary["samples_per_s"], fewest, others[fewest]))]


def _efficiency_row(summary: dict[str, Any]) -> list[tuple[str, str]]:
    baseline = summary.get("efficiency_baseline")
    if baseline is None:
        return []
    kind = "strong" if "strong_efficiency" in summary else "weak"
    W = baseline["world_size"]
    against = f"against {W} rank{'s' * (W > 1)} ({baseline['folder']})"
    return [(f"{kind} efficiency", f"{summary[f'{kind}_efficiency']:.2f} {against}")]


def _work_row(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The operations of the model per second; or, in one line, why they are not known."""
    if "model_flops_not_counted" in summary:
        return [("model TFLOP/s", f"not counted: {summary['model_flops_not_counted']}")]
    done, mfu = summary.get("model_tflops_per_s"), summary.get("mfu")
    if done is None:
        return []
    return [("model TFLOP/s", f"{done:.3g}" + (f", {mfu:.1%} of the devices' peak (MFU)" if mfu is not None else ""))]


def result_table(summary: dict[str, Any], folder: Path, tensorboard: bool) -> str:
    """The table at the end of a run: metrics on test (or on another split), speed, and where the files are."""
    metrics = summary["metrics"]
    measured = "test" if "test" in metrics else next(iter(metrics), None)
    rows = [(f"{measured} {name}", f"{value:.4f}") for name, value in metrics.get(measured, {}).items()]
    rows += [
        ("steps", f"{summary['steps']:,}" + (" (stopped early)" if summary["status"] == "stopped early" else "")),
    ]
    if summary.get("best"):
        best = summary["best"]
        rows.append(("kept model", f"of step {best['step']:,}, {best['metric']} {best['value']:.4f} on validation"))
    if summary["tokens_per_s"]:
        rows.append(("tokens/s", f"{summary['tokens_per_s']:,.0f}"))
    rows += [
        ("samples/s", f"{summary['samples_per_s']:,.0f}"),
        ("step time", f"{summary['step_time_s'] * 1e3:.2f} ms"),
        ("wall time", f"{summary['wall_time_s']:.1f} s ({summary['time_to_first_step_s']:.1f} s to the first step)"),
        *_pack_row(summary.get("pack", {})),
        *_work_row(summary),
        *_scaling_row(summary, folder),
        *_efficiency_row(summary),
        ("parameters", f"sha256 {summary['parameters_sha256'][:16]}... ({summary['exactness']})"),
        ("results", str(folder)),
    ]
    if tensorboard:
        rows.append(("TensorBoard", f"tensorboard --logdir {folder / 'tensorboard'}"))
    lines = table(rows).splitlines()
    measures = len(metrics.get(measured, {}))
    return "\n".join([*(painted(line, "bold", sys.stdout) for line in lines[:measures]), *lines[measures:]])
