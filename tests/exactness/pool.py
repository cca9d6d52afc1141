"""Standing groups of ranks: a group joins once, and then makes run after run.

Starting four groups for each of a thousand cases would take most of the time. A rank that dies, hangs or fails in a
way that the others have not agreed on ends its group, which starts again for the next run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.connection
import os
import shutil
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.ranks import workers
from trainer.ranks.workers import worker_context

# How long ranks may take to end by themselves once one of them has failed.
GRACE_S = 5.0
# A process that has made so many runs is replaced: what libraries never free is freed then.
MOST_RUNS = 250


@dataclass
class Outcome:
    """How a run ended on one rank.

    Attributes:
        kind: "finished"; "error" for a message to the user; "traceback"; "died"; "hung".
        label, reasons: of a finished run: its exactness and what is against it.
        trace: of every step, tensor -> digest: losses, parameters, buffers, optimizer state.
        facts: of a finished run: what else has to be the same, such as metrics.
        message: of any other; error: the name of its class.
        agreed: whether all ranks raised the same error together.
    """

    kind: str
    label: str = ""
    reasons: list[str] = field(default_factory=list)
    trace: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    error: str = ""
    agreed: bool = True


def _make_run(ranks: Any, values: dict[str, Any], folder: str) -> Outcome:
    import random
    import traceback

    import numpy as np

    from trainer.config.keys import parse
    from trainer.errors import TrainerError
    from trainer.exact.hashes import digest
    from trainer.run.run import run

    # As in fresh processes: every rank has its own numbers, and every run others.
    random.seed(os.urandom(8))
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    trace: list[dict[str, str]] = []

    def watch(step: int, engine: Any, losses: Any) -> None:
        # The losses as text: it is exact, and it is what a person compares first.
        state = {name: digest(tensor) for name, tensor in engine.state().items()}
        trace.append({"loss": str(losses.tolist())} | state)

    try:
        config = parse(values)
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, output_dir=folder))
        summary = run(config, ranks, config_name="fuzz", started_at_s=time.time(), trace=watch)
    except TrainerError as error:
        return Outcome("error", trace=trace, message=str(error), error=type(error).__name__, agreed=error.agreed)
    except BaseException:
        return Outcome("traceback", trace=trace, message=traceback.format_exc())
    facts = {k: summary[k] for k in ("status", "steps", "metrics", "parameters_sha256", "model_sha256")}
    facts |= {k: summary[k] for k in ("best", "gradient_noise") if k in summary}
    return Outcome("finished", summary["exactness"], list(summary.get("inexact", [])), trace, facts)


def _rank_main(pipe: Any, ranks: Any, environment: dict[str, str], log: str) -> None:
    """Makes the runs that the pipe asks for until its other end is gone."""
    import gc

    from tqdm import tqdm

    os.setsid()  # Ctrl-C is for the parent
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore between processes that would be left behind
    jobs = workers.jobs_from(pipe)
    gc.freeze()  # the collection after each run looks at that run alone
    while True:
        outcome = _make_run(ranks, *jobs.get())
        pipe.send(outcome)
        gc.collect()  # engines refer to themselves
        gc.freeze()  # and at what it imported


class _Group:
    """The ranks of one world size."""

    def __init__(self, world_size: int, logs: Path) -> None:
        from trainer.ranks.place import Ranks

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

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes):
            process.kill()
            process.join()
            pipe.close()

    def last_words(self, rank: int) -> str:
        text = self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""
        return f"rank {rank} died (exit code {self.processes[rank].exitcode}): {text[-1500:]}"


class Pool:
    """Groups of ranks by world size, each started when it is first used. A context manager."""

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.restarts = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self._groups.values():
            group.close()
        self._groups.clear()
        shutil.rmtree(self._place, ignore_errors=True)

    def run(self, config: dict[str, Any], world_sizes: tuple[int, ...], limit_s: float) -> dict[int, list[Outcome]]:
        """Makes the run of a config at several world sizes, all at once.

        Args:
            config: JSON values without an output folder.
            world_sizes: of the runs.
            limit_s: after so long, ranks that have not answered count as hung.

        Returns:
            W -> outcomes by rank.
        """
        folder = Path(tempfile.mkdtemp(dir=self._place))
        waiting: dict[Any, tuple[int, int]] = {}
        outcomes: dict[int, dict[int, Outcome]] = {W: {} for W in world_sizes}
        for W in world_sizes:
            if W not in self._groups:
                self._groups[W] = _Group(W, self._place)
            group = self._groups[W]
            group.runs += 1
            for rank, pipe in enumerate(group.pipes):
                with contextlib.suppress(OSError):  # it is dead, which its pipe says below
                    pipe.send((config, str(folder / str(W))))
                waiting[pipe] = (W, rank)
        deadlines = dict.fromkeys(world_sizes, time.monotonic() + limit_s)
        while waiting:
            nearest_s = min(deadlines[W] for W, _ in waiting.values()) - time.monotonic()
            ready: list[Any] = multiprocessing.connection.wait(list(waiting), max(0.0, nearest_s))
            for pipe in ready:
                W, rank = waiting.pop(pipe)
                try:
                    outcomes[W][rank] = outcome = pipe.recv()
                except (EOFError, OSError):
                    self._groups[W].processes[rank].join(5)
                    outcomes[W][rank] = outcome = Outcome("died", message=self._groups[W].last_words(rank))
                if outcome.kind != "finished":
                    deadlines[W] = min(deadlines[W], time.monotonic() + GRACE_S)
            for pipe, (W, rank) in list(waiting.items()):
                if time.monotonic() >= deadlines[W]:
                    waiting.pop(pipe)
                    outcomes[W][rank] = Outcome("hung", message=f"rank {rank} of {W} did not answer")
        shutil.rmtree(folder, ignore_errors=True)
        result = {W: [of_W[rank] for rank in range(W)] for W, of_W in outcomes.items()}
        for W, ranks in result.items():
            self._settle(W, ranks)
        return result

    def _settle(self, W: int, ranks: list[Outcome]) -> None:
        """Ends a group whose ranks may not be where the others are, or that is old."""
        together = all(o.kind == "finished" for o in ranks) or all(o.kind == "error" and o.agreed for o in ranks)
        # An error that each rank found by itself, such as one of the config, comes before any rank waits for another.
        together |= all(o.kind == "error" and not o.trace for o in ranks) and len({o.message for o in ranks}) == 1
        # With one rank nothing can be out of step.
        if W == 1 and ranks[0].kind in ("finished", "error", "traceback"):
            together = True
        if not together or self._groups[W].runs >= MOST_RUNS:
            self.restarts += not together
            self._groups.pop(W).close()
