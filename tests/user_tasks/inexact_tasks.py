"""User tasks whose numbers would depend on the number of ranks, each for one cause; and tasks that only look so."""

import itertools
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from my_task import MyTask, Net
from torch import nn

calls_of_all = 0


class CountingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.n = nn.Linear(20, 2), 0

    def forward(self, x):
        if self.training:
            self.n += 1
        return self.linear(x) * (1 + 0.01 * self.n)


class CountsInTheModel(MyTask):
    def model(self):
        return nn.Sequential(CountingNet())


class AnnealsByCounting(MyTask):
    """As KL annealing and temperature schedules are usually written."""

    def splits(self):
        self.calls = 0
        return super().splits()

    def loss(self, outputs, batch):
        self.calls += 1
        loss, count = super().loss(outputs, batch)
        return loss + min(1.0, self.calls / 100) * outputs["logits"].square().sum(), count


class CountsInAGlobal(MyTask):
    def forward(self, model, batch):
        global calls_of_all
        calls_of_all += 1
        return {"logits": model(batch["x"]) * (1 + 0.01 * calls_of_all)}


class CountsInTheClass(MyTask):
    calls = 0

    def forward(self, model, batch):
        CountsInTheClass.calls += 1
        return {"logits": model(batch["x"]) * (1 + 0.01 * CountsInTheClass.calls)}


class RemembersTheFirst(MyTask):
    """Centres by the mean of the first micro-batch that it ever sees: afterwards it agrees with itself."""

    center = None

    def forward(self, model, batch):
        if self.center is None:
            self.center = batch["x"].mean(0)
        return {"logits": model(batch["x"] - self.center)}


class OwnGenerator(MyTask):
    def __init__(self):
        super().__init__()
        self.noise_of = torch.Generator().manual_seed(3)

    def forward(self, model, batch):
        return {"logits": model(batch["x"] + torch.randn(batch["x"].shape, generator=self.noise_of))}


class ReadsTheClock(MyTask):
    def forward(self, model, batch):
        return {"logits": model(batch["x"]) * (1 + 1e-3 * (time.perf_counter_ns() % 1000))}


class AsksForTheRank(MyTask):
    def forward(self, model, batch):
        return {"logits": model(batch["x"]) * (1 + 0.1 * dist.get_rank())}


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(50, 7, max_norm=1.0), nn.Linear(7, 2)

    def forward(self, x):
        return self.linear(self.embedding((x[:, :5].abs() * 12).long().clamp(max=49)).mean(1))


