"""Loggers beside TensorBoard: Weights & Biases, Comet, MLflow and CSV files.

They get the records of `metrics.jsonl`, and the config without what seems to be a secret. They get nothing else about
the machine. A thread writes to them, so that no step waits for a server. If a logger fails, the run goes on without it.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..config.loggers import CometOptions, CsvMonitorOptions, MlflowOptions, WandbOptions
from ..config.schema import flat


class About(NamedTuple):
    """What a logger knows of its run.

    Attributes:
        folder: the output folder.
        began_at_s: time.time() at which its first process began; with the folder, it names the run.
        config: as resolved, without secrets.
        after_step: the step from which it continues; 0 for a new run.
    """

    folder: Path
    began_at_s: float
    config: Mapping[str, Any]
    after_step: int = 0

    @property
    def key(self) -> str:
        """32 letters and digits that every process of this run, and no other run, has."""
        return hashlib.sha256(f"{self.folder.resolve()} {self.began_at_s}".encode()).hexdigest()[:32]


class Logger(Protocol):
    """Where records go. `place` is a line for the user: where they go, and whether anything leaves the machine."""

    place: str

    def write(self, record: Mapping[str, float], step: int) -> None:
        """Writes the scalars of a record by their TensorBoard names."""

    def close(self) -> None:
        """Waits until everything is written."""


class CsvFiles:
    """A file a scalar, as DeepSpeed's monitor writes them: `step`, and the last part of the name."""

    def __init__(self, options: CsvMonitorOptions, about: About) -> None:
        base = Path(options.output_path).expanduser() if options.output_path else about.folder / "csv_monitor"
        self._folder = base / options.job_name
        self._folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self._folder.glob("*.csv"))
        if files and not about.after_step:
            raise FileExistsError(f"{self._folder} has files of another run, such as {files[0].name}")
        for file in files:
            _cut(file, about.after_step)
        self.place = f"csv_monitor: files in {self._folder}"

    def write(self, record: Mapping[str, float], step: int) -> None:
        """Appends a row to the file of each scalar."""
        for name, value in record.items():
            file = self._folder / (re.sub(r"[/ ]", "_", name) + ".csv")
            new = not file.exists()
            with file.open("a", newline="", encoding="utf-8") as stream:
                rows = csv.writer(stream)
                if new:
                    rows.writerow(["step", name.rpartition("/")[2]])
                rows.writerow([step, value])

    def close(self) -> None:
        """Nothing is open."""


def _cut(file: Path, after_step: int) -> None:
    """Removes the rows of later steps, which the run makes again."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines[1:] if (step := line.partition(",")[0]).isdecimal() and int(step) <= after_step]
    file.write_text("".join(lines[:1] + kept), encoding="utf-8")


class Wandb:
    """Weights & Biases: scalars and the config. Not the code, the console, the git state or the machine."""

    def __init__(self, options: WandbOptions, about: About) -> None:
        import wandb

        mode = options.mode or os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
        offline = mode not in ("online", "shared")
        if not offline and not wandb.login(prompt=False):
            raise RuntimeError('it has no API key: run `wandb login`, or set "wandb.mode": "offline"')
        quiet = {"console": "off", "save_code": False, "disable_code": True, "disable_git": True}
        quiet |= {"x_disable_meta": True, "x_disable_stats": True, "x_disable_machine_info": True, "silent": True}
        quiet |= {"disable_job_creation": True, "x_save_requirements": False}
        self._run = wandb.init(
            project=options.project, group=options.group, entity=options.team, mode=mode, id=about.key,
            name=about.folder.name, dir=about.folder, config=dict(about.config), resume="allow",
            settings=wandb.Settings(**quiet),
        )  # fmt: skip
        # wandb's own counter of steps never goes back. Ours may: with records of two kinds, and in resumed runs.
        self._run.define_metric("*", step_metric="step")
        where = f"{mode}, in {about.folder / 'wandb'}: nothing leaves this machine"
        if not offline:
            where = f"{mode}: scalars and the config (without secrets) are sent to {self._run.url}"
        self.place = f"wandb: project {options.project}, {where}"

    def write(self, record: Mapping[str, float], step: int) -> None:
        """Hands a record to wandb's own process."""
        self._run.log({**record, "step": step})

    def close(self) -> None:
        """Waits for wandb's process."""
        self._run.finish()


