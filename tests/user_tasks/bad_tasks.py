"""User tasks that go wrong, each in one way, and models with something unusual in them."""

import os
import random
import signal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from my_task import MyTask
from torch import nn


class MeanLoss(MyTask):
    def loss(self, outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["y"], reduction="none"), len(batch["y"])


class NoCount(MyTask):
    def loss(self, outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["y"], reduction="sum")


class WrongCount(MyTask):
    def loss(self, outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["y"], reduction="sum"), 1


class CountTensor(MyTask):
    def loss(self, outputs, batch):
        return F.cross_entropy(outputs["logits"], batch["y"], reduction="sum"), torch.ones(3)


class DetachedLoss(MyTask):
    def loss(self, outputs, batch):
        return torch.zeros(()), len(batch["y"])


class InfiniteAtOnce(MyTask):
    def loss(self, outputs, batch):
        return outputs["logits"].sum() * float("inf"), len(batch["y"])


class InfiniteLater(MyTask):
    """Not finite in step 4, in whichever micro-batch holds sample 123 of the shuffled set."""

    def splits(self):
        splits = super().splits()
        splits["train"]["number"] = torch.arange(500)
        splits["test"]["number"] = torch.zeros(200)
        return splits

    def loss(self, outputs, batch):
        loss, count = super().loss(outputs, batch)
        return loss / (batch["number"] != 123).all().float(), count


class MixesSamples(MyTask):
    def augment(self, batch, random):
        return {**batch, "x": batch["x"] - batch["x"].mean(0)}


class NoForward:
    def splits(self):
        return {}

    def model(self):
        return nn.Linear(1, 1)

    def loss(self, outputs, batch):
        return None

    def metrics(self, outputs, batch):
        return {}


class EmptySplit(MyTask):
    def splits(self):
        return {"train": {"x": torch.zeros(0, 20), "y": torch.zeros(0)}}


class RaggedSplit(MyTask):
    def splits(self):
        return {"train": {"x": torch.zeros(7, 20), "y": torch.zeros(5)}}


class _RankNoise:
    generator = None


class RankNoise(MyTask):
    """Adds noise from a generator that each process seeds with its rank and lets run on."""

    def forward(self, model, batch):
        import torch.distributed as dist

        if _RankNoise.generator is None:
            _RankNoise.generator = torch.Generator().manual_seed(dist.get_rank())
        noise = torch.randn(batch["x"].shape, generator=_RankNoise.generator)
        return {"logits": model(batch["x"] + noise)}


class FlipsABit(MyTask):
    """On rank 1, in its third step, one bit of one weight changes: a memory fault."""

    def forward(self, model, batch, progress, _done=[]):  # noqa: B006
        import torch.distributed as dist

        if dist.get_rank() == 1 and progress.step == 2 and not _done:
            _done.append(True)
            with torch.no_grad():
                model.outer.weight.view(-1).view(torch.int32)[5] ^= 1 << 3
        return super().forward(model, batch)


class OtherDataOnRank1(MyTask):
    def splits(self):
        import torch.distributed as dist

        splits = super().splits()
        if dist.get_rank() == 1:
            splits["train"]["x"][3, 3] += 1e-6
        return splits


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(20, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.linear(x)


class StatefulModel(MyTask):
    def model(self):
        return Counting()


class SyncNorm(MyTask):
    def model(self):
        return nn.SyncBatchNorm.convert_sync_batchnorm(super().model())


class PythonRandom(MyTask):
    def forward(self, model, batch):
        return {"logits": model(batch["x"]) * (1 + random.random())}


class NumpyRandom(MyTask):
    def forward(self, model, batch):
        return {"logits": model(batch["x"]) * (1 + np.random.rand())}


class OtherDataEachCall(MyTask):
    def splits(self):
        return {"train": {"x": torch.randn(100, 20), "y": torch.zeros(100, dtype=torch.int64)}}


class AugmentsFromElsewhere(MyTask):
    def augment(self, batch, random):
        return {**batch, "x": batch["x"] + torch.randn_like(batch["x"])}


class SeesItsNeighbours(MyTask):
    def forward(self, model, batch):
        return {"logits": model(batch["x"] - 0.5 * batch["x"].mean(0))}


class NoMemory(MyTask):
    """On rank 1, in its third step, the device's memory is full."""

    calls = 0

    def forward(self, model, batch):
        NoMemory.calls += 1
        if dist.get_rank() == 1 and NoMemory.calls > 14:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(model, batch)


class DiesAtStart(MyTask):
    """Rank 1 is killed while the data is read."""

    def splits(self):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().splits()


class DiesInTheThirdStep(MyTask):
    """Rank 1 is killed then, but not in the rehearsal, which looks at the last steps."""

    def forward(self, model, batch, progress):
        if dist.get_rank() == 1 and progress.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(model, batch)


class Crashes(MyTask):
    def forward(self, model, batch):
        return {"logits": model(batch["nope"])}


class SometimesUnused(nn.Module):
    """One layer is never used, one only by micro-batches that hold a sample with a large first feature."""

    def __init__(self):
        super().__init__()
        self.main, self.never, self.sometimes = nn.Linear(20, 2), nn.Linear(3, 3), nn.Linear(20, 2)

    def forward(self, x):
        outputs = self.main(x)
        return outputs + self.sometimes(x) if x[:, 0].max() > 2.6 else outputs


class UnusedParameters(MyTask):
    def model(self):
        return SometimesUnused()

    def augment(self, batch, random):
        return batch


class Tied(nn.Module):
    """Tied weights, a frozen layer, a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.frozen, self.inner, self.outer = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)
        self.outer.weight = self.inner.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

    def forward(self, x):
        return self.outer(self.inner(self.frozen(x)).relu())[:, :2] * self.scale


class TiedWeights(MyTask):
    def model(self):
        return Tied()


class OutputsOneNumber(MyTask):
    def forward(self, model, batch):
        return {**super().forward(model, batch), "mean": batch["x"].mean()}


class MetricsOfOneNumber(MyTask):
    def metrics(self, outputs, batch):
        return 0.5


class MetricsFail(MyTask):
    def metrics(self, outputs, batch):
        raise RuntimeError("a slip in the metrics")


class Rescales(nn.Module):
    """An embedding whose lookup rescales its rows, so that ranks come to hold other ones."""

    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, nn.Embedding(40, 2, max_norm=0.3)

    def forward(self, x):
        return self.model(x) + self.rows((x[:, 0] * 8).long().clamp(-20, 19) + 20)


class RescalesRows(MyTask):
    def model(self):
        return Rescales(super().model())
