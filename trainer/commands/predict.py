"""`python -m trainer predict`: predictions of a trained model for new data, as csv or json lines."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..config.schema import read_json
from ..engine.gpus import usable_gpus
from ..errors import UserError
from ..files import whole_file
from ..record.folder import ORIGIN

if TYPE_CHECKING:
    from torch import nn

    from ..tasks.protocol import Task


def predict(
    model: str, source: str, output: str | None, kind: str | None, task_name: str | None, batch_size: int, device: str
) -> int:
    """Predicts on a file and writes one row a sample.

    Args:
        model: the folder of a model, or the output folder of its run.
        source: the file or folder to predict on.
        output: where rows go; None for the console.
        kind: "csv" or "jsonl"; None takes it from the output's name, else csv.
        task_name: path/to/file.py:ClassName for a model of a user's own task.
        batch_size: samples of one forward.
        device: "auto", "cpu" or "cuda".

    Returns:
        0.

    Raises:
        UserError: the folder holds no model of the trainer, or the task cannot predict.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: it must be at least 1.")
    folder = _model_folder(Path(model))
    path = Path(source)
    if not path.exists():
        raise UserError(f"--input {source} does not exist (looked from {Path.cwd()}).")
    if output is not None:
        _check_overwrites_nothing(output, path, folder)
    if kind is None:
        kind = "jsonl" if output is not None and output.endswith((".jsonl", ".json")) else "csv"
    task, network = _load(folder, task_name, device)
    rows = task.predict(network, path, batch_size)  # type: ignore[attr-defined]
    if output is None:
        _write(rows, kind, sys.stdout)
        _say_notes(task)
        return 0
    target = Path(output)
    try:
        with whole_file(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            count = _write(rows, kind, file)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}.") from error
    _say_notes(task)
    print(f"{count:,} predictions in {target}", file=sys.stderr)
    return 0


def _check_overwrites_nothing(output: str, source: Path, model: Path) -> None:
    """Raises UserError if the output is a file of the input or of the model. Paths are compared without their links."""
    target = Path(output).resolve()
    if not target.exists():
        return
    if target == source.resolve():
        raise UserError(f"--output {output} is the input itself, which would be overwritten. Name another file.")
    for flag, folder in (("--input", source), ("--model", model)):
        if target.is_relative_to(folder.resolve()):
            raise UserError(f"--output {output} is a file in the folder of {flag}, {folder}. Name another file.")


def _say_notes(task: Task) -> None:
    for note in getattr(task, "notes", ()):
        print(f"note: {note}", file=sys.stderr)


def _model_folder(path: Path) -> Path:
    for folder in (path, path / "model"):
        if (folder / ORIGIN).is_file():
            return folder
    raise UserError(
        f"--model {path} holds no model of this trainer: there is no {ORIGIN} in it. "
        "Give a run's output folder, or the folder model in it."
    )


def _load(folder: Path, task_name: str | None, device: str) -> tuple[Task, nn.Module]:
    from ..run.saving import load_model
    from ..tasks.protocol import load_task

    origin = read_json(folder / ORIGIN)
    name, options = origin.get("task"), origin.get("task_options")
    if not isinstance(name, str) or not isinstance(options, dict):
        raise UserError(f"{folder / ORIGIN} is damaged: it must name a task and its options.")
    if ":" in name:
        name = task_name or _own_code(folder, name, origin)
    else:
        options = options | ({"trust_remote_code": False} if "trust_remote_code" in options else {})
    task = load_task(name, options)
    if not callable(getattr(task, "predict", None)):
        raise UserError(
            f"The task {name} has no method predict(), so it cannot predict on new data. Add one to the class:\n"
            "    def predict(self, model, source, batch_size):  # source: the path of --input\n"
            "        yields a dictionary, column -> value, for each sample\n"
            "trainer/tasks/README.md has an example."
        )
    gpus = usable_gpus(device)
    if device == "cuda" and gpus == 0:
        raise UserError("--device cuda, but torch finds no GPU on this machine.")
    return task, load_model(task, folder).to("cuda" if gpus else "cpu").eval()


def _own_code(folder: Path, name: str, origin: dict[str, Any]) -> str:
    """The code of a user's own task, as path/to/file.py:ClassName, for a run's model.

    A model's folder may come from anybody, so it must not choose which code runs here. So only a run's folder may name
    its task, and only a file outside of it, with the content that it had when the run began.

    Raises:
        UserError: there is no such file, or it has changed.
    """
    advice = "Add --task path/to/file.py:ClassName."
    file, known = origin.get("task_file"), origin.get("task_sha256")
    run = folder.parent.resolve()
    if not isinstance(file, str) or not (run / "manifest.json").is_file():
        raise UserError(f"This model belongs to a user's task, {name}. {advice}")
    path = Path(file)
    if not path.is_file() or path.resolve().is_relative_to(run):
        raise UserError(
            f"This model belongs to the task {name}, whose code was in {file} and is not there now. {advice}"
        )
    if hashlib.sha256(path.read_bytes()).hexdigest() != known:
        raise UserError(
            f"This model belongs to the task {name}, whose code in {file} has changed since it was trained. To use it "
            f"as it is now, add --task {file}:{name.rpartition(':')[2]}"
        )
    return f"{file}:{name.rpartition(':')[2]}"


def _write(rows: Iterator[dict[str, Any]], kind: str, file: TextIO) -> int:
    import torch

    count, writer = 0, None
    with torch.inference_mode():
        for row in rows:
            if kind == "jsonl":
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                if writer is None:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    writer.writerow({name: _no_formula(name) for name in row})
                writer.writerow({name: _no_formula(value) for name, value in row.items()})
            count += 1
    return count


# A spreadsheet takes a cell that begins so for a formula. The last four are their wide forms, as in Japanese.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def _no_formula(value: Any) -> Any:
    """A csv value that no spreadsheet runs: a text that begins like a formula gets a quote mark in front.

    Such a text may come from anybody, as part of the data, and a formula can send away the cells beside it. The rule
    is OWASP's, https://owasp.org/www-community/attacks/CSV_Injection. Numbers stay, and so does a sign alone.
    """
    if not isinstance(value, str):
        return value
    value = re.sub(r"\r(?!\n)", "\n", value)  # before version 3.13, Python's csv would not quote it
    if not value.startswith(_FORMULA) or len(value.strip()) < 2:
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
