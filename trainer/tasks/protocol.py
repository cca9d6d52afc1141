"""What a task is, and how it is found: a name in this folder, `path/to/file.py:ClassName`, or a class in `given`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..config.schema import near
from ..config.task_options import check_options, read_arguments
from ..errors import UserError
from ..exact.splits import Batch, Split
from .first_look import BUILT_IN, task_file
from .given import find

Outputs = Any  # a tensor, or a dictionary of them; whatever `loss` and `metrics` of the same task take


class Task(Protocol):
    """What the trainer asks of a task. A user's class has the same methods and inherits from nothing.

    It is built as `MyTask(**trainer.task_options)`, once on every rank; then `splits` is called, then `model`.
    A class may have more:

    - `augment(self, batch, random) -> batch`, for training only: called with one micro-batch. `random` is an
      `exact.order.SampleRandom`, whose draws belong to a sample and an epoch; torch's generators are seeded for the
      micro-batch.
    - `augment_in_chunks = True`: `augment` may be called with several micro-batches at once, which is faster. It must
      treat each sample on its own, and only move values, or add, multiply or divide them: other operations may give
      an element other bits in a tensor of another size. The rehearsal checks this.
    - `sample_losses(self, outputs, batch) -> Tensor`: (samples,) the loss of each sample, whose `.sum()` is what `loss`
      returns. With it the losses of a pack (`trainer.pack`) are computed in one call, which is faster.
    - `forward`, `loss`, `sample_losses` and `augment` may take a keyword `progress`, an `exact.progress.Progress`
      (step, epoch, total_steps, fraction), the same on every rank: for annealing, where a counter of calls would depend
      on the rank.
    - `splits` may take a keyword `cut`, a `data.cut.Cut`, which is None in an ordinary run. A task needs it if it
      computes anything from its training samples (a mean, a vocabulary). In a fold of a cross-validation, it calls
      `cut(count, labels, groups)` with all its samples and gets the rows of train, validation and test. It prepares
      its data by those of train. The splits of a task without `cut` are put together and cut as they are.
    - `predictions(self, outputs, batch) -> Mapping[str, Sequence]`: column -> one plain value a sample of a whole
      split, for the predictions.csv of a fold: the columns target and prediction, and others.
    - `notes`: sentences for the person who starts the run (duplicates, truncated texts, ...), a list that
      `splits` and `model` fill; they are printed once, before the first step.
    - `data_lines`: what was read (rows, what is left out, classes, the first sample), a list of lines that `splits`
      fills. They are printed before the notes. Without it, the trainer prints the shapes of the arrays, their classes
      and the first sample.
    - `best_metric`: ("accuracy", "max") or ("loss", "min"), ...: the metric on validation that chooses the
      best model; without it the loss.
    - `why_without(self, name, batch) -> str`: why `metrics` leaves a metric out for a whole split, as the end of a
      sentence; an empty text if the task does not know. For the message about `trainer.best.metric`.
    - `pipeline_tag`: what the model does, as model hubs call it ("text-classification", ...), for the model card.
    - `random_weights`: whether `model` returns a model without pretrained weights: then a note says that frozen weights
      stay random.
    - `save(self, model, folder) -> None`: writes the trained model in its library's own format, into an empty folder
      that exists; on rank 0. Without it, `model.safetensors` holds its parameters and buffers.
    - `load(self, folder) -> nn.Module`: the model that `save` wrote, in a process that never calls `splits`. Without
      it, `model()` with the contents of `model.safetensors`.
    - `predict(self, model, source, batch_size) -> Iterator[dict]`: for `python -m trainer predict`: one dictionary of
      plain values (column -> value) for each sample of a file or folder, in order. The model is in
      evaluation mode on its device.
    - `predict_files(self, model, source, batch_size, folder) -> Iterator[dict]`: as `predict`, and writes a file for
      each sample (a mask, ...) into the folder; for `predict --output` with the name of a folder.
    - `pictures(self, outputs, batch) -> Mapping[str, Tensor]`: name -> (C, H, W) uint8 for TensorBoard, from the
      outputs of a whole split, after each validation; on the CPU, on rank 0.
    """

    def splits(self) -> Mapping[str, Split | Mapping[str, Any]]:
        """{"train": ..., "validation": ..., "test": ...}: each name -> (samples, ...) arrays, or a Split.

        The last two may be left out. Called on every rank, so it must give the same data everywhere.
        """
        ...

    def model(self) -> nn.Module:
        """A new model. torch's generators are seeded before the call, so initial weights follow the seed."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """The model's outputs for one micro-batch: a tensor (B, ...), or a dictionary of such."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, float | int | Tensor]:
        """The **summed** loss of one micro-batch (a scalar tensor) and its count (samples, or valid tokens).

        The trainer divides by the count of the whole global batch. So the result is exact for any cut into
        micro-batches. With a mean instead of a sum it could not be.
        """
        ...

    def metrics(self, outputs: Outputs, batch: Batch) -> Mapping[str, float]:
        """Metrics of a whole split, from the outputs of all its samples in order; on the CPU, on rank 0."""
        ...


