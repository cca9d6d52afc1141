"""Writes what is measured to files and the console. Only rank 0 writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..engine.peak import peak_tflops_per_s, precision
from ..exact.progress import Progress
from ..exact.splits import Batch
from ..record.console import DeepSpeedLog, ProgressBar, say
from ..record.folder import OutputFolder
from ..record.hparams import settings
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


def peak_of(p: Pieces) -> float | None:
    """The peak of all devices of a run together, in TFLOP/s; None if it is not known."""
    if p.device.type != "cuda" or not p.alike:
        return None
    one = peak_tflops_per_s(str(p.facts["device_model"]), precision(p.config, p.device.type))
    devices = p.plan.world_size if p.config.trainer.ranks_per_gpu == 1 else len(set(p.hosts))
    return None if one is None else one * devices


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
        time_s: seconds of training that processes before this one have made, up to the first step.

    Attributes:
        peak_tflops_per_s: of all devices together; None if it is not known.
    """

    def __init__(
        self,
        pieces: Pieces,
        window: Window,
        first_step: int,
        history: list[dict[str, Any]],
        tell: Tell = tell_nobody,
        time_s: float = 0.0,
    ) -> None:
        self._pieces, self._window, self._first_step, self._history = pieces, window, first_step, history
        self._tell = tell if pieces.ranks.first else tell_nobody
        self._writer: Writer | None = None
        self._loggers: Loggers | None = None
        self._folder: OutputFolder | None = None
        self._pending: Callable[[], dict[str, float]] | None = None
        self._eval_s = self._checkpoint_s = 0.0
        self._time_before_s, self._began_s = time_s, time.monotonic()
        self.peak_tflops_per_s = peak_of(pieces)
        self.progress = ProgressBar(pieces.total_steps, pieces.ranks.first, first_step)
        self.pace = Pace(pieces.total_steps - first_step)

    def begin(self) -> None:
        """Starts the clock of the training, and the progress bar."""
        self._began_s = time.monotonic()
        self.progress.begin()

    @property
    def time_s(self) -> float:
        """Seconds of training so far: from the first step on, with evaluations and checkpoints.

        The start of a process (imports, data, rehearsal) does not count, nor does the time between two processes, nor
        steps that were lost with an interrupted process. On a GPU, steps are issued a little before they are computed.
        """
        return round(self._time_before_s + time.monotonic() - self._began_s, 3)

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
        self.write_manifest(folder)  # first, because the manifest marks the folder as a run's
        folder.begin()
        log.open(folder.path / "logs" / "deepspeed.log")
        self._writer = Writer(folder.path, p.config.tensorboard.enabled, self._first_step, records)
        config = without_secrets(p.config.as_dict())
        self._writer.describe(
            {"config": f"```json\n{json.dumps(config, indent=2)}\n```", "exactness": p.exactness},
            {"run/world_size": p.plan.world_size, "run/global_batch_size": p.plan.global_batch_size},
            self._first_step,
        )

        shown = settings(config) | {"world_size": p.plan.world_size, "precision": precision(p.config, p.device.type)}
        shown |= {"global_batch_size": p.plan.global_batch_size, "micro_batch_size": p.plan.micro_batch_size}
        tokens, mfu = p.host_splits["train"].lengths is not None, self.peak_tflops_per_s is not None
        self._writer.arrange(tokens=tokens, mfu=mfu, step=self._first_step)
        self._writer.set_row(shown, self._history[0]["started_at_s"])

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
        """Ends the logging window. On a GPU it is read when the next one ends: so the host need not wait."""
        closed = self._stamped(self._window.close(step, -(-step // self._pieces.steps_per_epoch)))
        lagging = self._pieces.device.type == "cuda" and not last
        self._write_window(self._pending)
        if not lagging:
            self._write_window(closed)
        self._pending = closed if lagging else None
        if last:
            self.pace.stop()

    def _stamped(self, read: Callable[[], dict[str, float]] | None) -> Callable[[], dict[str, float]] | None:
        """A window's record with the time at which the window has ended, which is now."""
        if read is None:
            return None
        time_s, own = self.time_s, read

        def stamped() -> dict[str, float]:
            record = own()
            tflops = record.get("throughput/model_tflops_per_s")
            if tflops is not None and self.peak_tflops_per_s is not None:
                record["throughput/mfu"] = tflops / self.peak_tflops_per_s
            return {"step": record["step"], "epoch": record["epoch"], "time_s": time_s} | record

        return stamped

    def flush(self) -> None:
        """Writes a window that is still pending. Before a checkpoint, everything up to its step must be written."""
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
            record: dict[str, float] = {"step": step, "epoch": -(-step // p.steps_per_epoch), "time_s": self.time_s}
            record |= {f"eval/{name}/{metric}": value for metric, value in metrics.items()}
            self._write(record)
            self.progress.evaluated(step, name, metrics)
            self._tell("evaluation", {"split": name, **record})
            self.pace.pause(time.perf_counter() - began_s)
        return metrics

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation of the whole run: the operations per second, as a fraction of the devices' peak.

        Chowdhery et al. (2022, arXiv 2204.02311), appendix B. None if one of the two is not known.
        """
        done, peak = self.pace.model_tflops_per_s, self.peak_tflops_per_s
        return None if done is None or peak is None else done / peak

    def conclude(self, results: Mapping[str, float], step: int) -> None:
        """Writes a run's results, by name, where TensorBoard compares runs."""
        if self._writer is not None:
            self._writer.end_row(results, time.time(), step)

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
