"""The launcher that started this rank: a run stops when it is gone."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path

_NAMES = (b"deepspeed", b"torchrun", b"torch.distributed.run")
# What starts the ranks of one machine, under mpirun and srun. (prted, orted and hydra are mpirun's on each machine.)
_OTHER_NAMES = (b"slurmstepd", b"mpirun", b"mpiexec", b"orted", b"prted", b"prterun", b"hydra_pmi_proxy")

_at_start: Launchers | None = None


class Launchers:
    """The launcher of this rank, and DeepSpeed's runner above it. They are looked up when this object is made.

    On SIGTERM, DeepSpeed's runner ends without ending its ranks. When a process ends, its children get another parent.
    So a changed parent shows that a launcher is gone.
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
        # The runner may have ended before this object was made. Then its launcher has another parent already.
        self._too_late = len(self._chain) == 1 and _needs_runner(_command(process))

    def gone(self) -> bool:
        """Whether one of them has ended."""
        return self._too_late or any(_parent(process) != parent for process, parent in self._chain)


def _needs_runner(command: bytes) -> bool:
    """Whether this is the command of a DeepSpeed launcher that the runner itself starts.

    It starts the launcher itself if the run is on this machine alone. On several machines something else does, such as
    ssh.
    """
    found = re.search(rb"deepspeed\.launcher\.launch\0(?:.*\0)?--world_info=([\w=-]+)", command, re.DOTALL)
    try:
        return found is not None and set(json.loads(base64.urlsafe_b64decode(found[1]))) == {"localhost"}
    except ValueError:
        return False


def remember_launchers() -> None:
    """Notes which process started this rank. Call it early: a launcher may end before the run has begun."""
    global _at_start
    _at_start = Launchers()


def remembered_launchers() -> Launchers:
    """The launchers that `remember_launchers` noted, else the present ones."""
    return Launchers() if _at_start is None else _at_start


def launcher() -> int | None:
    """The process that started all ranks of this machine; None if there is none, as of ranks started by hand.

    It need not be the parent: between them may be a script, or a program such as timeout.
    """
    process = os.getpid()
    while (process := _parent(process)) > 1:
        # The program and its first arguments, as in "python -u -m torch.distributed.run", but no script after bash -c.
        words = [word for word in _command(process).split(b"\0")[:4] if word.count(b" ") < 2]
        if any(name in word for word in words for name in (*_NAMES, *_OTHER_NAMES)):
            return process
    return None


def began(process: int) -> str:
    """When a process began; "" if there is none. The system reuses process numbers, but not with the same beginning."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


def launch_name() -> str:
    """A name that only the ranks of one start on this machine share: TRAINER_LAUNCH if it is set."""
    process = launcher() or os.getsid(0)
    return os.environ.get("TRAINER_LAUNCH") or f"{process}-{began(process)}-{os.environ.get('MASTER_PORT', '')}"


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
