"""A task as a user writes one: a noisy two-class problem, its own model, its own augmentation."""

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.inner = nn.Linear(20, hidden)
        self.norm = nn.BatchNorm1d(hidden, momentum=0.2)
        self.average = nn.BatchNorm1d(hidden, momentum=None)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, 2)

    def forward(self, x):
        return self.outer(self.dropout(self.average(F.gelu(self.norm(self.inner(x))))))


class MyTask:
    def __init__(self, hidden: int = 24, dropout: float = 0.2, noise: float = 0.1):
        self.hidden, self.dropout, self.noise = hidden, dropout, noise

    def splits(self):
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(700, 20, generator=generator)
        y = (x[:, 0] * x[:, 1] + x[:, 2] > 0).long()
        return {"train": {"x": x[:500], "y": y[:500]}, "test": {"x": x[500:], "y": y[500:]}}

    def model(self):
        return Net(self.hidden, self.dropout)

    def augment(self, batch, random):
        return {**batch, "x": batch["x"] + self.noise * random.normal(20)}

    def forward(self, model, batch):
        return {"logits": model(batch["x"])}

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["y"], reduction="sum"), len(batch["y"])

    def metrics(self, outputs, batch):
        return {"accuracy": (outputs["logits"].argmax(1) == batch["y"]).float().mean().item()}
