"""Writes files and folders that appear whole or not at all, and JSON that every reader accepts."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _share(file: Path) -> None:
    """Gives a file the usual permissions of a new file. The library safetensors makes its files private."""
    with contextlib.suppress(OSError, StopIteration):
        # Read from /proc: os.umask() can only read the mask by setting it, which would disturb other threads.
        lines = Path("/proc/self/status").read_text().splitlines()
        umask = next(line.split()[1] for line in lines if line.startswith("Umask:"))
        file.chmod(0o666 & ~int(umask, 8))


@contextlib.contextmanager
def whole_file(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A temporary path to write a file to. At the end it is moved to `path`. After an exception, `path` is unchanged.

    Args:
        path: of the file.
        synced: wait until the content is on disk before it is moved. Then not even a power cut leaves half a file.
    """
    # In the same folder: a file can be replaced in one step only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        _share(temporary)
        if synced:
            sync(temporary)
        os.replace(temporary, path)  # one step: others see the old file or the new one
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """As `whole_file`, for an empty folder that the caller fills."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _share(file)
                if synced:
                    sync(file)
        if synced:
            sync(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_DAY_S = 86400.0


def remove_leftovers(folder: Path, names: re.Pattern[str]) -> None:
    """Removes files with these names that are older than a day. Processes that were killed have left them."""
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            with contextlib.suppress(OSError):  # another process may remove it, too
                if names.fullmatch(file.name) and time.time() - file.lstat().st_mtime > _DAY_S:
                    file.unlink()


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text. JSON has no nan or infinity, so numbers that are not finite (or not measured) become null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file: readers see the old file or the new one, never half of it."""
    with whole_file(path, synced=True) as temporary:
        temporary.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")
