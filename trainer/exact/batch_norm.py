"""BatchNorm's running statistics as a moving average over micro-batches, in the same order at every W.

In training a BatchNorm layer normalises with the statistics of the micro-batch it sees, whatever the
world size: that part needs nothing. Its running mean and variance are the problem, because a rank sees
only its own micro-batches. So during a step each layer writes a micro-batch's statistics into scratch
memory (its own update with momentum 1 leaves exactly those), they travel with the gradient exchange,
and after the step every rank applies the statistics of all M micro-batches.

The M updates r <- (1 - a) r + a s_j, j = 0..M-1, are applied as one weighted sum,
r <- (1 - a)^M r + sum_j a (1 - a)^(M-1-j) s_j: a few operations a step instead of M, which matters when
a rank has a single micro-batch. A layer that a micro-batch did not go through is left alone by it, as in
plain PyTorch: the weights count only the micro-batches that called the layer. One thing differs from
plain PyTorch: of a layer that one forward calls twice, the last call counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

# What scratch memory holds before a forward. A layer that is called leaves a variance of at least 0
# there (momentum 1 multiplies the old value by 0); one that is not leaves this.
_NOT_CALLED = -1.0


class RunningStatistics:
    """The running mean and variance of every normalisation layer that keeps them, in one flat buffer.

    `size` is the number of floats that a micro-batch's statistics take: mean, then variance, layer after
    layer. Around a step's micro-batches: `begin()`, after each forward `collect(out)`, at their end
    `settle()`, after the exchange `apply(all)`. Outside of begin/settle the model is as anyone expects it:
    evaluation, hashing and saving see the running statistics under their usual names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[_NormBase] = [
            m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None
        ]
        lengths = [m.num_features for m in self._modules for _ in range(2)]
        self.size = sum(lengths)
        self._momenta = [m.momentum for m in self._modules]
        self._own: list[dict[str, Tensor | None]] = []
        self._temporary: list[dict[str, Tensor | None]] = []
        if not self._modules:
            return
        first = self._modules[0].running_mean
        assert first is not None
        device, layers = first.device, len(self._modules)
        self._running = torch.empty(self.size, device=device)
        self._scratch = torch.full((self.size,), _NOT_CALLED, device=device)
        self._counters = torch.zeros(layers, dtype=torch.int64, device=device)
        # InstanceNorm has a counter, too, but PyTorch never moves it.
        self._counts = torch.tensor([isinstance(m, _BatchNorm) for m in self._modules], device=device)
        running = self._running.split(lengths)
        # Not plain views: those have one version counter, so an InstanceNorm that writes its own piece would look to
        # autograd as if it had changed what a BatchNorm saved for its backward.
        scratch = [piece.data for piece in self._scratch.split(lengths)]
        for i, module in enumerate(self._modules):
            mean, var, counter = module.running_mean, module.running_var, module.num_batches_tracked
            assert mean is not None and var is not None
            running[2 * i].copy_(mean)
            running[2 * i + 1].copy_(var)
            own: dict[str, Tensor | None] = {"running_mean": running[2 * i], "running_var": running[2 * i + 1]}
            if counter is not None:
                self._counters[i].copy_(counter)
                own["num_batches_tracked"] = self._counters[i]
            self._own.append(own)
            # Without its counter a layer spends no operation on it; `apply` counts for all ranks.
            temporary = {"running_mean": scratch[2 * i], "running_var": scratch[2 * i + 1]}
            self._temporary.append({**temporary, "num_batches_tracked": None})
            module._buffers.update(own)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        self._variance_at = starts[1::2].to(device)  # (L,) the first variance of each layer
        widths = torch.tensor([2 * m.num_features for m in self._modules])
        self._layer_of = torch.arange(layers).repeat_interleave(widths).to(device)  # (size,)
        # A cumulative average (momentum None) weighs all micro-batches alike; its `a` is not used.
        momenta = [0.5 if momentum is None else momentum for momentum in self._momenta]
        self._momentum = torch.tensor(momenta, device=device)
        self._keep = torch.tensor([1.0 - a for a in momenta], device=device)
        cumulative = [momentum is None for momentum in self._momenta]
        self._cumulative = torch.tensor(cumulative, device=device) if any(cumulative) else None
        self._later: dict[int, Tensor] = {}

    def begin(self, content: float = _NOT_CALLED) -> None:
        """Points the layers in training mode at scratch memory, which holds `content`."""
        if self._modules:
            self._scratch.fill_(content)
        for module, temporary in zip(self._modules, self._temporary):
            if module.training:
                module._buffers.update(temporary)
                module.momentum = 1.0

    def collect(self, out: Tensor) -> None:
        """Moves the statistics of the micro-batch just forwarded into `out`: (size,) float32."""
        out.copy_(self._scratch)
        self._scratch.fill_(_NOT_CALLED)

    def momentum_assigned(self) -> bool:
        """Between `begin` and `settle`: whether a forward has set a layer's momentum, so that nothing was collected."""
        return any(module.training and module.momentum != 1.0 for module in self._modules)

    def settle(self) -> None:
        """Gives the layers their running statistics back."""
        for module, own, momentum in zip(self._modules, self._own, self._momenta):
            module._buffers.update(own)
            module.momentum = momentum

    def apply(self, statistics: Tensor, skip: Tensor | None = None) -> None:
        """Applies one step's statistics.

        Args:
            statistics: (M, size) float32 of all micro-batches, in order.
            skip: a scalar on the device; where it is not 0, nothing changes (see `step.ExactStep` on losses that
                are not finite).
        """
        called = (statistics.index_select(1, self._variance_at) >= 0.0).float()  # (M, L)
        calls = called.sum(dim=0)  # (L,)
        # Calls after micro-batch j; sums of ones are exact in any order.
        after = self._later_than(len(statistics)) @ called  # (M, L)
        weights, decay = self._momentum * called * self._keep.pow(after), self._keep.pow(calls)
        if self._cumulative is not None:
            seen = self._counters.float()
            total = (seen + calls).clamp(min=1.0)
            weights = torch.where(self._cumulative, called / total, weights)
            decay = torch.where(self._cumulative & (calls > 0), seen / total, decay.masked_fill(calls == 0, 1.0))
        change = (statistics * weights.index_select(1, self._layer_of)).sum(dim=0)
        running = self._running * decay.index_select(0, self._layer_of) + change
        counted = torch.where(self._counts, calls, 0.0).to(torch.int64)
        if skip is not None:
            running = torch.where(skip > 0, self._running, running)
            counted = torch.where(skip > 0, torch.zeros_like(counted), counted)
        self._running.copy_(running)
        self._counters.add_(counted)

    def _later_than(self, count: int) -> Tensor:
        matrix = self._later.get(count)
        if matrix is None:
            ones = torch.ones(count, count, device=self._running.device)
            matrix = self._later[count] = ones.triu(diagonal=1)
        return matrix
