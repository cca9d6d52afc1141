"""Writes what is measured to files and the console. Only rank 0 writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from ..exact.progress import Progress
from ..exact.splits import Batch
from ..record.console import DeepSpeedLog, ProgressBar, say
from ..record.folder import OutputFolder
from ..record.loggers import About, Loggers
from ..record.made_by import commit, without_secrets, without_secrets_in
from ..record.pace import Pace, memory_gib
from ..record.window import Window
from ..record.writer import Writer
from ..tasks.protocol import Outputs
from .build import Pieces
from .evaluate import evaluate
from .predictions import write_predictions

# Called on rank 0 with what is recorded: "log" or "evaluation", and a copy of the line in metrics.jsonl.
Tell = Callable[[str, dict[str, Any]], None]


def tell_nobody(kind: str, record: dict[str, Any]) -> None:
    """For a run to which nobody listens."""


class Recorder:
    """The records of one run.

    Args:
        pieces: of the run.
        window: the steps since the last record.
        first_step: steps made before this process began. Records of later steps are written again.
        history: one entry for each process that has worked on this run, for the manifest.
        tell: called with every new record, after it is written.
    """

    def __init__(
        self,
        pieces: Pieces,
        window: Window,
        first_step: int,
        history: list[dict[str, Any]],
        tell: Tell = tell_nobody,
    ) -> None:
        self._pieces, self._window, self._first_step, self._history = pieces, window, first_step, history
        self._tell = tell if pieces.ranks.first else tell_nobody
        self._writer: Writer | None = None
        self._loggers: Loggers | None = None
        self._folder: OutputFolder | None = None
        self._pending: Callable[[], dict[str, float]] | None = None
        self._eval_s = self._checkpoint_s = 0.0
        self.progress = ProgressBar(pieces.total_steps, pieces.ranks.first, first_step)
        self.pace = Pace(pieces.total_steps - first_step)

    @property
    def lines(self) -> int:
        """Records in metrics.jsonl; 0 on ranks that write none."""
        return 0 if self._writer is None else self._writer.lines

    def open(self, folder: OutputFolder, log: DeepSpeedLog, records: int | None = None) -> None:
        """Begins the files, or continues those of an interrupted run. Rank 0.

        Args:
            folder: of the run.
            log: takes DeepSpeed's messages.
            records: lines of metrics.jsonl to keep; None for all up to the first step.
        """
        p = self._pieces
        self._folder = folder
        self.write_manifest(folder)  # first: it says that the folder is a run's
        folder.begin()
        log.open(folder.path / "logs" / "deepspeed.log")
        self._writer = Writer(folder.path, p.config.tensorboard.enabled, self._first_step, records)
        config = without_secrets(p.config.as_dict())
        self._writer.describe(
            {"config": f"```json\n{json.dumps(config, indent=2)}\n```", "exactness": p.exactness},
            {"run/world_size": p.plan.world_size, "run/global_batch_size": p.plan.global_batch_size},
            self._first_step,
        )

        blocks = {"wandb": p.config.wandb, "comet": p.config.comet}
        blocks |= {"csv_monitor": p.config.csv_monitor, "mlflow": p.config.mlflow}
        about = About(folder.path, self._history[0]["started_at_s"], config, self._first_step)
        self._loggers = Loggers(blocks, about)
        say(*self._loggers.places, *self._loggers.notes())

    def write_manifest(self, folder: OutputFolder) -> None:
        """Writes manifest.json. Rank 0."""
        code = commit()
        made_by = {"command": without_secrets_in(sys.argv), "commit": None if code is None else str(code)}
        folder.write_json("manifest.json", self._pieces.manifest() | made_by | {"history": self._history})

    def window(self, step: int, last: bool = False) -> None:
        """Ends the logging window. On a GPU it is read when the next one ends, so that the host need not wait."""
        closed = self._window.close(step, -(-step // self._pieces.steps_per_epoch))
        lagging = self._pieces.device.type == "cuda" and not last
        self._write_window(self._pending)
        if not lagging:
            self._write_window(closed)
        self._pending = closed if lagging else None
        if last:
            self.pace.stop()

    def flush(self) -> None:
        """Writes a window that is still pending: a checkpoint promises that everything up to its step is written."""
        self._write_window(self._pending)
        self._pending = None

    def _write_window(self, read: Callable[[], dict[str, float]] | None) -> None:
        if read is None:
            return
        times = {"throughput/eval_ms": self._eval_s * 1e3, "throughput/checkpoint_ms": self._checkpoint_s * 1e3}
        record = read() | times | memory_gib(self._pieces.device)
        self.progress.logged(record)
        self._write(record)
        self._tell("log", dict(record))

    def _write(self, record: dict[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(record)
        if self._loggers is not None:
            self._loggers.write({n: v for n, v in record.items() if n != "step"}, int(record["step"]))
            say(*self._loggers.notes())

    def checkpointed(self, seconds: float) -> None:
        """Notes the time that a checkpoint took from the run."""
        self._checkpoint_s = seconds

    def evaluate(self, name: str, step: int, quiet: bool = False) -> dict[str, float]:
        """Evaluates a split, and records the result unless `quiet`. Collective: every rank."""
        p = self._pieces
        pictures = getattr(p.task, "pictures", None)
        seen: list[tuple[Outputs, Batch]] = []

        def look(outputs: Outputs, arrays: Batch) -> None:
            if p.cut is not None and name == "test":
                seen.append((outputs, arrays))
            if pictures is not None and self._writer is not None:
                self._writer.draw({f"{name}/{n}": picture for n, picture in pictures(outputs, arrays).items()}, step)

        with self._window.pause():
            began_s = time.perf_counter()
            tick = self.progress.evaluating(name)
            metrics = evaluate(
                p.task,
                p.engine,
                p.splits[name],
                p.host_splits[name],
                p.ranks,
                p.config.trainer.evaluate_micro_batch_size,
                p.config.trainer.seed,
                Progress(step, step // p.steps_per_epoch, p.total_steps),
                look,
                tick,
            )
            if quiet:
                return metrics
            if p.cut is not None and seen and self._folder is not None:
                write_predictions(self._folder.path, p.task, p.cut, *seen[0], metrics)
            self._eval_s = time.perf_counter() - began_s
            record: dict[str, float] = {"step": step, "epoch": -(-step // p.steps_per_epoch)}
            record |= {f"eval/{name}/{metric}": value for metric, value in metrics.items()}
            self._write(record)
            self.progress.evaluated(step, name, metrics)
            self._tell("evaluation", {"split": name, **record})
            self.pace.pause(time.perf_counter() - began_s)
        return metrics

    def close(self) -> None:
        """Flushes the files."""
        self.end_loggers()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def end_loggers(self) -> None:
        """Waits until the loggers beside TensorBoard have written everything."""
        if self._loggers is not None:
            self._loggers.close()
            say(*self._loggers.notes())
