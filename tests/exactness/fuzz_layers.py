"""The layers that random tasks are made of, each described by a JSON block.

A block is {"nn": a class of torch.nn, "args": [...], "options": {...}} or {"own": a class of this file or of
fuzz_flaws.py, ...}, whose other keys are its arguments. These files are neighbours of random_task.py, as a user's own
modules are.
"""

import fuzz_flaws
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def make(block):
    """The module that a JSON block describes."""
    if "nn" in block:
        return getattr(nn, block["nn"])(*block.get("args", ()), **block.get("options", {}))
    arguments = {name: value for name, value in block.items() if name != "own"}
    return (globals().get(block["own"]) or getattr(fuzz_flaws, block["own"]))(**arguments)


def call(module, x, mask):
    """Calls a module; those of this file that look at padding take the mask, (B, T) bool or None, as well."""
    return module(x, mask) if getattr(module, "takes_mask", False) else module(x)


def zoom(x):
    """Interpolated to twice the size and averaged back; vectors as they are."""
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}.get(x.ndim)
    if mode is None:
        return x
    return {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim](F.interpolate(x, scale_factor=2, mode=mode), 2)


def attend(x):
    """Scaled dot-product attention of places, with dropout; only of (B, T, C)."""
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1) if x.ndim == 3 else torch.tanh(x)


