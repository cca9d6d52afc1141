"""Caches arrays that are slow to make and quick to read: tokenised texts, decoded images, rasterised contours.

The name of a cache file is a hash of everything that determines its content, so it is never out of date. One
process builds it, and the others (ranks of this run or of another) wait for it. It appears whole or not at all.
The format is safetensors: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..exact.checks.hashes import tensors_sha256
from ..files import remove_leftovers, whole_file

Cached = tuple[dict[str, Tensor], dict[str, Any]]

# Hash of a user's files -> computes it again.
_again: dict[str, Callable[[], str | None]] = {}
# What `whole_file` leaves of a cache file if the process is killed while it writes.
_UNFINISHED = re.compile(r"\.[a-z_-]+-[0-9a-f]{32}\.safetensors\.\d+")
# Increase it when the meaning of cached values changes.
_FORMAT = 1


def folder() -> Path:
    """The folder of cache files: $TRAINER_CACHE, else strong-scaling-trainer in the user's cache folder."""
    own = os.environ.get("TRAINER_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "strong-scaling-trainer"


def remember(digest: str, again: Callable[[], str | None]) -> str:
    """Returns a hash of a user's files, and notes how it is computed: `cached` compares it again after reading them."""
    _again[digest] = again
    return digest


def hash_files(*files: Path) -> str:
    """SHA-256 over the contents of files."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while chunk := content.read(1 << 20):
                total.update(chunk)
    return remember(total.hexdigest(), lambda: hash_files(*files))


def cached(kind: str, key: Mapping[str, Any], build: Callable[[], Cached]) -> Cached:
    """The result of `build()`, from the cache if it was built before.

    Args:
        kind: a word for the file's name.
        key: everything that determines the result, as JSON values: hashes of files, options, versions of packages.
        build: returns tensors by name, and a dictionary of JSON values.

    Raises:
        UserError: `build` raised it, or the files whose hash is in the key have changed meanwhile. Then nothing is
            cached.
    """
    import filelock

    text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    try:
        path = folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(str(path) + ".lock")
        lock.acquire()
    except OSError:
        # Home folders are often read-only on clusters. The folder of temporary files is not shared between machines.
        path = Path(tempfile.gettempdir()) / f"strong-scaling-trainer-{os.getuid()}" / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Everybody may write to the temporary folder. Another user's folder of this name must not be trusted.
        if path.parent.stat().st_uid != os.getuid():
            raise UserError(
                f"The cache folder {path.parent} belongs to someone else. Set TRAINER_CACHE to a folder of your own."
            ) from None
        lock = filelock.FileLock(str(path) + ".lock")
        lock.acquire()
    try:
        if path.exists():
            try:
                return _read(path)
            except Exception:  # many types are possible, depending on the damage
                path.unlink()  # damaged, for example by a full disk: build it again
        arrays, facts = build()
        _check_unchanged(text)
        _write(path, arrays, facts)
        return arrays, facts
    finally:
        lock.release()


def _check_unchanged(key: str) -> None:
    """Raises UserError if files whose hashes are in a key have changed: what was read is not what was hashed."""
    for digest, again in list(_again.items()):
        if digest in key:
            try:
                changed = again() != digest
            except (OSError, UserError):  # it is gone
                changed = True
            if changed:
                raise UserError("The data changed while it was read. Start again when no program writes to its files.")


def _read(path: Path) -> Cached:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["sha256"] != _digest(arrays, metadata["facts"]):
        raise ValueError("some of its bits have changed")
    return arrays, json.loads(metadata["facts"])


def _digest(arrays: Mapping[str, Tensor], facts: str) -> str:
    return tensors_sha256(sorted(arrays.items()), head=facts)


def _write(path: Path, arrays: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    remove_leftovers(path.parent, _UNFINISHED)
    contents, described = {n: a.contiguous() for n, a in arrays.items()}, json.dumps(facts)
    try:
        with whole_file(path) as temporary:
            save_file(contents, str(temporary), {"facts": described, "sha256": _digest(contents, described)})
    except OSError as error:
        raise UserError(
            f"The cache file {path} cannot be written: {error.strerror or error}.\n"
            "Free some space there, or set the environment variable TRAINER_CACHE to another folder."
        ) from error
