"""BatchNorm's running statistics as a moving average over micro-batches, in the same order at every W.

In training a BatchNorm layer normalises with the statistics of the micro-batch it sees. That is the same at
every world size. Its running mean and variance are the problem: a rank sees only its own micro-batches.
So during a step each layer writes a micro-batch's statistics into scratch memory: with momentum 1, its own
update leaves exactly those. They travel with the gradient exchange. After the step every rank applies the
statistics of all M micro-batches.

The M updates r <- (1 - a) r + a s_j, j = 0..M-1, are applied as one weighted sum,
r <- (1 - a)^M r + sum_j a (1 - a)^(M-1-j) s_j. This takes a few operations a step instead of M, which matters
when a rank has a single micro-batch. A micro-batch that does not call a layer leaves its statistics alone, as
in plain PyTorch: the weights count only the micro-batches that called the layer. One thing differs from plain
PyTorch: if one forward calls a layer twice, only the last call counts.
"""

from __future__ import annotations

import bisect
import itertools

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..errors import UserError

# What scratch memory holds before a forward. A layer that is called replaces it with a variance of at least 0
# (momentum 1 multiplies the old value by 0). So a negative variance says that the layer was not called. The number is
# large and yet finite: a loss that is computed from it, by mistake, is seldom finite. (Another BatchNorm may hide it.)
_NOT_CALLED = -3e38


