"""The output folder of a run: claimed before anything is computed, never overwritten; files appear whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import whole_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor


# The file in the folder of a model that says what made it.
ORIGIN = "trainer.json"
# The trained weights as they are: beside the model while it is not certain that it was saved rightly.
RAW = "weights.safetensors"
# What a run writes. A folder with one of these already holds a run, or files of the user's own.
_NAMES = (
    "manifest.json",
    "summary.json",
    "metrics.jsonl",
    "model",
    "adapter",
    RAW,
    "checkpoints",
    "tensorboard",
    "logs/deepspeed.log",
)
# The time in which a run that is ending must release its folder.
_LEAVING_S = 20.0


class OutputFolder:
    """Rank 0's folder for one run. `claim` it first; `release` it if the run ends before its first step."""

    def __init__(self, path: Path, created: list[Path]) -> None:
        self.path = path
        self._created = created
        self._inherited_from: Path | None = None
        self._lock = _lock(path)  # held until `unlock`, or until this process ends

    @staticmethod
    def claim(wanted: str | None, config_name: str, again: bool = False) -> OutputFolder:
        """Makes the folder, or takes an existing one that holds no run.

        Args:
            wanted: the folder; None for a new one, runs/<config_name>-<number>.
            again: continue the run in this folder.

        Raises:
            UserError: the folder already holds a run, or cannot be written.
        """
        created: list[Path] = []
        if wanted == "":
            raise UserError("--output_dir is empty (is a shell variable not set?). Name a folder, or leave it out.")
        try:
            if wanted is not None:
                path = Path(wanted)
                held = [name for name in _NAMES if (path / name).exists()]
                if held and not again:
                    raise UserError(
                        f"The output folder {path} already holds a run ({held[0]}), and runs are never overwritten.\n"
                        "Choose another --output_dir, or move or delete that folder."
                    )
                _make(path, created)
                folder = OutputFolder(path, created)
                if again:
                    folder._clean()
                return folder
            base = Path("runs")
            _make(base, created)
            for number in range(1, 100_000):
                path = base / f"{config_name}-{number:03d}"
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                created.append(path)
                return OutputFolder(path, created)
            raise UserError(f"The folder {base} is full of runs of {config_name}. Choose an --output_dir.")
        except OSError as error:
            _remove(created)
            where = wanted if wanted is not None else "runs"
            raise UserError(f"The output folder {where} cannot be written: {error.strerror or error}.") from error

    def release(self) -> None:
        """Removes what `claim` created, if nothing was put there since."""
        _remove(self._created)
        self.unlock()

    def unlock(self) -> None:
        """Lets other runs have the folder: this one will write nothing more to it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clean(self) -> None:
        """Removes the unfinished files of a process that was killed."""
        for pattern in (".model.*", ".adapter.*", f".{RAW}.*", ".*.json.*"):
            for leftover in self.path.glob(pattern):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()

    def inherit(self, run: Path) -> None:
        """Notes the run from whose checkpoint this one continues: `begin` copies its log."""
        self._inherited_from = run

    def begin(self) -> None:
        """Prepares the folder for the run's first files."""
        lines = None if self._inherited_from is None else self._inherited_from / "metrics.jsonl"
        if lines is not None and lines.exists():
            shutil.copyfile(lines, self.path / "metrics.jsonl")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a JSON file at once: readers see the old file or the new one, never half of it."""
        write_json(self.path / name, value)

    def write_folder(self, name: str, write: Callable[[Path], None]) -> None:
        """Calls `write` with an empty folder, which then replaces the folder `name` in one step."""
        with whole_folder(self.path / name, synced=True) as temporary:
            write(temporary)


def write_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes tensors by name to a safetensors file."""
    from safetensors.torch import save_file

    # Clones, because tied weights and statistics in one buffer share memory, and the format refuses that.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}, str(path))


def _make(path: Path, created: list[Path]) -> None:
    for folder in [*reversed(path.parents), path]:
        if not folder.exists():
            folder.mkdir()
            created.append(folder)
    if not path.is_dir():
        raise NotADirectoryError(None, "it is a file")
    # Permission bits are not enough (root, read-only mounts, quotas), so a file is written to find out.
    probe = path / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()


def _lock(path: Path) -> int | None:
    """Locks a folder against other runs; None if the file system has no locks.

    A run that has just been ended may need some seconds to leave: its ranks look for the lost one. So this waits.

    Raises:
        UserError: another process holds the lock.
    """
    deadline_s = time.monotonic() + _LEAVING_S
    descriptor = os.open(path, os.O_RDONLY)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                os.close(descriptor)
                raise UserError(
                    f"The output folder {path} is in use: another run is still writing to it.\n"
                    "Wait for it to end, or choose another --output_dir."
                ) from None
            time.sleep(0.2)
        except OSError:
            os.close(descriptor)
            return None


def _remove(created: list[Path]) -> None:
    for folder in reversed(created):
        try:
            folder.rmdir()
        except OSError:
            return
