"""Standing groups of ranks: a group joins once, and then makes run after run.

Starting processes and a process group for each run would take most of a short run's time. `run_ranks` here takes the
place of `trainer.ranks.workers.run_ranks` where what runs leaves nothing behind in its process: no replaced
functions, no environment of its own, no user task that keeps state in its module. A group of which a rank fails alone,
dies or hangs is ended, and starts again for the next run.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing.connection
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.errors import BY_EXIT_CODE, TrainerError
from trainer.ranks import workers
from trainer.ranks.place import Ranks
from trainer.ranks.workers import WorkerError, jobs_from, worker_context

# How long ranks may take to end by themselves once one of them has failed.
GRACE_S = 5.0
# A process that has made so many runs is replaced: what libraries never free is freed then.
MOST_RUNS = 250


def _rank_main(pipe: Any, ranks: Ranks, environment: dict[str, str], log: str) -> None:
    """Makes the calls that the pipe asks for until its other end is gone."""
    import gc
    import random
    import traceback

    import numpy as np
    from tqdm import tqdm

    os.setsid()  # Ctrl-C is for the parent
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes that would be left behind
    jobs = jobs_from(pipe)
    gc.freeze()  # the collection after each run looks at that run alone
    while True:
        function, arguments = jobs.get()
        # As in fresh processes: every rank has its own numbers, and every run others.
        random.seed(os.urandom(8))
        np.random.seed(int.from_bytes(os.urandom(4), "little"))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer: tuple[str, Any] = ("result", function(ranks, *arguments))
        except TrainerError as error:
            answer = ("error", (error.exit_code, str(error), error.speaks, error.agreed))
        except BaseException:
            answer = ("traceback", traceback.format_exc())
        pipe.send(answer)
        gc.collect()  # engines refer to themselves
        gc.freeze()  # and at what it imported


class Group:
    """The ranks of one world size."""

    def __init__(self, world_size: int, logs: Path) -> None:
        context: Any = worker_context(False)
        self.runs = 0
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        self.logs = [logs / f"W{world_size}-rank{rank}.log" for rank in range(world_size)]
        environment = {"TRAINER_LAUNCH": uuid.uuid4().hex}
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, Ranks(rank, world_size, rank, world_size), environment, str(self.logs[rank]))
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has every rank call `function(ranks, *arguments)`; each answers on its pipe with (kind, value)."""
        self.runs += 1
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # the rank is dead, which its pipe says
                pipe.send((function, arguments))

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes):
            process.kill()
            process.join()
            pipe.close()

    def last_words(self, rank: int) -> str:
        self.processes[rank].join(5)
        text = self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""
        return f"rank {rank} died (exit code {self.processes[rank].exitcode}): {text[-1500:]}"


def fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that leaves something behind in its process, such as a replaced function."""
    function.is_fresh = True  # type: ignore[attr-defined]
    return function


_groups: dict[int, Group] = {}
_logs: list[Path] = []


def _end() -> None:
    for group in _groups.values():
        group.close()
    _groups.clear()
    for folder in _logs:
        shutil.rmtree(folder, ignore_errors=True)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    environment: dict[str, str] | None = None,
    timeout_s: float = 300.0,
) -> list[Any]:
    """As `trainer.ranks.workers.run_ranks`, in ranks that stand ready. One caller at a time.

    A function that is marked `fresh`, or that needs an environment, gets processes of its own.
    """
    if environment is not None or getattr(function, "is_fresh", False):
        return workers.run_ranks(function, world_size, *arguments, environment=environment, timeout_s=timeout_s)
    if not _logs:
        _logs.append(Path(tempfile.mkdtemp(prefix="standing-")))
        atexit.register(_end)
    if world_size not in _groups:
        _groups[world_size] = Group(world_size, _logs[0])
    group = _groups[world_size]
    group.ask(function, *arguments)
    answers = _answers(group, timeout_s)
    kinds = {kind for kind, _ in answers.values()}
    agreed = kinds == {"error"} and all(value[3] or world_size == 1 for _, value in answers.values())
    if not (kinds == {"result"} or agreed) or group.runs >= MOST_RUNS:
        _groups.pop(world_size).close()
    if kinds == {"result"}:
        return [answers[rank][1] for rank in range(world_size)]
    # Who speaks for all, else the lowest rank that did not leave because of another.
    errors = {rank: value for rank, (kind, value) in answers.items() if kind == "error"}
    others = [f"rank {rank}: {value}" for rank, (kind, value) in answers.items() if kind not in ("result", "error")]
    if others:
        raise WorkerError("\n".join(others))
    silence = {True: 0, None: 1, False: 2}
    code, message, speaks, _ = errors[min(errors, key=lambda rank: (silence[errors[rank][2]], rank))]
    known = BY_EXIT_CODE.get(code, TrainerError)(message, agreed=True)
    known.speaks = speaks
    raise known


def _answers(group: Group, timeout_s: float) -> dict[int, tuple[str, Any]]:
    """What each rank answered: ("result", value), ("error", ...), ("traceback", text), ("died", text), ("hung", "")."""
    answers: dict[int, tuple[str, Any]] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(group.pipes)}
    deadline_s = time.monotonic() + timeout_s
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline_s - time.monotonic()))
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                answers[rank] = pipe.recv()  # type: ignore[union-attr]
            except (EOFError, OSError):
                answers[rank] = ("died", group.last_words(rank))
            if answers[rank][0] != "result":
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        if not ready:
            answers |= dict.fromkeys(waiting.values(), ("hung", "it did not answer"))
            break
    return answers
