"""A run's checkpoints: what goes into one, where the newest is, whether it belongs to this run, restoring it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.keys import Config
from ..errors import TrainerError, UserError
from ..exact.guard import compare_ranks
from ..exact.progress import takes_progress
from ..ranks.collectives import broadcast_object, broadcast_tensor, raise_together
from ..record.checkpoints import (
    Checkpoints,
    DamagedError,
    Snapshot,
    copy_to_host,
    list_checkpoints,
    read,
    read_newest,
)
from ..record.console import say
from ..record.folder import OutputFolder
from ..record.window import Window
from .best import BestModel
from .build import Pieces, refuse_inexact

# Keys that may change before a run continues from a checkpoint: they change no bit of the model.
_HARMLESS = (
    "trainer.output_dir", "trainer.log_every_steps", "trainer.guard_every_steps", "trainer.audit_every_steps",
    "trainer.pack",
    "trainer.checkpoint",
    "trainer.hang_timeout_s", "trainer.max_wall_time_s", "trainer.ranks_per_gpu", "trainer.exactness",
    "trainer.gradient_noise",
    "tensorboard", "steps_per_print", "memory_breakdown", "dump_state", "disable_python_gc",
    # Their effects are compared instead: the batch plan, the number of steps, the hash of the data.
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "trainer.epochs", "trainer.max_steps", "trainer.task_options.data",
)  # fmt: skip
# Facts of a machine that a run's bits may depend on.
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
_LABELLED += ("cpu_capability", "cuda", "cudnn", "tf32")


class Saver:
    """Writes a run's checkpoints. `save` is collective; only rank 0 writes files.

    Attributes:
        began: whether a checkpoint has been begun, on every rank alike.

    Args:
        pieces, window, best, history: the content of a checkpoint.
        folder: rank 0's output folder, None on the other ranks.
    """

    def __init__(
        self,
        pieces: Pieces,
        window: Window,
        best: BestModel | None,
        history: list[dict[str, Any]],
        folder: OutputFolder | None,
    ) -> None:
        self._pieces, self._window, self._best, self._history = pieces, window, best, history
        self._files = (
            None if folder is None else Checkpoints(folder.path / "checkpoints", pieces.config.trainer.checkpoint.keep)
        )
        self._memory: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}}
        self._best_step = -1
        self.began = False

    def save(self, step: int) -> float:
        """Copies the state after `step`, and leaves the writing to a thread. Collective: every rank.

        Returns:
            Seconds that this took from the run.

        Raises:
            RanksDifferError: the ranks differ, so nothing is written.
            TrainerError: the previous checkpoint could not be written.
        """
        p, began_s = self._pieces, time.perf_counter()
        if p.engine.zero_stage == 0:
            compare_ranks(self._common_state(), step)
        self.began = True
        optimizer, values = p.engine.optimizer_state()
        with p.engine.whole_parameters():
            if self._files is not None:
                self._files.wait()  # the copies below reuse the memory of the previous checkpoint
                tensors = {
                    "model": copy_to_host(p.engine.model_state(), self._memory["model"]),
                    "optimizer": copy_to_host(optimizer, self._memory["optimizer"]),
                }
                best = None
                if self._best is not None:
                    kept, best = self._best.state_dict()
                    if kept:
                        # Copied only when it changes, but written each time. If checkpoints shared one file by links,
                        # a damaged block would damage all of them.
                        if best["step"] != self._best_step:
                            copy_to_host(kept, self._memory["best"])
                        tensors["best"] = self._memory["best"]
                        self._best_step = best["step"]
                self._files.save(Snapshot(step, tensors, self._facts(values, best)))
        return time.perf_counter() - began_s

    def _common_state(self) -> dict[str, Tensor]:
        """What must be the same on every rank, by kind and name: `Pieces.common_state` and the optimizer's tensors.

        Rank 0's tensors are written. A wrong optimizer state on rank 0 would spread to all ranks with the next resume.
        """
        common, state = self._pieces.common_state(), self._pieces.engine.state()
        return {n: t for n, t in state.items() if n.startswith("optimizer ") or n.partition(" ")[2] in common}

    def _facts(self, engine: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
        p = self._pieces
        return {  # nothing that a later step changes: a thread writes it while training goes on
            "config": p.config.as_dict(),
            "plan": asdict(p.plan),
            "total_steps": p.total_steps,
            "data_sha256": p.data_sha256(),
            "facts": p.facts,
            "inexact": list(p.inexact),
            "engine": engine,
            "window": self._window.state_dict(),
            "best": best,
            "adascale": None if p.rates.adascale is None else p.rates.adascale.state_dict(),
            "history": self._history,
        }

    def wait(self) -> None:
        """Waits until everything is on disk. Raises TrainerError if it could not be written."""
        if self._files is not None:
            self._files.wait()


@dataclass(frozen=True)
class Resume:
    """The command line's wish: `mode` is "none", "auto", or a run's or checkpoint's folder."""

    mode: str = "none"
    allow_changed_config: bool = False

    @property
    def wanted(self) -> bool:
        """Whether to look for a checkpoint."""
        return self.mode != "none"