class Comet:
    """Comet: scalars and the config. Not the code, the console, the git state or the machine."""

    def __init__(self, options: CometOptions, about: About) -> None:
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
        import comet_ml

        logging.getLogger("comet_ml").setLevel(logging.ERROR)
        online = options.online is not False
        if online and not (options.api_key or comet_ml.config.get_api_key(None, comet_ml.get_config())):
            raise RuntimeError('it has no API key: set COMET_API_KEY, or "comet.online": false')
        folder = about.folder / "comet"
        folder.mkdir(exist_ok=True)
        quiet = dict.fromkeys(("log_code", "log_graph", "parse_args", "log_git_metadata", "log_git_patch"), False)
        quiet |= dict.fromkeys(("log_env_details", "auto_output_logging", "auto_param_logging"), False)
        quiet |= dict.fromkeys(("auto_metric_logging", "auto_log_co2"), False)
        self._experiment: Any = comet_ml.start(
            api_key=options.api_key, project=options.project, workspace=options.workspace, online=online,
            mode=options.mode, experiment_key=options.experiment_key or about.key,
            experiment_config=comet_ml.ExperimentConfig(
                offline_directory=str(folder), display_summary_level=0,
                name=options.experiment_name or about.folder.name, **quiet,
            ),
        )  # fmt: skip
        self._experiment.log_parameters(flat(about.config))
        where = "scalars and the config (without secrets) are sent to Comet"
        self.place = f"comet: {where if online else f'offline, in {folder}: nothing leaves this machine'}"

    def write(self, record: Mapping[str, float], step: int) -> None:
        """Hands a record to Comet's own thread."""
        self._experiment.log_metrics(dict(record), step=step)

    def close(self) -> None:
        """Waits for Comet's thread."""
        self._experiment.end()


class Mlflow:
    """MLflow: scalars as metrics, the config as parameters."""

    def __init__(self, options: MlflowOptions, about: About) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = options.tracking_uri or str(about.folder / "mlflow")
        # Allows a folder as the store, unless the user has set this. MLflow 3 prefers a database, for which its small
        # package lacks the code.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self._metric, self._client = Metric, mlflow.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(options.experiment_name)
        number = self._client.create_experiment(options.experiment_name) if found is None else found.experiment_id
        tag = "strong-scaling-trainer.run"
        before = self._client.search_runs([number], f"tags.`{tag}` = '{about.key}'") if about.after_step else []
        if before:  # the run goes on; MLflow keeps every value that a step has had
            self._number = before[0].info.run_id
            self._client.update_run(self._number, "RUNNING")
        else:
            name = options.run_name or about.folder.name
            self._number = self._client.create_run(number, tags={tag: about.key}, run_name=name).info.run_id
            values = {re.sub(r"[^\w./ -]", "_", key): str(value)[:500] for key, value in flat(about.config).items()}
            params = [Param(key, value) for key, value in values.items()]
            for i in range(0, len(params), 100):  # MLflow's limit
                self._client.log_batch(self._number, params=params[i : i + 100])
        where = "scalars and the config (without secrets) are sent there" if "://" in uri else "on this machine"
        self.place = f"mlflow: {re.sub(r'(?<=://)[^/@]+@', '...@', uri)}, experiment {options.experiment_name}, {where}"

    def write(self, record: Mapping[str, float], step: int) -> None:
        """Writes a record, or sends it."""
        now_ms = time.time_ns() // 1_000_000
        metrics = [self._metric(name, value, now_ms, step) for name, value in record.items()]
        self._client.log_batch(self._number, metrics=metrics)

    def close(self) -> None:
        """Marks the run as ended."""
        self._client.set_terminated(self._number)


# Block of the config -> its logger.
KINDS: dict[str, Callable[[Any, About], Logger]] = {
    "wandb": Wandb, "comet": Comet, "csv_monitor": CsvFiles, "mlflow": Mlflow,
}  # fmt: skip
# How long the end of a run waits for servers, in seconds.
_END_S = 60.0


class Loggers:
    """The loggers that a config asks for. Rank 0.

    Args:
        blocks: name -> options, each with `enabled`.
        about: of the run.

    Attributes:
        places: where records go, in a line each.
    """

    def __init__(self, blocks: Mapping[str, Any], about: About) -> None:
        self._notes: list[str] = []
        self._loggers: dict[str, Logger] = {}
        self._queue: queue.SimpleQueue[tuple[Mapping[str, float], int] | None] = queue.SimpleQueue()
        for name, options in blocks.items():
            if options.enabled:
                with self._guarded(name):
                    self._loggers[name] = KINDS[name](options, about)
        self.places = [logger.place for logger in self._loggers.values()]
        self._thread = threading.Thread(target=self._work, daemon=True) if self._loggers else None
        if self._thread is not None:
            self._thread.start()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """If a logger fails, notes the error, and the logger is left out from then on."""
        try:
            yield
        except Exception as error:  # of any kind: these are packages of others, and servers
            self._loggers.pop(name, None)
            what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self._notes.append(f"note: {name} does not log this run: {what.rstrip('.')}. Nothing else is lost.")

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            for name, logger in list(self._loggers.items()):
                with self._guarded(name):
                    logger.write(*job)
        for name, logger in list(self._loggers.items()):
            with self._guarded(name):
                logger.close()

    def write(self, record: Mapping[str, float], step: int) -> None:
        """Hands a record to the thread of the loggers."""
        if self._thread is not None:
            self._queue.put((dict(record), step))

    def notes(self) -> list[str]:
        """Loggers that have failed since the last call, in a line each."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Waits for the loggers, but not for ever. Calling it again does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(_END_S)
            if thread.is_alive():
                self._notes.append(
                    f"note: loggers were not ready {_END_S:g} s after the run, so it ended without them."
                )
