"""`python -m trainer predict`: predictions of a trained model for new data, as csv or json lines."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..api import saved
from ..errors import UserError
from ..files import whole_file
from ..record.cells import no_formula
from ..wording import counted

if TYPE_CHECKING:
    from ..tasks.protocol import Task


def predict(
    model: str, source: str, output: str | None, kind: str | None, task_name: str | None, batch_size: int, device: str,
    overwrite: bool = False,
) -> int:  # fmt: skip
    """Predicts on a file and writes one row a sample.

    Args:
        model: the folder of a model, or the output folder of its run.
        source: the file or folder to predict on.
        output: where rows go; None for the console. If the task writes a file for each sample, a name without a suffix
            is a folder: these files go there, and the rows with them.
        kind: "csv" or "jsonl"; None: by the output's name, else csv.
        task_name: path/to/file.py:ClassName for a model of a user's own task.
        batch_size: samples of one forward.
        device: "auto", "cpu" or "cuda".
        overwrite: replace the file `output`, if there is one.

    Returns:
        0.

    Raises:
        UserError: the folder holds no model of the trainer, the task cannot predict, or the output exists.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: it must be at least 1.")
    found = saved.find(model, task_name, flags=True)
    path = Path(source)
    if not path.exists():
        raise UserError(f"--input {source} does not exist (looked from {Path.cwd()}).")
    if output is not None:
        _check_overwrites_nothing(output, path, found.folder)
        if Path(output).is_file() and not overwrite:
            raise UserError(f"--output {output} exists. Name another file, or add --overwrite to replace it.")
    if kind is None:
        kind = "jsonl" if output is not None and output.endswith((".jsonl", ".json")) else "csv"
    task, network = found.predictor(device)
    if output is not None and callable(getattr(task, "predict_files", None)) and not Path(output).suffix:
        return _into_folder(task, network, path, batch_size, Path(output), kind)
    rows = task.predict(network, path, batch_size)  # type: ignore[attr-defined]
    if output is None:
        _write(rows, kind, sys.stdout)
        _say_notes(task)
        return 0
    target = Path(output)
    try:
        count = _write_file(rows, kind, target)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}.") from error
    _say_notes(task)
    print(f"{counted(count, 'prediction')} in {target}", file=sys.stderr)
    return 0


def _into_folder(task: Task, network: Any, source: Path, batch_size: int, folder: Path, kind: str) -> int:
    """Lets a task write a file for each sample into a new folder, and writes the rows as predictions.csv or .jsonl."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--output {folder} is not empty. Name a new folder, or a .csv for the rows alone.")
        folder.mkdir(parents=True, exist_ok=True)
        rows = task.predict_files(network, source, batch_size, folder)  # type: ignore[attr-defined]
        count = _write_file(rows, kind, folder / f"predictions.{kind}")
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error.strerror or error}.") from error
    _say_notes(task)
    print(f"{counted(count, 'prediction')} in {folder}", file=sys.stderr)
    return 0


def _write_file(rows: Any, kind: str, target: Path) -> int:
    with whole_file(target) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        return _write(rows, kind, file)


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
                    writer.writerow({name: no_formula(name) for name in row})
                writer.writerow({name: no_formula(value) for name, value in row.items()})
            count += 1
    return count