def claim(resume: Resume, config: Config, config_name: str) -> tuple[OutputFolder, Path | None]:
    """Rank 0's output folder, and the folder of checkpoints (or the one checkpoint) to continue from, if any.

    Raises:
        UserError: there is nothing to continue from, or the output folder holds another run.
    """
    wanted = config.trainer.output_dir
    if not resume.wanted:
        return OutputFolder.claim(wanted, config_name), None
    if resume.mode == "auto":
        path = Path(wanted) if wanted is not None else _newest_unfinished(config_name)
        if path is None or not _has_run(path):
            say("--resume auto: there is no run to continue here, so a new one begins")
            return OutputFolder.claim(wanted, config_name), None
        return OutputFolder.claim(str(path), config_name, again=True), path / "checkpoints"
    source = Path(resume.mode)
    if source.name.startswith("step-") and source.is_dir():
        run = source.parent.parent
        newest = list_checkpoints(source.parent)[0]
        if (wanted is None or Path(wanted).resolve() == run.resolve()) and newest.name != source.name:
            raise UserError(
                f"--resume {source}: {newest.name} in the same folder is newer. To continue from the older one, choose "
                "another --output_dir."
            )
    else:
        run = source.parent if source.name == "checkpoints" else source
        source = run / "checkpoints"
        if not list_checkpoints(source):
            raise UserError(f"--resume {resume.mode}: there is no checkpoint in {source}.")
    if wanted is None or Path(wanted).resolve() == run.resolve():
        return OutputFolder.claim(str(run), config_name, again=True), source
    folder = OutputFolder.claim(wanted, config_name)
    folder.inherit(run)
    return folder, source


def _has_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("manifest.json", "checkpoints", "metrics.jsonl"))


def _newest_unfinished(config_name: str) -> Path | None:
    runs = sorted(Path("runs").glob(f"{config_name}-[0-9]*"), key=lambda p: p.name, reverse=True)
    for run in runs[:1]:
        if list_checkpoints(run / "checkpoints") and finished_summary(run) is None:
            return run
    return None


def finished_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a run that has finished, else None."""
    try:
        summary = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("status") in ("finished", "stopped early") else None


def restore(p: Pieces, source: Path | None, resume: Resume) -> Snapshot | None:
    """Loads the state of a checkpoint into the engine. Collective: every rank.

    Args:
        p: freshly built.
        source: rank 0's, from `claim`: a folder of checkpoints, or a single checkpoint.
        resume: the command line's wish.

    Returns:
        The snapshot, its tensors on every rank, or None if there is nothing to continue from.

    Raises:
        UserError: on every rank: all checkpoints are damaged, or belong to a run that this one may not continue.
    """
    snapshot: Snapshot | None = None
    error: TrainerError | None = None
    if p.ranks.first and source is not None:
        try:
            snapshot = _read(source)
            if snapshot is not None:
                _check_parts(source, snapshot)
        except TrainerError as own:
            error = own
    raise_together(error)
    header = broadcast_object((None if snapshot is None else (snapshot.step, snapshot.facts, _described(snapshot)),))[0]
    if header is None:
        return None
    step, facts, described = header
    _check_same_run(p, facts, resume)
    if snapshot is not None:
        try:
            _check_shapes(p, snapshot)
        except TrainerError as own:
            error = own
    raise_together(error)
    tensors = {
        part: {
            name: broadcast_tensor(snapshot.tensors[part][name] if snapshot is not None else None, dtype, shape)
            for name, (dtype, shape) in names.items()
        }
        for part, names in described.items()
    }
    p.engine.load_state(tensors["model"], tensors["optimizer"], facts["engine"])
    return Snapshot(step, tensors, facts)


def _read(source: Path) -> Snapshot | None:
    if source.name.startswith("step-"):
        try:
            return read(source)
        except DamagedError as error:
            raise UserError(f"The checkpoint {source} is damaged: {error}.") from error
    found = read_newest(source, say)
    return None if found is None else found[1]


# What `Saver` writes into a checkpoint's manifest.
_PARTS = {"config": dict, "plan": dict, "total_steps": int, "data_sha256": dict, "facts": dict, "inexact": list}
_PARTS |= {"engine": dict, "window": dict, "history": list}


def _check_parts(source: Path, snapshot: Snapshot) -> None:
    """Raises UserError for a checkpoint whose checksums are right, but that no run of ours has written."""
    wrong = [name for name, kind in _PARTS.items() if not isinstance(snapshot.facts.get(name), kind)]
    wrong += [name for name in ("model", "optimizer") if name not in snapshot.tensors]
    if wrong:
        raise UserError(f"The checkpoint in {source} was not written by a run: it has no {wrong[0]}.")


def _described(snapshot: Snapshot) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    return {part: {n: (t.dtype, tuple(t.shape)) for n, t in ts.items()} for part, ts in snapshot.tensors.items()}


def _check_shapes(p: Pieces, snapshot: Snapshot) -> None:
    own = p.engine.whole_shapes()
    saved = {name: tuple(tensor.shape) for name, tensor in snapshot.tensors["model"].items()}
    if saved != own:
        name = next(n for n in [*own, *saved] if own.get(n) != saved.get(n))
        raise UserError(
            f"The checkpoint is of another model: {name} has the shape {saved.get(name, 'missing')} in it and "
            f"{own.get(name, 'missing')} here."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


def _check_same_run(p: Pieces, facts: Mapping[str, Any], resume: Resume) -> None:
    """Compares with the checkpoint's run, key by key. Every rank comes to the same result.

    Refuses changes that change the bits, and labels the run tolerance for those that may change them.
    """
    before = _flat(facts["config"])
    now = _flat(json.loads(json.dumps(p.config.as_dict())))
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
        if old != new:
            reasons.append(f"the checkpoint was made with {name} {old}, but this is {new}")
    reasons += [reason for reason in facts["inexact"] if reason not in p.inexact + reasons]
    refuse_inexact(p.config, reasons)
    p.inexact += [reason for reason in reasons if reason not in p.inexact]
