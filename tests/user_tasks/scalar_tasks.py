"""A model with numbers of no dimension: `torch.ones(())` as a trained and a frozen parameter, and as a buffer."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from my_task import MyTask
from torch import nn


class Scaled(nn.Module):
    """CLIP's logit scale behind two layers; a temperature that is not trained, and a constant buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(20, 8), nn.Linear(8, 2)
        self.logit_scale = nn.Parameter(torch.tensor(0.7))
        self.temperature = nn.Parameter(torch.tensor(1.5), requires_grad=False)
        self.register_buffer("offset", torch.tensor(0.25))

    def forward(self, x):
        logits = self.outer(F.gelu(self.inner(x) + self.offset))
        return logits * self.logit_scale.exp() / self.temperature


class LogitScale(MyTask):
    """Without augmentation, so that a plain loop sees the same samples."""

    def model(self):
        return Scaled()

    def augment(self, batch, random):
        return batch


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.intercept = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        score = self.slope * x[:, 2] + self.intercept
        return torch.stack([-score, score], 1)


class OnlyScalars(LogitScale):
    """Every parameter has no dimension."""

    def model(self):
        return Line()


class OtherStart(LogitScale):
    """On rank 1 the scalars, trained and frozen, start elsewhere; DeepSpeed gives every rank the model of rank 0."""

    def model(self):
        model = super().model()
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.logit_scale += 0.25
                model.temperature += 0.25
        return model
