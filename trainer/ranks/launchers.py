"""The launcher that started this rank: a run stops when it is gone."""

from __future__ import annotations

import os
from pathlib import Path

_NAMES = (b"deepspeed", b"torchrun", b"torch.distributed.run")

_at_start: Launchers | None = None


class Launchers:
    """The launcher of this rank, and DeepSpeed's runner above it, as they are now.

    DeepSpeed's runner forgets its ranks on SIGTERM. A process that has lost its parent gets another one.
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
    """Notes who started this rank. Called early: a launcher that ends before the first step shall be missed, too."""
    global _at_start
    _at_start = Launchers()


def remembered_launchers() -> Launchers:
    """Those that were noted, else those of now."""
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
