"""A saved model: finds its folder and the code that belongs to it, and loads both."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import read_json
from ..engine.gpus import usable_gpus
from ..errors import UserError
from ..record.folder import ORIGIN
from ..tasks.given import file_of, given, name_of
from .arguments import refuse_no_path, refuse_no_task
from .result import Result

if TYPE_CHECKING:
    from torch import nn

    from ..tasks.protocol import Task
    from .guest import Host


@dataclass(frozen=True)
class Saved:
    """A saved model.

    Attributes:
        folder: of the model.
        task_name, task_options: of its task, as in a config.
        flags: whether messages name arguments as flags of a command, as in "--model runs/x"; else as in Python.
    """

    folder: Path
    task_name: str
    task_options: dict[str, Any]
    flags: bool = False

    @property
    def run(self) -> Path | None:
        """The output folder of its run; None if the model's folder is not in one."""
        parent = self.folder.parent
        return parent if (parent / "manifest.json").is_file() else None

    @property
    def code(self) -> Path | None:
        """The folder with the code of a user's task; None for a ready task, or if there is no such file."""
        file = Path(self.task_name.rpartition(":")[0])
        return file.parent if ":" in self.task_name and file.is_file() else None

    def task(self) -> Task:
        """The model's task, built anew. Raises UserError if it cannot be built."""
        from ..tasks.protocol import load_task

        return load_task(self.task_name, self.task_options)

    def model(self, task: Task | None = None) -> nn.Module:
        """The model on the CPU, loaded by `task`, or by a new task. Raises UserError if it cannot be loaded."""
        from ..run.saving import load_model

        return load_model(self.task() if task is None else task, self.folder)

    def predictor(self, device: str) -> tuple[Task, nn.Module]:
        """A task that can predict, and the model on its device.

        Args:
            device: "auto", "cpu" or "cuda".

        Raises:
            UserError: the task cannot predict, there is no such device, or the model cannot be loaded.
        """
        task = self.task()
        if not callable(getattr(task, "predict", None)):
            raise UserError(
                f"The task {self.task_name} has no method predict(), so it cannot predict on new data. Add one to the "
                "class:\n"
                "    def predict(self, model, source, batch_size):  # source: the path of "
                f"{'--input' if self.flags else 'the data'}\n"
                "        yields a dictionary, column -> value, for each sample\n"
                "trainer/tasks/README.md has an example."
            )
        gpus = usable_gpus(device)
        if device == "cuda" and gpus == 0:
            raise UserError(f"{argument('device', device, self.flags)}, but torch finds no GPU on this machine.")
        return task, self.model(task).to("cuda" if gpus else "cpu").eval()


def argument(name: str, value: object, flags: bool) -> str:
    """An argument for a message: as a flag of a command, or as in Python."""
    return f"--{name} {value}" if flags else f"{name}={str(value) if isinstance(value, Path) else value!r}"


def find(model: str | Path, task_name: str | None, *, flags: bool = False) -> Saved:
    """The model in a folder.

    Args:
        model: the folder of a model, or the output folder of its run.
        task_name: path/to/file.py:ClassName for a model of a user's own task.
        flags: see `Saved`.

    Raises:
        UserError: the folder holds no model of the trainer, or its task must be named.
    """
    folder = _model_folder(Path(model).expanduser(), flags)
    origin = read_json(folder / ORIGIN)
    name, options = origin.get("task"), origin.get("task_options")
    if not isinstance(name, str) or not isinstance(options, dict):
        raise UserError(f"{folder / ORIGIN} is damaged: it must name a task and its options.")
    if ":" in name:
        name = task_name or _own_code(folder, name, origin, flags)
    else:
        # The model may come from anybody. Its options must not allow code from a hub to run here.
        options = options | ({"trust_remote_code": False} if "trust_remote_code" in options else {})
    return Saved(folder, name, options, flags)


def _model_folder(path: Path, flags: bool) -> Path:
    for folder in (path, path / "model"):
        if (folder / ORIGIN).is_file():
            return folder
    raise UserError(
        f"{argument('model', str(path), flags)} holds no model of this trainer: there is no {ORIGIN} in it. "
        "Give a run's output folder, or the folder model in it."
    )


def _own_code(folder: Path, name: str, origin: dict[str, Any], flags: bool) -> str:
    """The code of a user's own task, as path/to/file.py:ClassName, for a run's model.

    A model's folder may come from anybody, so it must not choose which code runs here. Only a run's folder may name its
    task. The task's file must lie outside of that folder, and must have the content that it had when the run began.

    Raises:
        UserError: there is no such file, or it has changed.
    """
    advice = f"Add {argument('task', 'path/to/file.py:ClassName', flags)}."
    file, known = origin.get("task_file"), origin.get("task_sha256")
    run = folder.parent.resolve()
    if not isinstance(file, str) or not (run / "manifest.json").is_file():
        raise UserError(f"This model belongs to a user's own task, {name}. {advice}")
    path = Path(file)
    if not path.is_file() or path.resolve().is_relative_to(run):
        raise UserError(
            f"This model belongs to the task {name}. Its code was in {file}, and is not there now. {advice}"
        )
    cls = name.rpartition(":")[2]
    if hashlib.sha256(path.read_bytes()).hexdigest() != known:
        raise UserError(
            f"This model belongs to the task {name}. Its code in {file} has changed since the model was trained. To "
            f"use the code as it is now, add {argument('task', f'{file}:{cls}', flags)}"
        )
    return f"{file}:{cls}"


@contextlib.contextmanager
def hosted_model(model: str | Path | Result, task: str | type | None) -> Iterator[tuple[Saved, Host]]:
    """A context with a saved model in a user's process, which is as it was afterwards. Arguments as of `evaluate`."""
    from .guest import hosted

    refuse_no_task(task)
    if isinstance(model, Result):
        task = task or model.task
    folder = model.output_dir if isinstance(model, Result) else model
    refuse_no_path("model", folder, "a run's output folder, its Result, or a model's folder")
    cls = task if isinstance(task, type) and file_of(task) is None else None
    name = name_of(cls) if cls is not None else file_of(task) if isinstance(task, type) else task
    found = find(folder, name)
    with given(cls), hosted(found.code) as host:
        yield found, host
