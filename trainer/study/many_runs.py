"""For all commands that make many runs: how many at a time, Ctrl-C, a locked folder. It loads no torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..engine.gpus import usable_gpus
from ..errors import UserError
from ..record.console import say
from ..record.folder import refuse_foreign


def begin(folder: Path, declaration: str, task: str) -> None:
    """Checks the output folder, and says that data and task are looked at next, which may take long.

    Args:
        folder: the output folder; it need not exist.
        declaration: the file there that says what was declared.
        task: `trainer.task`.

    Raises:
        UserError: the folder holds files of the user's, or cannot be made.
    """
    above = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "which cannot be written to" if above.is_dir() else "which is no folder"
        raise UserError(
            f"The output folder {folder} cannot be made or used: it is, or lies in, {above}, {why}. Choose another."
        )
    if not (folder / declaration).exists():
        refuse_foreign(folder)
    say(f"looking at the data and the model of {task}; no run is started yet")


def check_code(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> None:
    """Raises UserError if a task's code has changed since runs were made in a folder.

    Args:
        folder: the output folder.
        before, now: declarations with "task_code_sha256"; earlier ones have none, and are not compared.
        key: of the output folder, for the message.
    """
    if before.get("task_code_sha256", now["task_code_sha256"]) != now["task_code_sha256"]:
        raise UserError(
            f"{folder} holds runs of another version of the task: its file, or what it imports, has changed.\nRuns of "
            f"two versions cannot be compared. Undo the change to continue, or choose another {key}."
        )


def duration(seconds: float) -> str:
    """A readable time: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def devices_for(config: Config, wanted: int | None) -> tuple[bool, int]:
    """Whether runs use GPUs, and how many there are at a time."""
    gpus = usable_gpus(config.trainer.device)
    # The cores that this process may use, which can be fewer than the machine has.
    cores = len(os.sched_getaffinity(0)) // config.trainer.cpu_threads
    return gpus > 0, min(wanted or 10**6, gpus or max(1, cores))


@contextmanager
def interruptible() -> Iterator[None]:
    """A context in which SIGTERM has the effect of Ctrl-C."""
    # Python sets signal handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def locked(folder: Path, what: str = "study") -> Iterator[None]:
    """The folder, created and locked against a second study (or `what` it is). Raises UserError."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The output folder {folder} cannot be made: {error.strerror}.") from None
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"{folder} is in use: another {what} runs there. Wait for it to end, or choose another folder."
        ) from None
