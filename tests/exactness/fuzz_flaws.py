"""Layers that carry something from one micro-batch to the next, and layers that only look as if they did.

The flawed ones break the promise, each in one way that a user's layer may have. The innocent ones keep it.
"""

import random
import time

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class FlawedCounter(nn.Module):
    """Counts its calls in a plain attribute, and computes with the count."""

    def __init__(self):
        super().__init__()
        self.calls_so_far = 0

    def forward(self, x):
        self.calls_so_far += 1
        return x * (1 + 0.05 * (self.calls_so_far % 7))


class FlawedBuffer(nn.Module):
    """Keeps a moving average in a buffer of its own, and subtracts it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("own_average", torch.zeros(()))

    def forward(self, x):
        self.own_average.mul_(0.9).add_(0.1 * x.detach().mean())
        return x - self.own_average


class FlawedTally(nn.Module):
    """Counts its calls in a buffer that is saved with the model."""

    def __init__(self):
        super().__init__()
        self.register_buffer("own_tally", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.own_tally += 1
        return x


class FlawedSpectral(nn.Module):
    """torch's spectral_norm: every forward moves the vectors of its power iteration, which are buffers."""

    def __init__(self, features):
        super().__init__()
        self.inner = spectral_norm(nn.Linear(features, features))

    def forward(self, x):
        return self.inner(x)


class FlawedWriter(nn.Module):
    """Its forward shrinks its own weight."""

    def __init__(self, features):
        super().__init__()
        self.shrinking = nn.Parameter(torch.ones(features))

    def forward(self, x):
        with torch.no_grad():
            self.shrinking.mul_(0.97)
        return x * self.shrinking


class FlawedStart(nn.Module):
    """Takes its first scale from the first micro-batch that it sees, as ActNorm does."""

    def __init__(self, features):
        super().__init__()
        self.first_scale, self.started = nn.Parameter(torch.ones(features)), False

    def forward(self, x):
        if not self.started:
            with torch.no_grad():
                self.first_scale.copy_(1 / (0.5 + x.detach().abs().flatten(0, -2).mean(0)))
            self.started = True
        return x * self.first_scale


class FlawedGenerator(nn.Module):
    """Draws from a generator of its own that runs on."""

    def __init__(self):
        super().__init__()
        self.own_generator = torch.Generator().manual_seed(5)

    def forward(self, x):
        return x * (1 + 0.1 * torch.rand((), generator=self.own_generator))


class FlawedMemory(nn.Module):
    """Compares with the samples of micro-batches before, as a memory bank does."""

    def __init__(self):
        super().__init__()
        self.memory_bank = []

    def forward(self, x):
        before = self.memory_bank[-3:]
        self.memory_bank.append(x.detach().abs().mean())
        return x - 0.2 * torch.stack(before).mean() if before else x


# ---- what only looks like a flaw ---------------------------------------------------------------------------------


class InnocentCounter(nn.Module):
    """Counts calls, widths and time, for people; draws a name. No number of the model depends on it."""

    def __init__(self):
        super().__init__()
        self.calls, self.widths, self.seconds, self.tag = 0, [], 0.0, ""

    def forward(self, x):
        began_s = time.perf_counter()
        self.calls += 1
        self.widths.append(x.shape[-1])
        self.tag = f"{random.random():.3f}"
        self.seconds += time.perf_counter() - began_s
        return x


class InnocentTable(nn.Module):
    """Makes a table when it first needs it, longer when it has to be: the same numbers whoever asks first."""

    def __init__(self):
        super().__init__()
        self.table = torch.zeros(0)

    def forward(self, x):
        places = x.shape[1]
        if len(self.table) < places:
            self.table = torch.cos(torch.arange(places, dtype=torch.float32))
        return x * (1 + 0.1 * self.table[:places].view(1, -1, *[1] * (x.ndim - 2)))


class InnocentGenerator(nn.Module):
    """Draws from generators that it seeds alike at each call."""

    def forward(self, x):
        noise = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(11))
        return x + 0.1 * noise.to(x.dtype) * random.Random(3).random()
