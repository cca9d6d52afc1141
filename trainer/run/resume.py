"""A run's checkpoints: what goes into one, and how a run is restored from it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainerError, UserError
from ..exact.checks.guard import compare_ranks
from ..ranks.collectives import broadcast_object, broadcast_tensor, raise_together
from ..record.checkpoints import (
    Checkpoints,
    DamagedError,
    Snapshot,
    copy_to_host,
    read,
    read_newest,
)
from ..record.console import say
from ..record.folder import OutputFolder
from ..record.window import Window
from .best import BestModel
from .build import Pieces
from .claim import Resume
from .same_run import check_same_run


class Saver:
    """Writes a run's checkpoints. `save` is collective; only rank 0 writes files.

    Attributes:
        began: whether a checkpoint has been begun, on every rank alike.

    Args:
        pieces, window, best, history: the content of a checkpoint.
        folder: rank 0's output folder, None on the other ranks.
        first_step: that of the checkpoint from which the run continues; 0 for a new run.
    """

    def __init__(
        self,
        pieces: Pieces,
        window: Window,
        best: BestModel | None,
        history: list[dict[str, Any]],
        folder: OutputFolder | None,
        first_step: int,
    ) -> None:
        self._pieces, self._window, self._best, self._history = pieces, window, best, history
        self._files = (
            None
            if folder is None
            else Checkpoints(folder.path / "checkpoints", pieces.config.trainer.checkpoint.keep, first_step or None)
        )
        self._memory: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}}
        self._best_step = -1
        self.began = False

    def save(self, step: int, records: int, ended: bool = False, time_s: float = 0.0) -> float:
        """Copies the state after `step`, and leaves the writing to a thread. Collective: every rank.

        Args:
            step: optimizer steps made so far.
            records: lines in metrics.jsonl. A run that continues keeps these.
            ended: it is the run's last step, whose validation is made after this.
            time_s: seconds of training so far, see `Recorder.time_s`.

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
                facts = self._facts(values, best) | {"records": records, "ended": ended, "time_s": time_s}
                self._files.save(Snapshot(step, tensors, facts))
        return time.perf_counter() - began_s

    def _common_state(self) -> dict[str, Tensor]:
        """What must be the same on every rank, by kind and name: `Pieces.common_state` and the optimizer's tensors.

        Rank 0's tensors are written. A wrong optimizer state on rank 0 would spread to all ranks with the next resume.
        If a task changes a parameter by itself, the ranks differ in it. The optimizer's state of that parameter can
        depend on it, as with weight decay. So this state differs as well, and is left out.
        """
        common, changing = self._pieces.common_state(), self._pieces.changing

        def is_common(kind: str, name: str) -> bool:
            return name.rpartition(".")[0] not in changing if kind == "optimizer" else name in common

        state = self._pieces.engine.state()
        return {n: t for n, t in state.items() if is_common(*n.split(" ", 1))}

    def _facts(self, engine: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
        p = self._pieces
        return {  # only values that no later step changes, because a thread writes them while training continues
            "config": p.config.as_dict() | {"comet": {}},  # Comet's key is a secret, and no logger changes the bits
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


def restore(p: Pieces, source: Path | None, resume: Resume) -> Snapshot | None:
    """Loads the state of a checkpoint into the engine. Collective: every rank.

    Args:
        p: freshly built.
        source: rank 0's, from `claim`: a folder of checkpoints, or a single checkpoint.
        resume: what the command line asks for.

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
    check_same_run(p, step, facts, resume)
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
    with as_written(step):
        p.engine.load_state(tensors["model"], tensors["optimizer"], facts["engine"])
    return Snapshot(step, tensors, facts)


@contextlib.contextmanager
def as_written(step: int) -> Iterator[None]:
    """Raises UserError, on every rank, for a checkpoint that is undamaged but has a content that no run writes."""
    try:
        yield
    except TrainerError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"The checkpoint of step {step:,} is undamaged, but no run writes such a content: {type(error).__name__}: "
            f"{error}.\nDelete it to use the one before it, or start a new run with another --output_dir.",
            agreed=True,
        ) from error


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
    """Raises UserError for a checkpoint with right checksums that no run of ours has written."""
    wrong = [name for name, kind in _PARTS.items() if not isinstance(snapshot.facts.get(name), kind)]
    wrong += [name for name in ("model", "optimizer") if name not in snapshot.tensors]
    if not wrong and not (snapshot.facts["history"] and isinstance(snapshot.facts["history"][-1], dict)):
        wrong = ["history"]
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
    types = {n: t.dtype for n, t in [*p.engine.model.named_parameters(), *p.engine.model.named_buffers()]}
    for part, tensors in snapshot.tensors.items():
        for key, tensor in sorted(tensors.items()):
            # Torch gives an optimizer's state the type of its parameter when it is loaded.
            name = key.rpartition(".")[0] if part == "optimizer" else key
            wanted = types.get(name, tensor.dtype)
            if tensor.dtype != wanted and (part != "optimizer" or tuple(tensor.shape) == own[name]):
                of = "optimizer" if part == "optimizer" else "model"
                raise UserError(f"The checkpoint is of another {of}: {key} is {tensor.dtype} in it, {wanted} here.")
