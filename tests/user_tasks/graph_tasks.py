"""Tasks that a CUDA graph cannot follow: what their host code does changes from step to step."""

import torch
from my_task import MyTask


class Anneals(MyTask):
    def loss(self, outputs, batch, progress):
        loss, count = super().loss(outputs, batch)
        return loss * (1.0 - 0.5 * progress.fraction), count


class ReadsValues(MyTask):
    def forward(self, model, batch):
        largest = batch["x"].abs().max().item()
        return {"logits": model(batch["x"] / largest)}


class DrawsOnTheHost(MyTask):
    def forward(self, model, batch):
        return {"logits": model(batch["x"] * float(torch.rand(())))}