class Averaging(nn.Module):
    """Its buffers are assigned anew in the forward, one of them from nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(20, 2)
        self.register_buffer("average", torch.zeros(20))
        self.register_buffer("last", None)

    def forward(self, x):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(0)
            self.last = x.detach()[0]
        return self.linear(x - self.average)


class AssignsBuffers(MyTask):
    def model(self):
        return Averaging()


class WritesToItsData(MyTask):
    def splits(self):
        splits = super().splits()
        self.x = splits["train"]["x"]
        return splits

    def forward(self, model, batch):
        self.x[0] += 1.0
        return super().forward(model, batch)


class MaxNorm(MyTask):
    def model(self):
        return Embedded()


class WritesItsWeight(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.data.mul_(0.999)
        return super().forward(x)


class ChangesAParameter(MyTask):
    def model(self):
        return nn.Sequential(WritesItsWeight(20, 2))


class GoesBackward(MyTask):
    def loss(self, outputs, batch):
        loss, count = super().loss(outputs, batch)
        loss.backward(retain_graph=True)
        return loss, count


class AnnealsLate(MyTask):
    """Its penalty sets in at the 60th call, and the counter is out of sight: no rehearsal can see that."""

    def splits(self):
        calls = itertools.count()
        self.penalty = lambda: max(0.0, next(calls) - 60) * 0.01
        return super().splits()

    def loss(self, outputs, batch):
        loss, count = super().loss(outputs, batch)
        return loss + self.penalty() * outputs["logits"].square().sum(), count


class SetsInLate(MyTask):
    """Every 16th call adds something, as lazy penalties do; the counter is in sight."""

    def splits(self):
        self.calls = 0
        return super().splits()

    def loss(self, outputs, batch):
        self.calls += 1
        loss, count = super().loss(outputs, batch)
        return loss + (self.calls % 16 == 0) * outputs["logits"].square().sum(), count


class CountsForItsFamily(MyTask):
    calls_of_the_class = 0

    def loss(self, outputs, batch):
        type(self).calls_of_the_class += 1
        loss, count = super().loss(outputs, batch)
        return loss + (self.calls_of_the_class % 16 == 0) * outputs["logits"].square().sum(), count


class CountsOnlyOnceCalled(CountsForItsFamily):
    """Has no counter of its own before the first call; every 16th call adds something."""


class DrawsRarely(MyTask):
    def forward(self, model, batch):
        factor = 0.5 if np.random.rand() < 0.1 else 1.0
        return {"logits": model(batch["x"]) * factor}


class HooksLazily(MyTask):
    """As transformers does for hidden states: the first forward installs a hook, and notes that it did."""

    def model(self):
        return nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))

    def forward(self, model, batch):
        if not getattr(model, "hooked", False):
            model.hooked = True
            model[0].register_forward_hook(lambda module, inputs, outputs: outputs * 1.1)
        return {"logits": model(batch["x"])}


class TeacherInTheModel(MyTask):
    """An average of the weights, moved in every training forward: it equals them until they move."""

    def model(self):
        model = super().model()
        model.teacher = nn.Linear(20, 24)
        model.teacher.load_state_dict(model.inner.state_dict())
        return model.requires_grad_(True)

    def forward(self, model, batch):
        if model.training:
            with torch.no_grad():
                for one, other in zip(model.teacher.parameters(), model.inner.parameters()):
                    one.lerp_(other, 0.01)
        return super().forward(model, batch)


class CountsFromTheSecondEpoch(MyTask):
    def model(self):
        model = super().model()
        model.register_buffer("updates", torch.zeros(()))
        return model

    def forward(self, model, batch, progress):
        if progress.epoch >= 1 and model.training:
            model.updates += 1
        return super().forward(model, batch)


class DividesByTheWorld(MyTask):
    def loss(self, outputs, batch):
        loss, count = super().loss(outputs, batch)
        return loss / dist.get_world_size(), count


class AsksTheEnvironment(MyTask):
    def loss(self, outputs, batch):
        loss, count = super().loss(outputs, batch)
        return loss / int(os.environ.get("WORLD_SIZE", "1")), count


class TalksToOthers(MyTask):
    def forward(self, model, batch):
        mean = batch["x"].mean(0)
        dist.all_reduce(mean)
        return {"logits": model(batch["x"] - mean / dist.get_world_size())}


class SetsMomentum(MyTask):
    def forward(self, model, batch):
        model.norm.momentum = 0.1
        return super().forward(model, batch)


class ReadsStatistics(MyTask):
    def forward(self, model, batch):
        factor = 1 + model.norm.running_var.mean()
        return {"logits": model(batch["x"]) * factor}


class FrozenNorm(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


class FrozenStatistics(MyTask):
    """What the refusal of ReadsStatistics advises."""

    def model(self):
        model = super().model()
        model.norm = FrozenNorm(24)
        return model

    def forward(self, model, batch):
        assert not model.norm.training
        return {"logits": model(batch["x"]) * (1 + model.norm.running_var.mean())}


class MixesInTheMiddle(MyTask):
    """Its claim of chunks is wrong in the middle of the run only."""

    augment_in_chunks = True

    def augment(self, batch, random, progress):
        x = batch["x"]
        return {**batch, "x": 0.8 * x + 0.2 * x.flip(0) if 0.2 < progress.fraction < 0.8 else x}


class HarmlessState(MyTask):
    """Keeps the last outputs to look at, and counts: no number follows from them."""

    def splits(self):
        self.seen = []
        self.calls = 0
        return super().splits()

    def forward(self, model, batch):
        self.calls += 1
        outputs = super().forward(model, batch)
        self.last = outputs["logits"].detach()
        self.seen.append(float(self.last.sum()))
        return outputs


# ---------------------------------------------------------------- exact


class AugmentsByPowers(MyTask):
    def augment(self, batch, random):
        return {**batch, "x": batch["x"] * (0.5 + (random.uniform(2) ** 1.7).sum(1, keepdim=True))}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(19, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.gru(x[:, None].expand(-1, 3, -1))[0][:, -1])


class AugmentsBySigmoids(MyTask):
    """19 features, a GRU: with micro-batches of 7, no tensor is a multiple of a vector register."""

    def splits(self):
        return {name: {**arrays, "x": arrays["x"][:, :19].clone()} for name, arrays in super().splits().items()}

    def model(self):
        return Recurrent()

    def augment(self, batch, random):
        x = batch["x"]
        return {**batch, "x": x * torch.sigmoid(3 * random.uniform(19) + x)}


class ClaimsChunks(AugmentsBySigmoids):
    augment_in_chunks = True


class ClaimsChunksAndDraws(MyTask):
    """A claim that is dropped for two reasons; seeded for each micro-batch, its numbers are exact then."""

    augment_in_chunks = True

    def augment(self, batch, random):
        return {**batch, "x": batch["x"] + 0.1 * torch.randn_like(batch["x"])}


class MixesUp(MyTask):
    """Mixup within the micro-batch, with numbers from torch's default generator."""

    def augment(self, batch, random):
        share, partner = torch.rand(()), torch.randperm(len(batch["x"]))
        return {**batch, "x": share * batch["x"] + (1 - share) * batch["x"][partner]}


