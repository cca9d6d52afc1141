"""Short runs with packs and without, on one rank, with a plain optimizer in DeepSpeed's place."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.test_step import CPU, PlainSGD
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.micro_batches import GlobalBatches, MicroBatches
from trainer.exact.packs.packs import Packs
from trainer.exact.splits import Split
from trainer.exact.step import ExactStep
from trainer.ranks.place import Ranks

B, m, SAMPLES, STEPS = 32, 4, 72, 5  # 8 micro-batches a step, and a last step of 8 samples in 2


class InOneCall:
    """As `Task`, with the losses of all samples in one call."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return self.sample_losses(outputs, batch).sum(), len(outputs)

    def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(outputs.flatten(1).sum(1), batch["y"], reduction="none")


class Task:
    """Regression on whatever the model returns."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.mse_loss(outputs.flatten(1).sum(1), batch["y"], reduction="sum"), len(outputs)


def made(
    model: nn.Module,
    x: Tensor,
    size: int | None,
    task: Any = None,
    micro_batch_size: int = m,
    lengths: Tensor | None = None,
    ranks: Ranks | None = None,
    bucket_bytes: int | None = None,
    **options: Any,
) -> tuple[ExactStep, Any]:
    """A step with packs of at most `size` micro-batches (0: none; None: auto), and the batches."""
    y = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1))
    split = Split({"x": x, "y": y}, lengths=lengths, padded=() if lengths is None else ("x",))
    sizes = {"micro_batch_size": micro_batch_size}
    batches = GlobalBatches(split, CPU, seed=0, drop_last=False, total_steps=STEPS, global_batch_size=B, **sizes)
    optimizer, statistics = PlainSGD(model, 0.01), RunningStatistics(model)
    optimizer.parameters = [p for p in optimizer.parameters if p.requires_grad]
    micro_batches = MicroBatches(
        task or Task(), model, split, device=CPU, seed=0, micro_batch_size=micro_batch_size, **options
    )
    leaves = batches.micro_batch_counts()
    step = ExactStep(
        optimizer,
        micro_batches,
        statistics,
        ranks=ranks or Ranks(),
        leaves=leaves,
        device=CPU,
        measures_norms=True,
        bucket_bytes=bucket_bytes,
    )
    if size != 0:
        step.own_block.packs = Packs(micro_batches, optimizer.parameters, model, statistics, CPU, size, steps=1000)
    return step, batches


def trained(model: nn.Module, x: Tensor, size: int | None, **options: Any) -> tuple[list[Any], Packs | None]:
    """Everything that a short run finds, and its packs."""
    model = copy.deepcopy(model)
    step, batches = made(model, x, size, **options)
    found: list[Any] = []
    for batch in batches.starting_at(0):
        result = step(batch)
        found += [result.losses.tolist(), float(result.norm), result.norms.tolist()]
        found += [view.tolist() for view in step.gradient_views]
    return found + [tensor.tolist() for tensor in model.state_dict().values()], step.own_block.packs


def floats(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(2))


def dense() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 1))
    model[2].weight.requires_grad_(False)
    return nn.Sequential(model, nn.utils.parametrizations.weight_norm(nn.Linear(1, 2)))