_METHODS = ("splits", "model", "forward", "loss", "metrics")


def load_task(name: str, options: Mapping[str, Any]) -> Task:
    """Builds the task that `trainer.task` and `trainer.task_options` describe.

    Raises:
        UserError: there is no such task, file or class, it lacks a method, or an option is unknown.
    """
    cls = find(name) or (_from_file(name) if ":" in name or name.endswith(".py") else _from_folder(name))
    if not isinstance(cls, type):
        raise UserError(f"The task {name} is not a class, but a {type(cls).__name__}.")
    missing = [method for method in _METHODS if not callable(getattr(cls, method, None))]
    if missing:
        raise UserError(
            f"The task {name} lacks {', '.join(m + '()' for m in missing)}. A task has: {', '.join(_METHODS)}."
        )
    signature = inspect.signature(cls)
    known = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())
    declared = getattr(cls, "Options", None) if open_ended else None
    if not (inspect.isclass(declared) and dataclasses.is_dataclass(declared)):
        declared = None
    else:  # as in the ready tasks, see `config.task_options`
        known, open_ended = [field.name for field in dataclasses.fields(declared) if field.init], False
    for option in options:
        if option not in known and not open_ended:
            raise UserError(f'unknown key "trainer.task_options.{option}" for the task {name}. {near(option, known)}')
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UserError(
                f"The task {name} takes {parameter.name} only by position, but options are given by name. Let it be "
                "taken by name, too."
            )
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and parameter.name not in options:
            raise UserError(f'"trainer.task_options.{parameter.name}" is missing: the task {name} needs it.')
    if declared is not None:
        check_options(declared, options)
    arguments = read_arguments(cls, options)
    try:
        task: Task = cls(**arguments)
    except ValueError as error:
        if isinstance(error, UserError) or not _raised_by_the_constructor(error):
            raise
        raise UserError(f'"trainer.task_options": the task {name} refuses them: {error}') from error
    return task


def _raised_by_the_constructor(error: BaseException) -> bool:
    """Whether a constructor itself has raised an error. If what it calls has, the user needs the traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_name in ("__init__", "__post_init__")


def _from_folder(name: str) -> Any:
    if name not in BUILT_IN:
        raise UserError(
            f'unknown task "{name}". {near(name, BUILT_IN)} Your own is given as path/to/file.py:ClassName.'
        )
    return importlib.import_module(f".{name}", __package__).TASK


def _from_file(name: str) -> Any:
    path, cls_name = task_file(name)
    module_name = f"user_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"The task file {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # Before the file runs, as an import does it: dataclasses look for the module of a class there.
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent.resolve()))  # so that it can import its neighbours
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"The task file {path} has a syntax error in line {error.lineno}: {error.msg}.") from error
    except ImportError as error:
        raise UserError(f"The task file {path} cannot be imported: {error}.") from error
    finally:
        sys.path.pop(0)
    cls = getattr(module, cls_name, None)
    if cls is None:
        classes = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module_name]
        raise UserError(f"The task file {path} has no class {cls_name}. {near(cls_name, classes)}")
    return cls