class AnnealsByProgress(MyTask):
    def augment(self, batch, random, *, progress):
        return {**batch, "x": batch["x"] + (1 - progress.fraction) * self.noise * random.normal(20)}

    def forward(self, model, batch, progress):
        return {"logits": model(batch["x"]) * (1 + 0.01 * progress.epoch)}

    def loss(self, outputs, batch, progress=None):
        loss, count = super().loss(outputs, batch)
        weight = min(1.0, progress.step / (0.5 * progress.total_steps))
        return loss + weight * F.mse_loss(outputs["logits"], torch.zeros(()).expand(count, 2), reduction="sum"), count


# ---------------------------------------------------------------- a device that computes wrongly


class _Flip(torch.autograd.Function):
    """The identity; backward, one bit of one number is wrong (a high one, which no rounding swallows)."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1).view(torch.int32)[0] ^= 1 << 20
        return gradient


class FlipsAGradient(MyTask):
    """On rank 1, in the eighth step. Losses are right, and so is what the guard compares."""

    def forward(self, model, batch, progress):
        logits = model(batch["x"])
        return {"logits": _Flip.apply(logits) if dist.get_rank() == 1 and progress.step == 7 else logits}


# ---------------------------------------------------------------- found by outside eyes and the fuzzer


class DrawsForTheSmallest(MyTask):
    """Only micro-batches of 7 samples draw, from Python's generator: of those rehearsed, a single one."""

    def forward(self, model, batch):
        import random

        factor = 1 + random.random() if len(batch["x"]) == 7 else 1.0
        return {"logits": model(batch["x"]) * factor}


class CountsTheSmallest(MyTask):
    def splits(self):
        self.small = 0
        return super().splits()

    def forward(self, model, batch):
        self.small += len(batch["x"]) == 7
        return {"logits": model(batch["x"]) * (1 + 0.01 * self.small * (len(batch["x"]) == 7))}


class ConvergedNorm(MyTask):
    """Spectral norm of a weight with one singular value: its power iteration stands still until the weight moves."""

    def model(self):
        layer = nn.Linear(20, 2)
        with torch.no_grad():
            layer.weight.zero_()
            layer.weight[0, 0] = 3.0
        return nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(layer))


