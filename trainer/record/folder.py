"""The output folder of a run: claimed before anything is computed, and never overwritten. Its files appear whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import near
from ..errors import UserError
from ..files import whole_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor


# The file in the folder of a model that says what made it.
ORIGIN = "trainer.json"
# The card of a model, beside it.
CARD = "README.md"
# The trained weights as they are. The file stays beside the model until the saved model has been checked.
RAW = "weights.safetensors"
# What the run of a fold predicts for each sample that it tests.
PREDICTIONS = "fold_predictions.csv"
# What a run writes. A folder with one of these already holds a run, or files of the user's own.
_NAMES = (
    "manifest.json",
    "summary.json",
    "metrics.jsonl",
    "model",
    "adapter",
    RAW,
    PREDICTIONS,
    "checkpoints",
    "tensorboard",
    "logs/deepspeed.log",
)
# What a folder may hold before a run: hidden files, logs of launchers, the schema of a config, and lost+found, which is
# on a new disk.
_MAY_LIE_THERE = re.compile(r"\..*|logs|lost\+found|.*\.(log|out|err)|trainer-schema\.json")
# The names under which files and folders are written before they are whole, and the probe of `_make`.
_UNFINISHED = re.compile(
    r"\.(model|adapter|weights\.safetensors|manifest\.json|summary\.json|metrics\.jsonl|fold_predictions\.csv)\.\d+|\.probe-\d+"
)
# A run that has been ended has this time to release its folder.
_LEAVING_S = 20.0
# The locks that this process holds. A process that a task forks inherits them. It closes them, or the folder would stay
# locked after the run has ended.
_locks: set[int] = set()


def _forget_locks() -> None:
    while _locks:
        with contextlib.suppress(OSError):
            os.close(_locks.pop())


os.register_at_fork(after_in_child=_forget_locks)


class OutputFolder:
    """Rank 0's folder for one run. `claim` it first; `release` it if the run ends before its first step.

    Attributes:
        continues: whether it held a run when it was claimed.
    """

    def __init__(self, path: Path, created: list[Path], lock: int | None) -> None:
        self.path = path
        self._created = created
        self._inherited_from: Path | None = None
        self._lock = lock  # held until `unlock`, or until this process ends
        self.continues = holds_run(path)

    @staticmethod
    def claim(wanted: str | None, config_name: str, again: bool = False) -> OutputFolder:
        """Makes the folder, or takes an existing one that holds no run.

        Args:
            wanted: the folder; None for a new one, runs/<config_name>-<number>.
            again: take the folder also if it holds a run, to continue it.

        Raises:
            UserError: the folder already holds a run or files of the user's own, is in use, or cannot be written.
        """
        created: list[Path] = []
        if wanted == "":
            raise UserError("--output_dir is empty (is a shell variable not set?). Name a folder, or leave it out.")
        try:
            if wanted is None:
                return OutputFolder._claim_new(config_name, created)
            path = Path(wanted).expanduser()
            check_content(path, config_name, again)
            lock = _make_and_lock(path, created)
            try:
                # The run that held the lock may have written its first files since.
                check_content(path, config_name, again)
                folder = OutputFolder(path, created, lock)
            except BaseException:
                _unlock(lock)
                raise
            folder._clean()
            return folder
        except UserError:
            _remove(created)
            raise
        except OSError as error:
            _remove(created)
            where = wanted if wanted is not None else "runs"
            raise UserError(f"The output folder {where} cannot be written: {error.strerror or error}.") from error

    @staticmethod
    def _claim_new(config_name: str, created: list[Path]) -> OutputFolder:
        base = Path("runs")
        _make(base, created)
        for number in range(1, 100_000):
            path = base / f"{config_name}-{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            created.append(path)
            return OutputFolder(path, created, _lock(path))
        raise UserError(f"The folder {base} is full of runs of {config_name}. Choose an --output_dir.")

    def release(self) -> None:
        """Removes what `claim` created, unless something has been put there since. Unlocks the folder."""
        _remove(self._created)
        self.unlock()

    def unlock(self) -> None:
        """Lets other runs use the folder. This run must not write to it any more."""
        _unlock(self._lock)
        self._lock = None

    def _clean(self) -> None:
        """Removes the unfinished files of a process that was killed."""
        for leftover in self.path.glob(".*"):
            if not _UNFINISHED.fullmatch(leftover.name):
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def inherit(self, run: Path) -> None:
        """Notes the run from whose checkpoint this one continues: `begin` copies its log."""
        self._inherited_from = run

    def begin(self) -> None:
        """Prepares the folder for the run's first files."""
        # The old summary of a finished run that now continues. It has no summary until it comes to its new end.
        (self.path / "summary.json").unlink(missing_ok=True)
        lines = None if self._inherited_from is None else self._inherited_from / "metrics.jsonl"
        if lines is not None and lines.exists():
            shutil.copyfile(lines, self.path / "metrics.jsonl")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file at once: readers see the old file or the new one, never half of it."""
        write_json(self.path / name, value)

    def write_folder(self, name: str, write: Callable[[Path], None]) -> None:
        """Calls `write` with an empty folder, which then replaces the folder `name` in one step.

        Files that a user has put into the old folder are copied into the new one.
        """
        with whole_folder(self.path / name, synced=True) as temporary:
            write(temporary)
            for own in _files_of_users(self.path / name):
                copy = temporary / own.name
                if own.is_dir() and not own.is_symlink():
                    shutil.copytree(own, copy, symlinks=True)
                elif not copy.exists():
                    shutil.copy2(own, copy, follow_symlinks=False)


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes tensors by name to a safetensors file."""
    from safetensors.torch import save_file

    # Clones, because tied weights and statistics in one buffer share memory, and the format refuses that.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, str(path))


