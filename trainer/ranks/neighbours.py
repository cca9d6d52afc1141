"""The ranks whose processes this rank can see: those of its machine, or of its container. It sees at once if one ends.

A rank that leaves by itself says so before its process ends. If a process ends without this, it was killed or crashed.
"""

from __future__ import annotations

import contextlib
import os
import select
import uuid
from pathlib import Path

from .collectives import gather_objects
from .place import Ranks

_HERE, _LEFT = b"\0", b"\1"  # the first byte of a rank's file
_SPOKEN = b"\1"  # the second, once it has reported a lost rank


class Neighbours:
    """Watches the processes of the ranks that are near. Collective: every rank makes one.

    Each rank has a file in memory that holds two bytes: whether it has left by itself, and whether it has told the user
    that a rank is lost. The others open the file through /proc. It outlives the rank while another rank has it open.

    Some processes cannot be seen: on another machine, in another container, without Linux or on an old one. They are
    not watched. Only their silence shows that they are gone.

    Args:
        ranks: this rank, and how many.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._seen: dict[int, tuple[int, int]] = {}  # rank -> descriptors of its process and of its file
        self._processes: dict[int, int] = {}  # rank -> the number of its process
        self._own: int | None = None
        name = f"rank-{uuid.uuid4().hex}"
        if ranks.world_size > 1:
            with contextlib.suppress(OSError, AttributeError):  # Python lacks it where it was built for an old system
                self._own = os.memfd_create(name)
                os.write(self._own, _HERE + b"\0")
        for rank, (process, file, name_of_file) in enumerate(gather_objects((os.getpid(), self._own, name))):
            if rank != ranks.rank and file is not None:
                with contextlib.suppress(OSError, AttributeError):
                    self._seen[rank] = _opened(process, file, name_of_file)
                    self._processes[rank] = process

    def running(self) -> list[int]:
        """The descriptors of the processes that have not ended: each can be polled for its end."""
        ended = self._ended()
        return [process for process, _ in self._seen.values() if process not in ended]

    def killed(self) -> list[int]:
        """The ranks whose process has ended, but that have not said that they leave."""
        ended = self._ended()
        # Read after the process has ended. So nothing that it has written can be missed.
        return [r for r, (process, file) in self._seen.items() if process in ended and os.pread(file, 1, 0) == _HERE]

    def stopped(self) -> list[int]:
        """The ranks whose process is stopped: by SIGSTOP, a job's suspension, or a debugger."""
        return [rank for rank, process in self._processes.items() if _state(process) in ("T", "t")]

    def _ended(self) -> set[int]:
        poll = select.poll()
        for process, _ in self._seen.values():
            poll.register(process, select.POLLIN)
        return {process for process, _ in poll.poll(0)}

    def leave(self) -> None:
        """Says that this rank leaves by itself. So the others do not take the end of its process for a loss."""
        if self._own is not None:
            os.pwrite(self._own, _LEFT, 0)

    def speak(self) -> None:
        """Says that this rank reports a lost rank to the user."""
        if self._own is not None:
            os.pwrite(self._own, _SPOKEN, 1)

    def spoken(self) -> bool:
        """Whether one of the others has reported a lost rank, even if its process has ended since."""
        return any(os.pread(file, 1, 1) == _SPOKEN for _, file in self._seen.values())

    def close(self) -> None:
        """Stops watching."""
        for descriptors in self._seen.values():
            for descriptor in descriptors:
                os.close(descriptor)
        self._seen.clear()
        self._processes.clear()
        if self._own is not None:
            os.close(self._own)
            self._own = None


def _state(process: int) -> str:
    """The letter for what a process is doing, as ps shows it; empty if there is none."""
    try:
        # The name in parentheses may hold anything.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _opened(process: int, file: int, name: str) -> tuple[int, int]:
    """Descriptors of a process and of its file in memory. Raises OSError if it is not the process of that file.

    Each container numbers its processes anew, so the number may belong to another process here. The name of the file
    shows whether it is the right one.
    """
    watched = os.pidfd_open(process)
    try:
        path = f"/proc/{process}/fd/{file}"
        if os.readlink(path) != f"/memfd:{name} (deleted)":
            raise ProcessLookupError(process)
        return watched, os.open(path, os.O_RDONLY)
    except OSError:
        os.close(watched)
        raise
