"""A task that a JSON spec describes: what `cases.random_case` draws, and what a user's own task file may look like.

    "trainer": {"task": "tests/exactness/random_task.py:RandomTask", "task_options": {"spec": {...}}}

The spec's keys are written down in `cases.py`, which makes it. `AnnealedTask` is the same with functions that take
`progress`.
"""

import random as python_random
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fuzz_layers import call, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.exact.splits import Split

CALLS_OF_ALL = 0
GENERATOR_OF_ALL = torch.Generator().manual_seed(9)


def counter():
    """A function that counts its calls where nobody sees it."""
    calls = 0

    def call_again():
        nonlocal calls
        calls += 1
        return calls

    return call_again


def first_of_all():
    """A function that gives what it was first called with."""
    seen = []

    def first(x):
        if not seen:
            seen.append(float(x.detach().float().abs().mean()))
        return seen[0]

    return first


next_number, first_mean = counter(), first_of_all()


class Settings:
    """An object of the user's own inside of the task."""

    def __init__(self):
        self.count = 0


class Model(nn.Module):
    """Layers one after the other; a token-level output is padded to all places, so that micro-batches fit together."""

    def __init__(self, spec):
        super().__init__()
        self.layers = nn.ModuleList(map(make, spec["layers"]))
        self.head = make(spec["head"])
        self.places = spec["input"].get("places") if spec["loss"].get("each_place") else None
        self.checkpointed = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        assert gradient_checkpointing_kwargs == {"use_reentrant": False}
        self.checkpointed = True

    def forward(self, x, mask=None):
        for layer in self.layers:
            if self.checkpointed and self.training and torch.is_grad_enabled():
                x = checkpoint(call, layer, x, mask, use_reentrant=False)
            else:
                x = call(layer, x, mask)
        y = self.head(x)
        return y if self.places is None else F.pad(y, (0, 0, 0, self.places - y.shape[1]))


