"""What a fold says of each sample that it tests."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch

from tests.run import small
from trainer.config.keys import FoldOptions
from trainer.data.cut import Cut
from trainer.record.folder import PREDICTIONS
from trainer.run.predictions import write_predictions


class Task(small.Task):
    def predictions(self, outputs: torch.Tensor, batch: object) -> dict[str, list[float]]:
        return {"prediction": outputs.tolist()}


def test_a_sample_that_is_a_file_is_named(tmp_path: Path) -> None:
    for files in (None, ["a.png", "b.png", "=c.png"]):
        cut = Cut(FoldOptions())
        cut.rows, cut.files = {"test": np.array([1, 2])}, files
        write_predictions(tmp_path, Task(), cut, torch.tensor([0.5, 1.5]), {}, {})
        with (tmp_path / PREDICTIONS).open(newline="") as file:
            found = list(csv.reader(file))
        named = [[], [], []] if files is None else [["file"], ["b.png"], ["'=c.png"]]
        said = [["prediction"], ["0.5"], ["1.5"]]
        assert found == [[row, *own, *rest] for row, own, rest in zip(("row", "1", "2"), named, said)]