# Elementwise or along the last dimension; each is bounded enough not to explode in a few layers.
FUNCTIONS = {
    "sinh": lambda x: torch.sinh(x.clamp(-2.5, 2.5)),
    "power": lambda x: (x.abs() + 0.1) ** 1.7,
    "atan2": lambda x: torch.atan2(x, x.roll(1, -1) + 1.5),
    "bump": lambda x: torch.exp(-x * x),
    "softmax": lambda x: x * torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "cumsum": lambda x: 0.3 * x.cumsum(-1),
    "erf": torch.erf,
    "log1p": lambda x: torch.log1p(x.abs()),
    "rsqrt": lambda x: x * torch.rsqrt(x * x + 0.3),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "sort": lambda x: x.sort(-1).values,
    "fourier": lambda x: torch.fft.fft(x.float(), dim=-1).real.to(x.dtype) / max(1, x.shape[-1]) ** 0.5,
    "neighbours": lambda x: x - 0.5 * x.mean(0, keepdim=True),  # of the micro-batch
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "expm1": lambda x: torch.expm1(x.clamp(-3, 2)),
    "asinh": torch.asinh,
    "lgamma": lambda x: torch.lgamma(x.abs() + 1).clamp(max=3),
    "std": lambda x: x / (x.std(-1, keepdim=True, correction=0) + 1),
    "median": lambda x: x - x.median(-1, keepdim=True).values,
    "scatter": lambda x: torch.zeros_like(x).scatter_add(-1, x.argsort(-1) // 2, x),
    "cummax": lambda x: x.cummax(-1).values,
    "gather": lambda x: x.gather(-1, x.argsort(dim=-1, stable=True)),
    "gated": lambda x: F.glu(torch.cat([x, x.flip(-1)], -1), -1),
    "zoom": zoom,
    "attend": attend,
    "log_sum_exp": lambda x: x - torch.logsumexp(x, -1, keepdim=True),
}


class Function(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return FUNCTIONS[self.name](x)


class Sandwich(nn.Module):
    """A layer on channels, (B, C, T), among layers on features, (B, T, C); or the other way round."""

    def __init__(self, inner):
        super().__init__()
        self.inner = make(inner)

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Turn(nn.Module):
    """(B, C, ...) -> (B, T, C) with all places in a row."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Residual(nn.Module):
    takes_mask = True

    def __init__(self, layers, in_place=False, skipped=0.0):
        super().__init__()
        self.layers, self.in_place, self.skipped = nn.ModuleList(map(make, layers)), in_place, skipped

    def forward(self, x, mask=None):
        if self.training and self.skipped and torch.rand(()) < self.skipped:  # stochastic depth
            return x
        y = x
        for layer in self.layers:
            y = call(layer, y, mask)
        if self.in_place:
            y = y * 1.0
            y += x
            return y
        return x + y


class Twice(nn.Module):
    """One layer, and so one set of weights, called two times."""

    takes_mask = True

    def __init__(self, layer):
        super().__init__()
        self.layer = make(layer)

    def forward(self, x, mask=None):
        return call(self.layer, torch.tanh(call(self.layer, x, mask)), mask)


class Tied(nn.Module):
    """Two linear layers that share one weight."""

    def __init__(self, features):
        super().__init__()
        self.inner, self.outer = nn.Linear(features, features), nn.Linear(features, features, bias=False)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


class SelfBilinear(nn.Module):
    def __init__(self, features, out):
        super().__init__()
        self.inner = nn.Bilinear(features, features, out)

    def forward(self, x):
        return self.inner(x, x)


class Gram(nn.Module):
    """Batched matrix products: (B, T, C) -> (B, T, C)."""

    def forward(self, x):
        return torch.tanh(x @ x.transpose(1, 2) / x.shape[1]) @ x


class Mixing(nn.Module):
    """A learned matrix between all places: torch.einsum."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, features) / features**0.5)

    def forward(self, x):
        return torch.einsum("b...c,cd->b...d", x, self.weight)


class Parametrized(nn.Module):
    """A linear layer under torch's weight_norm."""

    def __init__(self, features, out):
        super().__init__()
        self.inner = weight_norm(nn.Linear(features, out))

    def forward(self, x):
        return self.inner(x)


class Gain(nn.Module):
    """A parameter without dimensions, and one of length 1."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.gain + self.shift


class Scale(nn.Module):
    """Bare parameters: samples are multiplied with one, and another is added; RMSNorm as transformers writes it."""

    def __init__(self, features, ones, norm):
        super().__init__()
        shape = (1,) * ones + (features,)
        self.scale, self.shift, self.norm = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape)), norm

    def forward(self, x):
        if self.norm:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.scale * x + self.shift


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.never = nn.Linear(3, 2)

    def forward(self, x):
        return x


class Sometimes(nn.Module):
    """A layer that only micro-batches with a large first feature go through: it depends on data."""

    def __init__(self, features, above):
        super().__init__()
        self.rare, self.above = nn.Linear(features, features), above

    def forward(self, x):
        return x + self.rare(x) if x[..., 0].max() > self.above else x


class Recurrent(nn.Module):
    def __init__(self, kind, features, hidden, options):
        super().__init__()
        self.inner = getattr(nn, kind)(features, hidden, batch_first=True, **options)

    def forward(self, x):
        return self.inner(x)[0]


class Attention(nn.Module):
    takes_mask = True

    def __init__(self, features, heads, dropout, weights=False):
        super().__init__()
        self.inner = nn.MultiheadAttention(features, heads, dropout=dropout, batch_first=True)
        self.weights = weights

    def forward(self, x, mask=None):
        padding = None if mask is None else ~mask
        return x + self.inner(x, x, x, key_padding_mask=padding, need_weights=self.weights)[0]


class Encoder(nn.Module):
    takes_mask = True

    def __init__(self, features, heads, options):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(features, heads, batch_first=True, **options)

    def forward(self, x, mask=None):
        return self.inner(x, src_key_padding_mask=None if mask is None else ~mask)


class Position(nn.Module):
    def __init__(self, places, features):
        super().__init__()
        self.table = nn.Embedding(places, features)

    def forward(self, x):
        return x + self.table(torch.arange(x.shape[1], device=x.device))


class Pool(nn.Module):
    """(B, T, C) -> (B, C), without the padding."""

    takes_mask = True

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x, mask=None):
        weight = torch.ones(x.shape[:2], device=x.device) if mask is None else mask.to(torch.float32)
        if self.how == "mean":
            return (x * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
        if self.how == "max":
            return x.masked_fill(weight[..., None] == 0, -9.0).amax(1)
        last = weight.sum(1).long() - 1
        return x[torch.arange(len(x), device=x.device), last]


class Bag(nn.Module):
    """nn.EmbeddingBag over (B, T) tokens, where padding is token 0."""

    def __init__(self, vocabulary, features, mode, weighted=False):
        super().__init__()
        self.inner, self.weighted = nn.EmbeddingBag(vocabulary, features, mode=mode, padding_idx=0), weighted

    def forward(self, x):
        weights = 0.1 + 0.05 * (x % 5).to(self.inner.weight.dtype) if self.weighted else None
        return self.inner(x, per_sample_weights=weights)


class Tokens(nn.Module):
    def __init__(self, vocabulary, features, options):
        super().__init__()
        self.inner = nn.Embedding(vocabulary, features, **options)

    def forward(self, x):
        return self.inner(x)


class Gaussian(nn.Module):
    """A variational bottleneck; what it costs stays in an attribute until the loss of the same micro-batch takes it."""

    def __init__(self, features):
        super().__init__()
        self.mean, self.log_variance, self.kl = nn.Linear(features, features), nn.Linear(features, features), None

    def forward(self, x):
        mean, log_variance = self.mean(x), self.log_variance(x).clamp(-4, 4)
        kl = 0.5 * (mean * mean + log_variance.exp() - log_variance - 1)
        self.kl = kl.flatten(1).sum(1)
        return mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean) if self.training else mean