class RandomTask:
    total_calls = 0

    def __init__(self, spec):
        self.spec = spec
        self.notes = []
        self.times_called = 0
        self.my_generator = torch.Generator().manual_seed(4)
        self.recent_means = []
        self.augment_in_chunks = spec["claims_chunks"]  # true or not: a wrong claim must change nothing
        self.settings = Settings()
        self.my_random = python_random.Random(8)
        self.my_numpy = np.random.default_rng(8)

    # ---- data --------------------------------------------------------------------------------------------------

    def splits(self):
        generator = torch.Generator().manual_seed(self.spec["data_seed"])
        return {name: self._split(samples, generator) for name, samples in self.spec["samples"].items()}

    def _split(self, n, generator):
        shape, loss, outputs = self.spec["input"], self.spec["loss"], self.spec["outputs"]
        arrays, lengths, counts = {}, None, None
        places = shape.get("places")
        if shape["form"] == "tokens":
            arrays["x"] = torch.randint(1, shape["vocabulary"], (n, places), generator=generator)
            if shape["padded"]:
                lengths = torch.randint(1, places + 1, (n,), generator=generator)
                arrays["mask"] = torch.arange(places) < lengths[:, None]
                arrays["x"] *= arrays["mask"]
        else:
            arrays["x"] = torch.randn(n, *shape["size"], generator=generator)
        of = (n, places) if loss.get("each_place") else (n,)
        if loss["kind"] == "cross_entropy":
            arrays["y"] = torch.randint(0, outputs, of, generator=generator)
        else:
            arrays["y"] = torch.rand(*of, outputs, generator=generator)
        if loss["counts"] == "weights":
            weight = 0.25 * torch.randint(loss["least"], 9, (n,), generator=generator).float()
            weight[0] = max(0.25, float(weight[0]))  # a split of which nothing counts is refused
            arrays["weight"] = counts = weight
        elif loss["counts"] == "tokens":
            counts = lengths.to(getattr(torch, loss["counts_type"]))
        padded = ("x", "mask", "y") if loss.get("each_place") else ("x", "mask")
        return Split(arrays, counts, lengths, padded if lengths is not None else ())

    def model(self):
        return Model(self.spec)

    # ---- augmentation ------------------------------------------------------------------------------------------

    def augment(self, batch, random):
        return self._augment(batch, random)

    def _augment(self, batch, random, progress=None):
        for step in self.spec["augment"]:
            batch = AUGMENTATIONS[step](batch, random)
        if self.spec["anneals"] and "mask" not in batch and batch["x"].is_floating_point():
            batch = {**batch, "x": batch["x"] + (1 - fraction(progress)) * 0.1 * spread(random.normal(1), batch["x"])}
        return {**batch, "x": self._disturbed(batch["x"], "augment", progress)}

    def _disturbed(self, x, where, progress):
        """The flaw, at the place where this case has it; x as it is elsewhere."""
        flaw = self.spec["flaw"] or {}
        if flaw.get("where") != where or (flaw["late"] and progress.step < 2):
            return x
        if flaw["size"] is not None and len(x) != flaw["size"]:
            return x
        return x * (1 + 0.05 * FLAWS[flaw["kind"]](self, x))

    # ---- model and loss ----------------------------------------------------------------------------------------

    def forward(self, model, batch):
        return self._forward(model, batch)

    def _forward(self, model, batch, progress=None):
        x = self._disturbed(batch["x"], "forward", progress)
        self._innocent(x)
        y = model(x, batch.get("mask"))
        if self.spec["anneals"]:
            y = y * (1 + fraction(progress))  # a temperature
        bottleneck = next((m for m in model.modules() if hasattr(m, "kl")), None)
        if self.spec["bare"] and bottleneck is None:
            return y
        return {"y": y} if bottleneck is None else {"y": y, "kl": bottleneck.kl}

    def _innocent(self, x):
        """Things that change and that no number depends on."""
        if self.spec["innocent"]:
            self.times_called += 1
            RandomTask.total_calls += 1
            self.settings.count += next_number()
            self.notes.append(f"{time.time()} {dist.get_rank()}")
            self.recent_means.append(x.shape)

    def loss(self, outputs, batch):
        return self._loss(outputs, batch)

    def _loss(self, outputs, batch, progress=None):
        each, counts = self._weighted(outputs, batch, progress), self.spec["loss"]["counts"]
        if counts is None:
            return each.sum(), len(each)
        return each.sum(), batch["weight" if counts == "weights" else "mask"].sum()

    def _weighted(self, outputs, batch, progress=None):
        """(B,), or (B, T)."""
        kl = outputs.get("kl") if isinstance(outputs, dict) else None
        outputs = outputs["y"] if isinstance(outputs, dict) else outputs
        each = self._each(outputs, batch["y"])  # (B,), or (B, T)
        if "y_other" in batch:  # mixup
            each = batch["share"] * each + (1 - batch["share"]) * self._each(outputs, batch["y_other"])
        if kl is not None:
            kl = kl[:, None] if each.ndim > 1 else kl
            each = each + (fraction(progress) if self.spec["anneals"] else 0.3) * kl
        each = self._disturbed(each, "loss", progress)
        counts = self.spec["loss"]["counts"]
        return each if counts is None else each * batch["weight" if counts == "weights" else "mask"]

    def _each(self, outputs, y):
        kind, smoothing = self.spec["loss"]["kind"], self.spec["loss"].get("smoothing", 0.0)
        if self.spec["loss"].get("each_place"):
            outputs = outputs[:, : y.shape[1]]
        if kind == "cross_entropy":
            return F.cross_entropy(outputs.movedim(-1, 1), y, reduction="none", label_smoothing=smoothing)
        if kind == "bce":
            return F.binary_cross_entropy_with_logits(outputs, y, reduction="none").sum(-1)
        return getattr(F, kind + "_loss")(outputs, y, reduction="none").mean(-1)

    def metrics(self, outputs, batch):
        outputs = outputs["y"] if isinstance(outputs, dict) else outputs
        result = {"mean": outputs.float().mean().item()}
        if self.spec["loss"]["kind"] == "cross_entropy":
            result["accuracy"] = (outputs.argmax(-1) == batch["y"]).float().mean().item()
        return result


class AnnealedTask(RandomTask):
    """Its functions ask how far the run is."""

    def augment(self, batch, random, *, progress=None):
        return self._augment(batch, random, progress)

    def forward(self, model, batch, *, progress=None):
        return self._forward(model, batch, progress)

    def loss(self, outputs, batch, *, progress=None):
        return self._loss(outputs, batch, progress)


class InOneCallTask(RandomTask):
    """Its losses can be computed for several micro-batches in one call."""

    def sample_losses(self, outputs, batch):
        each = self._weighted(outputs, batch)
        return each if each.ndim == 1 else each.sum(1)


class AnnealedInOneCallTask(AnnealedTask):
    """Both."""

    def sample_losses(self, outputs, batch, *, progress):
        each = self._weighted(outputs, batch, progress)
        return each if each.ndim == 1 else each.sum(1)


