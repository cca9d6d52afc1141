"""Whether a run may continue another one: its config, data, code and machine, compared one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..config.keys import Config, parse
from ..config.schema import flat
from ..errors import UserError
from ..exact.progress import takes_progress
from .build import Pieces, refuse_inexact
from .claim import Finished, Resume

# Keys that may change before a run continues from a checkpoint: they change no bit of the model.
_HARMLESS = (
    "trainer.output_dir", "trainer.log_every_steps", "trainer.guard_every_steps", "trainer.audit_every_steps",
    "trainer.pack", "trainer.exchange_bucket_mib", "trainer.cuda_graph",
    "trainer.checkpoint",
    "trainer.hang_timeout_s", "trainer.max_wall_time_s", "trainer.ranks_per_gpu", "trainer.exactness",
    "trainer.gradient_noise",
    "tensorboard", "wandb", "comet", "csv_monitor", "mlflow",
    "steps_per_print", "memory_breakdown", "dump_state", "disable_python_gc",
    # Their effects are compared instead: the batch plan, the number of steps, the hash of the data.
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "trainer.epochs", "trainer.max_steps", "trainer.task_options.data",
)  # fmt: skip
# Facts of a machine on which a run's bits may depend. If one differs, the run is labelled tolerance.
_LABELLED: tuple[str, ...] = (
    "trainer",
    "code_sha256",
    "python",
    "torch",
    "deepspeed",
    "transformers",
    "pytorch_optimizer",
    "device_type",
    "device_model",
)
_LABELLED += ("cpu_capability", "math_settings", "cuda", "cudnn", "tf32", "task_code_sha256")


def _as_json(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(config.as_dict()))
    return values


def _changes(p: Pieces, facts: Mapping[str, Any]) -> list[str]:
    """What differs from a run with these facts and changes the bits, as clauses."""
    before, now = flat(facts["config"]), flat(_as_json(p.config))
    # An earlier version of the trainer may lack a key. Then the run had the default of today.
    defaults = flat(_as_json(parse({"train_batch_size": 1})))
    before |= {key: defaults[key] for key in now.keys() - before.keys() if key in defaults}
    changes = [
        f"{key}: {before.get(key)!r} before, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == h or key.startswith(h + ".") for h in _HARMLESS)
    ]
    plan = asdict(p.plan)
    for key in ("global_batch_size", "micro_batch_size"):
        if facts["plan"][key] != plan[key]:
            changes.append(f"{key.replace('_', ' ')}: {facts['plan'][key]} before, {plan[key]} now")
    rate = p.config.trainer.learning_rate
    scheduled = p.config.scheduler is not None or (rate.schedule != "constant" and rate.adascale_steps is None)
    dependent = "the learning rate" if scheduled else "the task" if takes_progress(p.task) else None
    if dependent is not None and facts["total_steps"] != p.total_steps:
        changes.append(f"steps, on which {dependent} depends: {facts['total_steps']} before, {p.total_steps} now")
    for split, digest in p.data_sha256().items():
        if facts["data_sha256"].get(split) != digest:
            changes.append(f"the data of {split}")
    return changes


def check_same_run(p: Pieces, step: int, facts: Mapping[str, Any], resume: Resume) -> None:
    """Compares with a checkpoint's run, key by key. Every rank comes to the same result.

    It labels the run tolerance for changes that may change the bits.

    Args:
        p: of the run that continues.
        step: steps made so far.
        facts: of the checkpoint.
        resume: whether changes are allowed.

    Raises:
        UserError: on every rank: a change changes the bits, or the run has fewer steps than were made.
    """
    _check_length(p, step)
    changes = _changes(p, facts)
    if changes and not resume.allow_changed_config:
        raise UserError(
            "The checkpoint is of another run. These settings differ, and they change the model's bits:\n  "
            + "\n  ".join(changes)
            + "\nUndo the change, or add --allow_changed_config to continue with it. The manifest records the change.",
            agreed=True,
        )
    reasons = [f"after a checkpoint {change}" for change in changes]
    for name in _LABELLED:
        old, new = facts["facts"].get(name), p.facts.get(name)
        if name == "task_code_sha256" and old not in (None, new):  # checkpoints of earlier versions do not have it
            reasons.append("the code of the task has changed since the checkpoint")
        elif name != "task_code_sha256" and old != new:
            reasons.append(f"the checkpoint was made with {name} {old or 'unset'}, but this is {new or 'unset'}")
    reasons += [reason for reason in facts["inexact"] if reason not in p.inexact + reasons]
    refuse_inexact(p.config, reasons)
    p.inexact += [reason for reason in reasons if reason not in p.inexact]


def _check_length(p: Pieces, step: int) -> None:
    if step > p.total_steps:
        raise UserError(
            f"The run has made {step:,} steps already, but trainer.epochs and trainer.max_steps now give only "
            f"{p.total_steps:,}.\nAsk for at least {step:,}, or start the shorter run with another --output_dir.",
            agreed=True,
        )


def goes_on(p: Pieces, before: Finished, resume: Resume) -> bool:
    """Whether a finished run goes on because it now has more steps. Every rank comes to the same result.

    Args:
        p: of the run as it is now.
        before: the run that has finished.
        resume: whether changes are allowed.

    Raises:
        UserError: on every rank: it is another run, or has fewer steps than were made.
    """
    early = before.summary["status"] == "stopped early"
    _check_length(p, int(before.summary["steps"]))
    # AdaScale may end a run before its last step. Then more steps do not make it longer.
    at_its_end = int(before.summary["steps"]) == int(before.facts["total_steps"])
    if at_its_end and not early and p.total_steps > int(before.facts["total_steps"]):
        return True  # compared with its checkpoint, as any run that continues
    changes = _changes(p, before.facts)
    if changes:
        raise UserError(
            f"The run in {before.path} has {'stopped early' if early else 'finished'}, and these settings differ from "
            "its own:\n  "
            + "\n  ".join(changes)
            + "\nUndo the change, or start a new run with another --output_dir. Only a run with more steps than before "
            "goes on.",
            agreed=True,
        )
    return False
