"""The launcher that started this rank: a run stops when it is gone."""

from __future__ import annotations

import os
from pathlib import Path

_NAMES = (b"deepspeed", b"torchrun", b"torch.distributed.run")

_at_start: Launchers | None = None


class Launchers:
    """The launcher of this rank, and DeepSpeed's runner above it, as they are when this object is made.

    On SIGTERM, DeepSpeed's runner ends without ending its ranks. A process whose parent has ended gets another parent:
    that is how a lost launcher is noticed.
    """

    def __init__(self) -> None:
        self._chain: list[tuple[int, int]] = []  # (process, its parent)
        process = os.getpid()
        while len(self._chain) < 2:
            parent = _parent(process)
            if not any(name in _command(parent) for name in _NAMES):
                break
            self._chain.append((process, parent))
            process = parent

    def gone(self) -> bool:
        """Whether one of them has ended."""
        return any(_parent(process) != parent for process, parent in self._chain)


def remember_launchers() -> None:
    """Notes which process started this rank. Call it early, so that a launcher that ends soon is noticed, too."""
    global _at_start
    _at_start = Launchers()


def remembered_launchers() -> Launchers:
    """The launchers that `remember_launchers` noted, else the present ones."""
    return Launchers() if _at_start is None else _at_start


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _command(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""