def fraction(progress):
    """The share of the run that is done; 0 for a task that does not ask."""
    return 0.0 if progress is None else progress.fraction


def spread(numbers, x):
    """(B, 1) numbers as (B, 1, ...), to be broadcast over x."""
    return numbers.view(-1, *[1] * (x.ndim - 1))


def change_x(function):
    return lambda batch, random: {**batch, "x": function(batch["x"], random)}


def matrix_product(x, random):
    C = x.shape[-1]
    matrices = torch.eye(C) + 0.1 * random.normal(C * C).view(-1, C, C)
    return torch.bmm(x.reshape(len(x), -1, C), matrices).view(x.shape)


def mixup(batch, random):
    """Zhang et al. 2018, within the micro-batch; partners come from torch's own generator."""
    partner = torch.randperm(len(batch["x"]))
    share = 0.5 + 0.5 * random.uniform(1)
    x = spread(share, batch["x"]) * batch["x"] + spread(1 - share, batch["x"]) * batch["x"][partner]
    y = batch["y"]
    return {**batch, "x": x, "y_other": y[partner], "share": share[:, 0]}


def token_dropout(batch, random):
    keep = random.uniform(batch["x"].shape[1]) > 0.15
    return {**batch, "x": torch.where(keep, batch["x"], 1) * batch.get("mask", torch.ones(()).bool())}


AUGMENTATIONS = {
    "gaussian": change_x(lambda x, r: x + 0.1 * r.normal(x[0].numel()).view(x.shape)),
    "power": change_x(lambda x, r: x * spread(0.5 + (r.uniform(2) ** 1.7).sum(1, keepdim=True), x)),
    "sigmoid": change_x(lambda x, r: x * torch.sigmoid(3 * spread(r.uniform(1), x) + x)),
    "matrix": change_x(matrix_product),
    "cutout": change_x(lambda x, r: x * (r.uniform(x[0].numel()).view(x.shape) > 0.2)),
    "roll": change_x(lambda x, r: torch.stack([row.roll(int(k), -1) for row, k in zip(x, r.integers(3)[:, 0])])),
    "flip": change_x(lambda x, r: torch.where(spread(r.integers(2), x) > 0, x, x.flip(-1))),
    "standardize": change_x(lambda x, r: (x - x.mean(0)) / (x.std(0, correction=0) + 0.5)),  # over the micro-batch
    "shift": change_x(lambda x, r: 0.7 * x + 0.3 * x.roll(1, 0)),
    "permutation": change_x(lambda x, r: 0.8 * x + 0.2 * x[torch.randperm(len(x))]),
    "randn_like": change_x(lambda x, r: x + 0.1 * torch.randn_like(x)),
    "mixup": mixup,
    "token_dropout": token_dropout,
}


# ---- flaws: a number near 0 to 1 that is not a function of the seed, the step and the micro-batch -------------------


def task_counter(task, x):
    task.times_called += 1
    return task.times_called % 7


def global_counter(task, x):
    global CALLS_OF_ALL
    CALLS_OF_ALL += 1
    return CALLS_OF_ALL % 7


def class_counter(task, x):
    type(task).total_calls += 1
    return task.total_calls % 7


def nested_counter(task, x):
    task.settings.count += 1
    return task.settings.count % 7


def task_memory(task, x):
    before = task.recent_means[-3:]
    task.recent_means.append(float(x.detach().float().abs().mean()))
    return max(-1.0, min(1.0, sum(before))) if before else 0.5


FLAWS = {
    "python_random": lambda task, x: python_random.random(),
    "numpy_random": lambda task, x: np.random.rand(),
    "task_generator": lambda task, x: torch.rand((), generator=task.my_generator),
    "task_random": lambda task, x: task.my_random.random(),
    "task_numpy": lambda task, x: task.my_numpy.random(),
    "global_generator": lambda task, x: torch.rand((), generator=GENERATOR_OF_ALL),
    "task_counter": task_counter,
    "global_counter": global_counter,
    "class_counter": class_counter,
    "nested_counter": nested_counter,
    "hidden_counter": lambda task, x: next_number() % 7,
    "hidden_start": lambda task, x: first_mean(x),
    "task_memory": task_memory,
    "rank": lambda task, x: dist.get_rank(),
    "clock": lambda task, x: time.perf_counter_ns() % 997 / 997,
}