class CachesATable(MyTask):
    """A table of positions, made in whichever forward comes first, an evaluation's too."""

    def model(self):
        self.table = None
        return super().model()

    def forward(self, model, batch):
        if self.table is None or len(self.table) < len(batch["x"]):
            self.table = torch.linspace(0, 1, len(batch["x"]))
        return {"logits": model(batch["x"]) * self.table[: len(batch["x"])].mul(0)[:, None].add(1)}


class Pixels(nn.Module):
    def __init__(self, places: int):
        super().__init__()
        self.norm, self.out, self.places = nn.BatchNorm1d(20 // places), nn.Linear(20, 2), places

    def forward(self, x):
        return self.out(self.norm(x.view(len(x), -1, self.places)).flatten(1))


class NormOverPlaces(MyTask):
    """BatchNorm1d over (B, C, T): with T > 1, a micro-batch of one sample has a variance."""

    places = 4

    def model(self):
        return Pixels(self.places)


class NormOverOnePlace(NormOverPlaces):
    places = 1


class NothingCounts(MyTask):
    def splits(self):
        from trainer.exact.splits import Split

        splits = super().splits()
        counts = torch.ones(500)
        counts[:496] = 0.0
        return {"train": Split(splits["train"], counts=counts)}

    def loss(self, outputs, batch):
        return outputs["logits"].sum() * 0.0, 0.0


class ChannelsLast(MyTask):
    """A convolution in the memory format that GPUs like."""

    def model(self):
        layers = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.Flatten())
        return nn.Sequential(layers, nn.Linear(4 * 3, 2)).to(memory_format=torch.channels_last)

    def forward(self, model, batch):
        x = torch.cat([batch["x"], batch["x"]], 1)[:, :30].reshape(-1, 2, 3, 5)
        return {"logits": model(x.to(memory_format=torch.channels_last))}


class TwoNorms(MyTask):
    """A BatchNorm and, behind it, an InstanceNorm that keeps statistics."""

    def model(self):
        norms = nn.Sequential(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6), nn.InstanceNorm1d(6, track_running_stats=True))
        return nn.Sequential(norms, nn.Flatten(), nn.Linear(30, 2))

    def forward(self, model, batch):
        return {"logits": model(batch["x"].view(-1, 4, 5))}


class LazyLayer(MyTask):
    def model(self):
        return nn.LazyLinear(2)


class SparseRows(MyTask):
    def model(self):
        return nn.Sequential(nn.EmbeddingBag(30, 8, sparse=True), nn.Linear(8, 2))

    def forward(self, model, batch):
        return {"logits": model((batch["x"][:, :4].abs() * 10).long().clamp(max=29))}


class Unfreezes(MyTask):
    def forward(self, model, batch, progress):
        model.inner.weight.requires_grad_(progress.epoch >= 1)
        return super().forward(model, batch)


class Unpooling(Net):
    def __init__(self, hidden, dropout):
        super().__init__(hidden, dropout)
        self.unpool = nn.MaxUnpool1d(2)

    def forward(self, x):
        largest, where = F.max_pool1d(x[:, None], 2, return_indices=True)
        return super().forward(self.unpool(largest, where)[:, 0])


class Unpools(MyTask):
    """With an operation that torch refuses, on CPUs as well."""

    def model(self):
        return Unpooling(self.hidden, self.dropout)


class Pooling(Net):
    def __init__(self, hidden, dropout):
        super().__init__(hidden, dropout)
        self.first, self.pool = nn.Linear(20, 20), nn.AdaptiveAvgPool1d(10)

    def forward(self, x):
        return super().forward(self.pool(self.first(x)[:, None])[:, 0].repeat(1, 2))


class PoolsToMoreThanOne(MyTask):
    """With an operation that torch refuses, but only on GPUs."""

    def model(self):
        return Pooling(self.hidden, self.dropout)
