"""Long-lived processes that make one run after the other. So a study pays for imports once per process."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing.connection
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..errors import NonFiniteError, TrainerError
from ..ranks.place import Ranks
from ..ranks.workers import WorkerError, jobs_from, worker_context


def _slot_main(pipe: multiprocessing.connection.Connection, slot: int) -> None:
    """The main function of a process: does jobs from a pipe. It ends when the other end closes, even in a run."""
    import gc
    import traceback

    from tqdm import tqdm

    # Out of the terminal's group: Ctrl-C reaches the study alone, which then ends its slots.
    os.setsid()
    # tqdm's own lock is a semaphore between processes. It would be left behind when this process is killed.
    tqdm.set_lock(threading.RLock())
    jobs = jobs_from(pipe)
    # Imported objects stay for ever. Frozen, they are skipped by the garbage collection after each run.
    gc.freeze()

    def ask(question: Any) -> Any:
        pipe.send(("asks", question))
        (answer,) = jobs.get()
        return answer

    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        while True:
            kind, *arguments = jobs.get()
            answer: tuple[str, Any]
            try:
                job = {"probe": _probe, "run": _run}.get(kind, kind)
                if callable(kind):
                    arguments.append(ask)
                answer = ("done", job(Ranks(0, 1, slot, 1), *arguments))
            except TrainerError as error:
                answer = ("error", str(error))
            except BaseException:
                answer = ("traceback", traceback.format_exc())
            pipe.send(answer)


def _probe(ranks: Ranks, config: Config) -> dict[str, Any]:
    """What a plan needs to know about the data, and what results say about the machine."""
    from ..engine import deepspeed_engine as engine
    from ..engine import device as devices
    from ..engine.optimizers import check_optimizer
    from ..exact.splits import as_splits
    from ..run.build import chosen_samples
    from ..tasks.own_code import task_code_sha256
    from ..tasks.protocol import load_task

    device, _ = devices.choose(config, ranks)
    devices.settle(config)
    check_optimizer(config)
    task = load_task(config.trainer.task, config.trainer.task_options)
    splits = as_splits(task.splits(), type(task).__name__)
    splits["train"] = chosen_samples(splits["train"], config.trainer.train_samples)
    return {
        "samples": {name: len(split) for name, split in splits.items()},
        "data_sha256": {name: split.data_hash() for name, split in splits.items()},
        "facts": devices.facts(device, engine.VERSION),
        "task_code_sha256": task_code_sha256(task, config.trainer.task),
    }


def _run(ranks: Ranks, config: Config, folder: str) -> dict[str, Any]:
    """Makes one run, in a folder that is removed afterwards. Returns its summary, also if it stopped being finite."""
    import gc

    from ..run.run import run

    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, output_dir=folder))
    began_at_s, began_s = time.time(), time.monotonic()
    try:
        summary = run(config, ranks, config_name="study", started_at_s=began_at_s, began_s=began_s)
    except NonFiniteError as error:
        summary = {"status": "not finite", "steps": error.good_steps, "metrics": {}, "reason": str(error)}
        summary |= {"started_at_s": began_at_s, "wall_time_s": time.monotonic() - began_s}
    finally:
        curves, code = _curves(Path(folder) / "metrics.jsonl"), _code(Path(folder) / "manifest.json")
        shutil.rmtree(folder, ignore_errors=True)
        gc.collect()  # an engine refers to itself, so without this it would stay in memory during the next run
    return summary | {"curves": curves, "task_code_sha256": code}


# The curves of a run's log that a study keeps, besides those of validation.
_KEPT = ("train/loss", "train/learning_rate", "noise/trace", "noise/gradient_squared")


def _curves(file: Path) -> dict[str, dict[str, list[float]]]:
    """Name -> {"step", "value"} of a run's log, as far as the run came."""
    curves: dict[str, dict[str, list[float]]] = {}
    if not file.exists():
        return curves
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if (name in _KEPT or name.startswith("eval/validation/")) and value is not None:
                curve = curves.setdefault(name, {"step": [], "value": []})
                curve["step"].append(record["step"])
                curve["value"].append(value)
    return curves


def _code(file: Path) -> str | None:
    """The hash of the code of a user's task that a run has used; None without any. Each run loads the code anew."""
    if not file.exists():
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))["facts"]
    return None if facts.get("task_code_sha256") is None else str(facts["task_code_sha256"])


class Slots:
    """Processes that make runs. Each makes one at a time, and they share nothing."""

    def __init__(self, cuda: bool) -> None:
        self._context, self._cuda = worker_context(cuda), cuda
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def grow(self, count: int) -> None:
        """Starts processes until there are `count`."""
        for slot in range(len(self._pipes), count):
            pipe, process = self._start(slot)
            self._pipes.append(pipe)
            self._processes.append(process)

    def _start(self, slot: int) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_slot_main, args=(theirs, slot), daemon=True)  # type: ignore[attr-defined]
        process.start()
        theirs.close()  # else the end of the process would not close the pipe, and `wait` would never notice
        return ours, process

    def renew(self, slot: int) -> None:
        """Ends a slot's process, if it has not died already, and starts another one in its place."""
        self._processes[slot].kill()
        self._processes[slot].join()
        self._pipes[slot].close()
        self._pipes[slot], self._processes[slot] = self._start(slot)

    def send(self, slot: int, *job: Any) -> None:
        """Gives an idle slot something to do, or gives a slot that asks its answer.

        Args:
            slot: its number.
            job: "probe" or "run" with what they take; or a function that is importable by name, with its arguments. It
                is called with the slot's `Ranks`, the arguments, and `ask`. If it calls `ask`, `wait` gives (slot,
                "asks", value), and what is sent to the slot then is what `ask` returns.
        """
        try:
            self._pipes[slot].send(job)
        except OSError:
            raise self._died(slot) from None

    def wait(
        self, busy: Sequence[int], timeout_s: float | None = None, *, survive: bool = False
    ) -> Iterator[tuple[int, str, Any]]:
        """Waits for busy slots. Gives (slot, "done", "asks", "error" or "traceback", value) of those with an answer.

        Args:
            busy: the slots.
            timeout_s: how long at most; None for as long as it takes.
            survive: if a slot's process has died, give (slot, "died", why). Without it, raise WorkerError.

        Raises:
            WorkerError: a process has died, and `survive` is not set.
        """
        for pipe in multiprocessing.connection.wait([self._pipes[slot] for slot in busy], timeout_s):
            slot = self._pipes.index(pipe)
            try:
                kind, value = self._pipes[slot].recv()
            except (EOFError, OSError):
                if not survive:
                    raise self._died(slot) from None
                kind, value = "died", str(self._died(slot))
            yield slot, kind, value

    def _died(self, slot: int) -> WorkerError:
        self._processes[slot].join(5)
        return WorkerError(f"a process that makes runs died (exit code {self._processes[slot].exitcode})")

    def close(self) -> None:
        """Ends all processes at once, even inside a run."""
        for process, pipe in zip(self._processes, self._pipes):
            process.kill()
            process.join()
            pipe.close()
        self._processes, self._pipes = [], []
