"""Which folder a run takes, and which run or checkpoint it continues. Only rank 0 asks."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..errors import UserError
from ..record.checkpoints import list_checkpoints
from ..record.console import say
from ..record.folder import OutputFolder, refuse_nothing_to_resume


@dataclass(frozen=True)
class Resume:
    """What the command line asks for: `mode` is "none", "auto", or the folder of a run or of a checkpoint."""

    mode: str = "none"
    allow_changed_config: bool = False

    @property
    def wanted(self) -> bool:
        """Whether to look for a checkpoint."""
        return self.mode != "none"


@dataclass(frozen=True)
class Finished:
    """A run that has come to its end.

    Attributes:
        path: its output folder.
        summary: as in summary.json.
        facts: the facts of its manifest.json, under the names that they have in a checkpoint.
    """

    path: Path
    summary: dict[str, Any]
    facts: dict[str, Any]


def claim(resume: Resume, config: Config, config_name: str) -> tuple[OutputFolder, Path | None]:
    """Rank 0's output folder, and the folder of checkpoints (or the one checkpoint) to continue from, if any.

    Raises:
        UserError: there is nothing to continue from, or the output folder holds another run.
    """
    wanted = config.trainer.output_dir
    if not resume.wanted:
        return OutputFolder.claim(wanted, config_name), None
    if resume.mode == "auto":
        path = wanted if wanted is not None else _newest_unfinished(config_name)
        # It is locked first and looked at then: another run may just be ending there.
        folder = OutputFolder.claim(path, config_name, again=True)
        if not folder.continues:
            say("--resume auto: there is no run to continue here, so a new one begins")
            return folder, None
        source = folder.path / "checkpoints"
        if source.is_symlink() and not source.exists():
            folder.unlock()
            raise UserError(
                f"--resume auto: {source} is a link to {os.readlink(source)}, which is not there.\nMount its disk, or "
                "remove the link to begin again."
            )
        if not list_checkpoints(source) and finished_summary(folder.path) is None:
            say(f"--resume auto: there is no checkpoint in {source}, so the run begins again")
        return folder, source
    refuse_nothing_to_resume(resume.mode)
    source = Path(os.path.abspath(Path(resume.mode).expanduser()))
    if source.name.startswith("step-") and source.is_dir():
        if source.parent.name != "checkpoints":  # a copy, so the folders around it are not a run
            if wanted is None:
                raise UserError(
                    f"--resume {resume.mode} is a checkpoint outside of a run's folder checkpoints. Add --output_dir "
                    "to say where the run continues."
                )
            return OutputFolder.claim(wanted, config_name), source
        run = source.parent.parent
        newest = list_checkpoints(source.parent)[:1]
        if _same(wanted, run) and newest and newest[0].name != source.name:
            raise UserError(
                f"--resume {resume.mode}: {newest[0].name} in the same folder is newer. To continue from the older "
                "one, choose another --output_dir."
            )
    else:
        run = source.parent if source.name == "checkpoints" else source
        source = run / "checkpoints"
        if not list_checkpoints(source):
            raise UserError(f"--resume {resume.mode}: there is no checkpoint in {source}.")
    if _same(wanted, run):
        return OutputFolder.claim(str(run), config_name, again=True), source
    folder = OutputFolder.claim(wanted, config_name)
    folder.inherit(run)
    return folder, source


def _same(wanted: str | None, run: Path) -> bool:
    return wanted is None or Path(wanted).expanduser().resolve() == run.resolve()


def _newest_unfinished(config_name: str) -> str | None:
    runs: list[tuple[int, Path]] = []
    for path in Path("runs").glob("*"):
        found = re.fullmatch(rf"{re.escape(config_name)}-(\d+)", path.name)
        if found:
            runs.append((int(found[1]), path))
    if not runs:
        return None
    _, newest = max(runs)
    unfinished = list_checkpoints(newest / "checkpoints") and finished_summary(newest) is None
    return str(newest) if unfinished else None


def finished_summary(run: Path) -> dict[str, Any] | None:
    """The summary of a run that has finished, else None."""
    try:
        summary = json.loads((run / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("status") in ("finished", "stopped early") else None


def finished(folder: OutputFolder) -> Finished | None:
    """The run in a claimed folder, if it has finished; else None.

    Raises:
        UserError: its manifest cannot be read, so it is unknown which run it was.
    """
    summary = finished_summary(folder.path)
    if summary is None or not folder.continues:
        return None
    path = folder.path / "manifest.json"
    try:
        m = json.loads(path.read_text(encoding="utf-8"))
        facts = {name: m[name] for name in ("config", "data_sha256", "facts", "inexact")}
        # Runs of earlier versions do not say how many steps they were to make.
        facts |= {"plan": m["batch_plan"], "total_steps": m.get("total_steps", summary["steps"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The run in {folder.path} has finished, but {path} cannot be read, so it is unknown whether it was this "
            "run.\nChoose another --output_dir."
        ) from error
    return Finished(folder.path, summary, facts)
