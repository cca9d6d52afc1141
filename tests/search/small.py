"""A search of a few seconds, on a task that notes which split each of its evaluations is of."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")
BASE: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "trainer": {"task": "digits", "task_options": {"model": "mlp"}, "epochs": 2},
    "search": {"parameters": {"optimizer.params.lr": {"low": 0.001, "high": 1.0, "log": True}}, "trials": 4},
}
_TASK = """
import torch
from torch import nn


class Task:
    best_metric = ("accuracy", "max")

    def __init__(self, hidden: int = 8, factor: float = 1.0):
        self.hidden, self.factor = hidden, factor

    def splits(self):
        x = torch.randn(112, 6, generator=torch.Generator().manual_seed(3))
        y = (x[:, 0] + x[:, 1] > 0).long()
        cut = {"train": slice(0, 64), "validation": slice(64, 88), "test": slice(88, 112)}
        return {name: {"x": x[rows], "y": y[rows], "of": torch.full((len(y[rows]),), i)}
                for i, (name, rows) in enumerate(cut.items())}

    def model(self):
        return nn.Sequential(nn.Linear(6, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 2))

    def forward(self, model, batch):
        return model(batch["x"]) * self.factor

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["y"], reduction="sum"), len(batch["y"])

    def metrics(self, outputs, batch):
        with open("LOG", "a") as file:
            file.write(f"{int(batch['of'][0])}\\n")
        right = outputs.argmax(1) == batch["y"]
        return {"accuracy": right.float().mean().item(), "margin": outputs.diff(dim=1).abs().mean().item()}
"""


def write(folder: Path, **search: Any) -> Path:
    """The config of a search on digits, which the tests only read."""
    values = copy.deepcopy(BASE)
    values["search"] |= search
    path = folder / "search.json"
    path.write_text(json.dumps(values))
    return path


def write_own(folder: Path, **search: Any) -> Path:
    """The same with the task of this file, for searches that are made; one device, no early ends."""
    (folder / "task.py").write_text(_TASK.replace("LOG", str(folder / "evaluations.txt")))
    path = write(folder, pruner={"type": "none"}, output_dir=str(folder / "out"), test_seeds=2, max_parallel=1)
    values = json.loads(path.read_text())
    values["trainer"] |= {"task": f"{folder}/task.py:Task", "task_options": {}, "device": "cpu"}
    values["search"] |= search
    path.write_text(json.dumps(values))
    return path


def evaluations(folder: Path) -> list[str]:
    """The split of each evaluation that a search of `write_own` has made, in order."""
    return [SPLITS[int(line)] for line in (folder / "evaluations.txt").read_text().split()]


def trials(folder: Path) -> list[tuple[Any, ...]]:
    """(number, point, state, value, hash) of each trial of a search of `write_own`."""
    found = [json.loads(file.read_text()) for file in sorted((folder / "out" / "trials").glob("*.json"))]
    return [(t["number"], t["point"], t["state"], t["value"], t.get("parameters_sha256")) for t in found]
