"""BatchNorm's running statistics as a moving average over micro-batches, in the same order at every W.

In training a BatchNorm layer normalises with the statistics of the micro-batch it sees, whatever the
world size: that part needs nothing. Its running mean and variance are the problem, because a rank sees
only its own micro-batches. So during a step each layer writes a micro-batch's statistics into scratch
memory (its own update with momentum 1 leaves exactly those), they travel with the gradient exchange,
and after the step every rank applies the statistics of all M micro-batches.

The M updates r <- (1 - a) r + a s_j, j = 0..M-1, are applied as one weighted sum,
r <- (1 - a)^M r + sum_j a (1 - a)^(M-1-j) s_j: two operations a step instead of M, which matters when a
rank has a single micro-batch. The weights are computed in float64; the sum has the same shape and
order at every W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """The running mean and variance of every normalisation layer that keeps them, in one flat buffer.

    `size` is the number of floats that a micro-batch's statistics take. Around a step's micro-batches:
    `begin()`, after each forward `collect()`, at their end `settle()`, after the exchange `apply(all)`.
    Outside of begin/settle the model is as anyone expects it: evaluation, hashing and saving see the
    running statistics under their usual names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[_NormBase] = [
            m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None
        ]
        lengths = [m.num_features for m in self._modules for _ in range(2)]
        self.size = sum(lengths)
        self._momenta = [m.momentum for m in self._modules]
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._scratch: Tensor | None = None
        if not self._modules:
            return
        first = self._modules[0].running_mean
        assert first is not None
        self._running = torch.empty(self.size, device=first.device)
        self._scratch = torch.zeros(self.size, device=first.device)
        running, scratch = self._running.split(lengths), self._scratch.split(lengths)
        self._own: list[dict[str, Tensor | None]] = []
        self._temporary: list[dict[str, Tensor | None]] = []
        for i, module in enumerate(self._modules):
            mean, var = module.running_mean, module.running_var
            assert mean is not None and var is not None
            running[2 * i].copy_(mean)
            running[2 * i + 1].copy_(var)
            own = {"running_mean": running[2 * i], "running_var": running[2 * i + 1]}
            self._own.append({**own, "num_batches_tracked": module.num_batches_tracked})
            # Without the counter a layer neither counts (the total of all ranks is added in `apply`) nor
            # spends an operation on it.
            temporary = {"running_mean": scratch[2 * i], "running_var": scratch[2 * i + 1]}
            self._temporary.append({**temporary, "num_batches_tracked": None})
            module._buffers.update(self._own[i])
        counters = [m.num_batches_tracked for m in self._modules if m.num_batches_tracked is not None]
        self._counters: list[Tensor] = counters
        self._seen = int(counters[0]) if counters else 0

    def begin(self) -> None:
        """Points the layers in training mode at scratch memory."""
        for module, temporary in zip(self._modules, self._temporary if self._modules else ()):
            if module.training:
                module._buffers.update(temporary)
                module.momentum = 1.0

    def collect(self) -> Tensor | None:
        """The statistics of the micro-batch just forwarded: (size,) float32, valid until the next forward."""
        return self._scratch

    def settle(self) -> None:
        """Gives the layers their running statistics back."""
        for module, own, momentum in zip(self._modules, self._own if self._modules else (), self._momenta):
            module._buffers.update(own)
            module.momentum = momentum

    def apply(self, statistics: Tensor, skip: Tensor | None = None) -> None:
        """Applies one step's statistics.

        Args:
            statistics: (M, size) float32 of all micro-batches, in order.
            skip: a scalar on the device; where it is not 0, nothing changes (see run.py on non-finite losses).
        """
        count = len(statistics)
        weights, decay = self._weights_for(count)
        change = (statistics * weights).sum(dim=0)
        if skip is None:
            self._running.mul_(decay).add_(change)
            if self._counters:
                torch._foreach_add_(self._counters, count)
        else:
            self._running.copy_(torch.where(skip > 0, self._running, self._running * decay + change))
            counted = (count * (1.0 - skip)).to(torch.int64)
            for counter in self._counters:
                counter.add_(counted)
        self._seen += count

    def _weights_for(self, count: int) -> tuple[Tensor, Tensor]:
        cached = self._weights.get(count)
        if cached is not None:
            return cached
        columns, decays = [], []
        for module, momentum in zip(self._modules, self._momenta):
            if not module.training:  # a frozen layer keeps what it has
                column, decay = [0.0] * count, 1.0
            elif momentum is None:  # a cumulative average: every micro-batch ever seen weighs the same
                column, decay = [1.0 / (self._seen + count)] * count, self._seen / (self._seen + count)
            else:
                column = [momentum * (1.0 - momentum) ** (count - 1 - j) for j in range(count)]
                decay = (1.0 - momentum) ** count
            width = 2 * module.num_features
            columns.append(torch.tensor(column, dtype=torch.float64)[:, None].expand(count, width))
            decays.append(torch.tensor([decay], dtype=torch.float64).expand(width))
        device = self._running.device
        weights = torch.cat(columns, dim=1).float().to(device), torch.cat(decays).float().to(device)
        if None not in self._momenta:
            self._weights[count] = weights
        return weights