class RunningStatistics:
    """The running mean and variance of every normalisation layer that keeps them, in one flat buffer.

    `size` is the number of floats of a micro-batch's statistics: mean, then variance, layer after layer.

    In a step, call `begin()` before the micro-batches, `collect(out)` after each forward, `settle()` after the
    last micro-batch, and `apply(all)` after the exchange. Outside of begin and settle, the model's buffers hold the
    running statistics under their usual names, for evaluation, hashing and saving.
    """

    def __init__(self, model: nn.Module) -> None:
        found = {n: m for n, m in model.named_modules() if isinstance(m, _NormBase) and m.running_mean is not None}
        self._names, self._modules = list(found), list(found.values())
        self._trained = [False] * len(found)  # in this step: whether the layer was in training mode when it began
        lengths = [m.num_features for m in self._modules for _ in range(2)]  # mean and variance of each layer
        self._lengths, self._starts = lengths, [0, *itertools.accumulate(lengths)][:-1]
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
        # InstanceNorm has a counter, too, but PyTorch never increases it.
        counts = [isinstance(m, _BatchNorm) for m in self._modules]
        self._counts = None if all(counts) else torch.tensor(counts, dtype=torch.float32, device=device)
        running = self._running.split(lengths)
        # `.data` gives each piece a version counter of its own. Plain views share one: if an InstanceNorm wrote its
        # piece, autograd would believe that the tensors which a BatchNorm saved for its backward had changed.
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
            # Without a counter, a layer saves the operation that increases it. `apply` counts for all ranks.
            # A SyncBatchNorm refuses to run without one, and gets a scratch counter.
            spare = torch.zeros_like(counter) if isinstance(module, nn.SyncBatchNorm) and counter is not None else None
            temporary = {"running_mean": scratch[2 * i], "running_var": scratch[2 * i + 1]}
            self._temporary.append({**temporary, "num_batches_tracked": spare})
            # Straight into `_buffers`, here and in each step: setattr on a module would do the same, but slowly.
            module._buffers.update(own)
        self._variance_at = torch.tensor(self._starts[1::2], device=device)  # (L,) the first variance of each layer
        widths = torch.tensor([2 * m.num_features for m in self._modules])
        self._layer_of = torch.arange(layers).repeat_interleave(widths).to(device)  # (size,)
        # Momentum None asks for a cumulative average, which weighs all micro-batches equally: its 0.5 is not used.
        momenta = [0.5 if momentum is None else momentum for momentum in self._momenta]
        self._momentum = torch.tensor(momenta, device=device)
        self._keep = torch.tensor([1.0 - a for a in momenta], device=device)
        cumulative = [momentum is None for momentum in self._momenta]
        self._cumulative = torch.tensor(cumulative, device=device) if any(cumulative) else None
        self._later: dict[int, Tensor] = {}

    def begin(self, content: float = _NOT_CALLED) -> None:
        """Points the layers in training mode at scratch memory, filled with `content`."""
        if self._modules:
            self._scratch.fill_(content)
        self._trained = [module.training for module in self._modules]
        for module, temporary in zip(self._modules, self._temporary):
            if module.training:  # a layer in evaluation mode reads its running statistics and writes none
                module._buffers.update(temporary)
                module.momentum = 1.0

    def collect(self, out: Tensor) -> None:
        """Moves the statistics of the latest forward into `out`: (size,) float32."""
        # Once a micro-batch, before the next forward: that one would write over them.
        out.copy_(self._scratch)
        self._scratch.fill_(_NOT_CALLED)

    def scratch_blocks(self, g: int) -> Tensor:
        """Scratch memory for several micro-batches: (g * size,) float32. Each buffer has a block of (g, features)."""
        if not self.size:
            return torch.empty(0)
        return self._scratch.new_full((g * self.size,), _NOT_CALLED)

    def scratch_piece(self, buffer: Tensor, blocks: Tensor) -> Tensor | None:
        """What `scratch_blocks` has for a layer's buffer: (g, features). None if the buffer is not in scratch."""
        if not self.size or buffer.dim() != 1:
            return None
        base = self._scratch
        # A pack sees only the tensor that a layer hands to torch. So the buffer is recognised by its memory.
        place = buffer.data_ptr() - base.data_ptr()
        if not 0 <= place < base.numel() * base.element_size() or buffer.device != base.device:
            return None
        place //= base.element_size()
        number = bisect.bisect(self._starts, place) - 1
        first = place - self._starts[number]
        return self._block(number, blocks)[:, first : first + buffer.numel()]

    def rows_of(self, blocks: Tensor, g: int) -> Tensor:
        """What `scratch_blocks` has of each of g micro-batches: (g, size)."""
        if not self.size:
            return blocks.new_empty(g, 0)
        return torch.cat([self._block(number, blocks) for number in range(len(self._lengths))], dim=1)

    def _block(self, number: int, blocks: Tensor) -> Tensor:
        """The block of a buffer: (g, features)."""
        g = blocks.numel() // self.size
        return blocks.narrow(0, g * self._starts[number], g * self._lengths[number]).view(g, -1)

    def objection(self) -> str | None:
        """What a forward has done that spoils the statistics, in words; None if nothing. Between `begin` and `settle`.

        A layer that leaves training mode reads scratch memory. A layer that enters it writes its running statistics, on
        each rank with those of the rank's own micro-batches.
        """
        for name, module, trained in zip(self._names, self._modules, self._trained):
            if module.training != trained:
                kind = type(module).__name__
                return (
                    f"changes the mode of {name or kind} ({kind}) in its forward, by train() or eval(). During a step "
                    "its running statistics are not available.\nFor frozen statistics give the layer a train() that "
                    "keeps it in evaluation mode, or use trainer.freeze."
                )
            if trained and module.momentum != 1.0:
                return (
                    "sets the momentum of a normalisation layer in its forward. The layer's statistics are collected "
                    "there, and would be lost. Set the momentum in model()."
                )
        return None

    def lost(self) -> str | None:
        """What a forward has done to the statistics, in words; None if nothing. After the forward, before `collect`.

        Waits for the device. A momentum other than 1 leaves a part of what scratch memory held.
        """
        if not self._modules:
            return None
        first = self._scratch.index_select(0, self._variance_at)
        for name, spoiled in zip(self._names, ((first < 0) & (first != _NOT_CALLED)).tolist()):
            if spoiled:
                return (
                    f"calls F.batch_norm with the running statistics of {name or 'the model'} and a momentum of its "
                    "own. They are collected with the layer's, and would be lost.\nCall the layer itself, or pass "
                    "layer.momentum."
                )
        return None

    def check(self, step: int) -> None:
        """Raises UserError if there is an objection. Call it before step `step` (counted from 0) changes anything."""
        if (objection := self.objection()) is not None:
            raise UserError(f"The task {objection}\nStep {step + 1:,} was not made.")

    def settle(self) -> None:
        """Gives the layers their running statistics back."""
        for module, own, momentum in zip(self._modules, self._own, self._momenta):
            module._buffers.update(own)
            module.momentum = momentum

    def apply(self, statistics: Tensor, skip: Tensor | None = None) -> None:
        """Applies one step's statistics.

        Args:
            statistics: (M, size) float32 of all micro-batches, in order.
            skip: () on the device. If it is not 0, nothing changes (see `step.ExactStep` on losses that are not
                finite).
        """
        called = statistics.index_select(1, self._variance_at).ge_(0.0)  # (M, L)
        # Calls after micro-batch j, and all calls. A matrix product may add in any order, but sums of ones are exact in
        # every order. One product for both is one kernel less on a GPU.
        counts = self._later_than(len(statistics)) @ called  # (M + 1, L)
        after, calls = counts[:-1], counts[-1]  # (M, L), (L,)
        # A micro-batch's weight falls by (1 - a) with each later call; the old value's falls with every call.
        weights, decay = self._momentum * called * self._keep.pow(after), self._keep.pow(calls)
        if self._cumulative is not None:
            # The mean of n old and k new values: n / (n + k) times the old mean, plus 1 / (n + k) times each new one.
            seen = self._counters.float()
            total = (seen + calls).clamp(min=1.0)
            weights = torch.where(self._cumulative, called / total, weights)
            decay = torch.where(self._cumulative & (calls > 0), seen / total, decay.masked_fill(calls == 0, 1.0))
        # (M, size) at every world size, so this sum adds in the same order on every rank.
        change = (statistics * weights.index_select(1, self._layer_of)).sum(dim=0)
        running = self._running * decay.index_select(0, self._layer_of)
        counted = calls if self._counts is None else calls * self._counts
        if skip is None:
            torch.add(running, change, out=self._running)
        else:  # chosen on the device: the host would have to wait for the flag
            skipped = skip > 0
            torch.where(skipped, self._running, running.add_(change), out=self._running)
            counted = counted.masked_fill(skipped, 0.0)
        self._counters.add_(counted.to(torch.int64))

    def _later_than(self, count: int) -> Tensor:
        """(M + 1, M) float32: 1 where the column's micro-batch comes after the row's, else 0; the last row is all 1."""
        matrix = self._later.get(count)
        if matrix is None:
            ones = torch.ones(count, count, device=self._running.device)
            matrix = self._later[count] = torch.cat([ones.triu(diagonal=1), ones[:1]])
        return matrix
