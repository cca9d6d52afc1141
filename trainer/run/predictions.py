"""The predictions that the run of one fold makes for the samples that it tests, as a file in its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from ..data.cut import Cut
from ..exact.splits import Batch
from ..files import whole_file
from ..record.cells import no_formula
from ..record.folder import PREDICTIONS
from ..tasks.folds import columns_of
from ..tasks.protocol import Outputs, Task


def write_predictions(
    folder: Path, task: Task, cut: Cut, outputs: Outputs, arrays: Batch, metrics: Mapping[str, float]
) -> None:
    """Writes one line for each sample of the test split: `row`, its place among all samples, and the task's prediction.

    If samples are files, the column `file` comes after `row`.

    Args:
        folder: of the run.
        task: of the run.
        cut: says which samples these are.
        outputs, arrays: of the whole split, on the CPU.
        metrics: of the split.
    """
    rows = cut.rows["test"].tolist()
    columns = columns_of(task, outputs, arrays, metrics)
    if cut.files is not None:
        columns = {"file": [cut.files[row] for row in rows], **columns}
    with (
        whole_file(folder / PREDICTIONS, synced=True) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", *(no_formula(name) for name in columns)])
        for row, *values in zip(rows, *columns.values()):
            writer.writerow([row, *(no_formula(value) for value in values)])