def _files_of_users(folder: Path) -> list[Path]:
    """The files in the folder of a model, or of an adapter, that no run has written."""
    if not folder.is_dir():
        return []
    if folder.name == "adapter":
        return [file for file in folder.iterdir() if not file.name.startswith("adapter_") and file.name != CARD]
    try:
        ours = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # of an earlier version, which did not note them
    return [file for file in folder.iterdir() if file.name not in (*ours, ORIGIN, CARD)]


def _make(path: Path, created: list[Path]) -> None:
    for folder in [*reversed(path.parents), path]:
        if folder.is_symlink() and not folder.exists():
            raise FileNotFoundError(None, f"{folder} is a link to {os.readlink(folder)}, which is not there")
        if not folder.exists():
            folder.mkdir()
            created.append(folder)
    if not path.is_dir():
        raise NotADirectoryError(None, "it is a file")
    # Writes a file to find out. Permission bits do not tell enough: think of root, read-only mounts and quotas.
    probe = path / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()


def holds_run(path: Path) -> bool:
    """Whether a run of ours has written into a folder. Its first file is the manifest."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    if isinstance(manifest, dict) and {"config", "batch_plan", "exactness"} <= manifest.keys():
        return True
    # The manifest may be damaged while the checkpoints are whole.
    return any((path / "checkpoints").glob(f"step-{'[0-9]' * 9}/manifest.json"))


def refuse_foreign(folder: Path, config_name: str = "") -> None:
    """Raises UserError if a folder holds files that are not ours. Call it only if the folder holds no run.

    Args:
        folder: it need not exist.
        config_name: the config itself, <config_name>.json, may lie there.
    """
    if not folder.is_dir():
        return
    allowed = f"{config_name}.json"
    entries = [e for e in folder.iterdir() if not _MAY_LIE_THERE.fullmatch(e.name) and e.name != allowed]
    others = sorted(e.name for e in entries if not e.is_dir() or any(e.iterdir()))
    if others:
        named = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        raise UserError(
            f"The output folder {folder} holds files that no run has written ({named}). A run needs a folder of its "
            f"own.\nName a new one, such as {folder / 'run'}."
        )


def refuse_nothing_to_resume(given: str) -> None:
    """Raises UserError if --resume names a folder that is not there, with the runs that are."""
    if given in ("auto", "none") or Path(given).expanduser().exists():
        return
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/checkpoints"))
    there = f"There are: {', '.join(runs[-10:])}." if runs else "There is no run with checkpoints in ./runs."
    meant = near(given, ("auto", "none", *runs))
    raise UserError(
        f"--resume {given}: there is no such folder (looked from {Path.cwd()}). "
        + (f"{meant} " if meant.startswith("Did") else "")
        + f"{there}\nName a run's folder, or auto for the run in --output_dir or the newest one of this config."
    )


def check_content(path: Path, config_name: str, again: bool) -> None:
    """Raises UserError if a run may not write into a folder with this content.

    Args:
        path: the folder; it need not exist.
        config_name: the config's, which may lie there.
        again: a run is to be continued there.
    """
    held = [name for name in _NAMES if os.path.lexists(path / name)]
    if not held:
        refuse_foreign(path, config_name)
        return
    if not holds_run(path):
        raise UserError(
            f"The output folder {path} holds {held[0]}, which was not written by a run. A run would write there, and "
            "files are never overwritten.\nChoose another --output_dir, or move or delete it."
        )
    if not again:
        raise UserError(
            f"The output folder {path} already holds a run ({held[0]}), and runs are never overwritten.\n"
            "Choose another --output_dir, or move or delete that folder."
        )
    for name in ("model", "adapter"):
        folder = path / name
        if os.path.lexists(folder) and (folder.is_symlink() or not (path / "model" / ORIGIN).is_file()):
            why = "is a link" if folder.is_symlink() else f"lacks {ORIGIN}"
            raise UserError(
                f"{folder} was not written by a run: it {why}. The run would replace it with its model.\n"
                "Move it to another place, and start again."
            )


def _make_and_lock(path: Path, created: list[Path]) -> int | None:
    while True:
        _make(path, created)
        lock = _lock(path)
        with contextlib.suppress(FileNotFoundError):
            if lock is None or os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        # The run that held it has ended before its first step, and removed the folder.
        _unlock(lock)


def _lock(path: Path) -> int | None:
    """Locks a folder against other runs; None if the file system has no locks.

    It waits for some time: a run that has just been ended may need seconds to leave, while its ranks look for the one
    that is lost.

    Raises:
        UserError: another process holds the lock.
    """
    deadline_s = time.monotonic() + _LEAVING_S
    descriptor = os.open(path, os.O_RDONLY)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locks.add(descriptor)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(descriptor)
                raise UserError(
                    f"The output folder {path} is in use: {_holder(path)}.\n"
                    "Wait for it to end, or choose another --output_dir."
                ) from None
            time.sleep(0.2)
        except OSError:
            os.close(descriptor)
            return None


def _unlock(lock: int | None) -> None:
    if lock is not None and lock in _locks:  # a forked process has closed it already, see `_forget_locks`
        _locks.remove(lock)
        os.close(lock)


def _holder(path: Path) -> str:
    """Who has a folder open, as a clause."""
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # it has ended, or belongs to someone else
            if any(os.path.realpath(link) == os.path.realpath(path) for link in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"process {process.name} ({command[:200]}) still holds it"
    return "another run is still writing to it, perhaps on another machine"


def _remove(created: list[Path]) -> None:
    for folder in reversed(created):
        try:
            folder.rmdir()
        except OSError:
            return
