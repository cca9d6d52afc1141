"""Losses that are means, each hidden in another way; and sums that a careless look would take for means."""

import torch
import torch.nn.functional as F
from my_task import MyTask
from torch import nn


class Mean(MyTask):
    """Of a model that takes single samples, too."""

    def model(self):
        return nn.Linear(20, 2)

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["y"]), len(batch["y"])


class MeanInForward(MyTask):
    """The loss is computed beside the outputs, and kept."""

    def forward(self, model, batch):
        logits = model(batch["x"])
        self.kept = F.cross_entropy(logits, batch["y"])
        return {"logits": logits}

    def loss(self, outputs, batch):
        return self.kept, len(batch["y"])


class RowsOfAMean(MyTask):
    """The forward divides each sample's part by the size of the micro-batch, and the loss adds these up."""

    def forward(self, model, batch):
        logits = model(batch["x"])
        return {"logits": logits, "part": F.cross_entropy(logits, batch["y"], reduction="none") / len(logits)}

    def loss(self, outputs, batch):
        return outputs["part"].sum(), len(batch["y"])


class MeanOfNoise(MyTask):
    """The forward draws in evaluation, too, as a variational autoencoder may."""

    def forward(self, model, batch):
        return {"logits": model(batch["x"] + 0.2 * torch.randn_like(batch["x"]))}

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["y"]), len(batch["y"])


class WholeMicroBatch(MyTask):
    """A soft Dice loss: one number of all samples together."""

    def loss(self, outputs, batch):
        p, y = outputs["logits"].softmax(1)[:, 1], batch["y"].float()
        return 1 - (2 * (p * y).sum() + 1e-3) / (p.sum() + y.sum() + 1e-3), len(y)


class MeanWithAPenalty(MyTask):
    """The penalty needs the graph of the outputs, so the loss cannot be asked of other ones."""

    def forward(self, model, batch):
        x = batch["x"].requires_grad_()
        return {"logits": model(x), "x": x}

    def loss(self, outputs, batch):
        (slope,) = torch.autograd.grad(outputs["logits"].sum(), outputs["x"], create_graph=True)
        return F.cross_entropy(outputs["logits"], batch["y"]) + 0.01 * slope.square().mean(), len(batch["y"])


class SumWithAPenalty(MeanWithAPenalty):
    def loss(self, outputs, batch):
        (slope,) = torch.autograd.grad(outputs["logits"].sum(), outputs["x"], create_graph=True)
        return F.cross_entropy(outputs["logits"], batch["y"], reduction="sum") + slope.square().sum(), len(batch["y"])


class SumInForward(MeanInForward):
    def forward(self, model, batch):
        logits = model(batch["x"])
        self.kept = F.cross_entropy(logits, batch["y"], reduction="sum")
        return {"logits": logits}


class WholeMicroBatchTimesItsSize(WholeMicroBatch):
    def loss(self, outputs, batch):
        loss, count = super().loss(outputs, batch)
        return loss * count, count


class Scales(MyTask):
    """The loss writes to the outputs that it is given."""

    def loss(self, outputs, batch):
        outputs["logits"] /= 2
        return F.cross_entropy(outputs["logits"], batch["y"], reduction="sum"), len(batch["y"])


class Cancels(MyTask):
    """Terms that add up to nothing but rounding: rewards less their mean, under a policy that is still uniform."""

    def model(self):
        model = nn.Linear(20, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def loss(self, outputs, batch):
        reward = batch["x"][:, 0] - batch["x"][:, 0].mean()
        return -(reward * F.log_softmax(outputs["logits"], 1)[:, 0]).sum(), len(reward)


class OneSize(MyTask):
    """A table of weights for exactly 8 samples, and no other size."""

    def loss(self, outputs, batch):
        losses = F.cross_entropy(outputs["logits"], batch["y"], reduction="none")
        return (losses * torch.linspace(0.5, 1.5, 8)).sum(), len(losses)
