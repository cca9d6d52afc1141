"""`evaluate` and `predict`: the metrics of a saved model, and its predictions for new data."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..config.keys import Config, parse
from ..config.schema import read_json
from ..errors import UserError
from ..exact.plan import steps_per_epoch
from ..ranks.place import Ranks
from .arguments import count_in, refuse_no_path, refuse_other_than
from .result import Result
from .saved import Saved, hosted_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..exact.progress import Progress
    from ..exact.splits import Split
    from ..tasks.protocol import Task

Device = Literal["auto", "cpu", "cuda"]


def evaluate(
    model: str | Path | Result,
    data: str | Mapping[str, Any] | Split = "test",
    *,
    task: str | type | None = None,
    device: Device = "auto",
) -> dict[str, float]:
    """Loss and metrics of a saved model: on the same kind of device what its run computed at its end, bit for bit.

    It runs in this process, and leaves it as it was.

    Args:
        model: a run's output folder, its `Result`, or a model's folder. The task, its options, the precision, the seed
            and `trainer.evaluate_micro_batch_size` come from the run. A model's folder without its run knows only its
            task: then the precision is float32, and 128 samples are computed at a time.
        data: a split of the task's own data ("train", "validation", "test"), or labelled data as the task's `splits`
            gives a split: name -> array or tensor (samples, ...), or an `exact.splits.Split`.
        task: for a model of your own task: path/to/file.py:ClassName, or the class. A run's folder does not need it if
            the task's file is unchanged.
        device: auto takes a GPU if there is one.

    Returns:
        {"loss": ..., and the task's metrics}. With LoRA or trainer.compile they agree with the run's only up to
        rounding: the saved model is the merged one, and it is not compiled here.

    Raises:
        UserError: there is no such model or split, its task's code must be named, or the data lacks an array.
    """
    refuse_other_than("device", device, get_args(Device))
    with hosted_model(model, task) as (found, _):
        config, progress = _of_the_run(found, device)
        return _evaluated(found, config, progress, data)


def predict(
    model: str | Path | Result,
    data: str | Path,
    *,
    task: str | type | None = None,
    batch_size: int = 32,
    device: Device = "auto",
) -> list[dict[str, Any]]:
    """Predictions of a saved model for new data: the rows that `python -m trainer predict` writes.

    It runs in this process, and leaves it as it was.

    Args:
        model, task, device: as of `evaluate`.
        data: a file, or a folder if the task takes one.
        batch_size: samples of one forward.

    Returns:
        A dictionary for each sample, in order: column -> value. `pandas.DataFrame(predict(...))` makes a table of them.

    Raises:
        UserError: there is no such model or file, or the task cannot predict.
    """
    refuse_other_than("device", device, get_args(Device))
    refuse_no_path("data", data, "the path of a file, or of a folder")
    path, batch_size = Path(data).expanduser(), count_in("batch_size", batch_size)
    if not path.exists():
        raise UserError(f"{data} does not exist (looked from {Path.cwd()}).")
    with hosted_model(model, task) as (found, _):
        import torch

        own, network = found.predictor(device)
        with torch.inference_mode():
            return list(own.predict(network, path, batch_size))  # type: ignore[attr-defined]


def _of_the_run(found: Saved, device: Device) -> tuple[Config, Progress]:
    """The config of a model's run, and the progress at its end; defaults for a model's folder without its run."""
    from ..exact.progress import Progress

    if found.run is None:
        values: dict[str, Any] = {"train_batch_size": 1, "tensorboard": {"enabled": False}}
        progress = Progress(1, 1, 1)
    else:
        manifest = read_json(found.run / "manifest.json")
        values, plan = manifest["config"], manifest["batch_plan"]
        total, done = manifest.get("total_steps", 0), 0
        with contextlib.suppress(OSError, ValueError, KeyError):  # a run that has not finished has no summary
            done = int(json.loads((found.run / "summary.json").read_text())["steps"])
        every = steps_per_epoch(manifest["samples"]["train"], plan["global_batch_size"], values["trainer"]["drop_last"])
        progress = Progress(done or total, (done or total) // every, max(total, 1))
    config = parse(values, str(found.folder))
    options = dataclasses.replace(config.trainer, device=device, ranks_per_gpu=1)
    options = dataclasses.replace(options, task=found.task_name, task_options=found.task_options)
    return dataclasses.replace(config, trainer=options), progress


@dataclasses.dataclass
class BareEngine:
    """A model without an optimizer, as `run.evaluate` sees an engine."""

    forward_module: nn.Module
    device: torch.device
    low_precision: bool
    compiled: bool = False
    zero_stage: int = 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision context of forward and loss."""
        import torch

        return (
            torch.autocast(self.device.type, dtype=torch.bfloat16) if self.low_precision else contextlib.nullcontext()
        )


def untrained_metrics(task: Task, config: Config, split: Split, device: torch.device) -> dict[str, float]:
    """The metrics of an untrained model. They tell the names of the metrics, and that the task can be evaluated.

    Args:
        task: loaded.
        config: of a run of this task.
        split: on the CPU.
        device: where to compute.

    Raises:
        UserError: the task's model or metrics cannot be used.
    """
    from ..exact.order import key, seed_generators
    from ..exact.progress import Progress
    from ..run.build import built_model
    from ..run.evaluate import evaluate as evaluated

    seed_generators(key(config.trainer.seed, "model"), device)
    engine = BareEngine(built_model(task, config).to(device), device, config.torch_autocast.enabled)
    size, seed = config.trainer.evaluate_micro_batch_size, config.trainer.seed
    return evaluated(task, engine, split.to(device), split, Ranks(), size, seed, Progress(1, 1, 1))


def _evaluated(found: Saved, config: Config, progress: Progress, data: object) -> dict[str, float]:
    from ..engine import device as devices
    from ..exact.order import key, seed_generators, seed_python
    from ..exact.splits import as_split
    from ..run.build import splits_of
    from ..run.evaluate import evaluate as evaluated

    device, _ = devices.choose(config, Ranks())
    devices.settle(config)
    seed_python(key(config.trainer.seed, "task"))
    task: Task = found.task()
    if isinstance(data, str):
        splits = splits_of(task, config)
        if data not in splits:
            raise UserError(f'The task {found.task_name} has no split "{data}". It has: {", ".join(splits)}.')
        split = splits[data]
    else:
        split = as_split(data, "data", type(task).__name__)
    seed_generators(key(config.trainer.seed, "model"), device)
    model = found.model(task).to(device)
    engine = BareEngine(model, device, config.torch_autocast.enabled)
    size, seed = config.trainer.evaluate_micro_batch_size, config.trainer.seed
    try:
        metrics = evaluated(task, engine, split.to(device), split, Ranks(), size, seed, progress)
    except KeyError as error:
        if isinstance(data, str) or any(error.args[:1] == (name,) for name in split.arrays):
            raise
        function = traceback.extract_tb(error.__traceback__)[-1].name
        raise UserError(
            f"{function}() of the task {found.task_name} has raised KeyError: {error}. "
            f"The given data has only the arrays {', '.join(split.arrays)}."
        ) from error
    model.eval()
    return metrics
