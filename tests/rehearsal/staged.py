"""A stage in this process: a small task and model, with a few lines in the place of DeepSpeed's engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.micro_batches import GlobalBatches, MicroBatches
from trainer.exact.plan import resolve
from trainer.exact.splits import Split
from trainer.ranks.place import Ranks
from trainer.rehearsal.stage import Stage, Subject

CPU = torch.device("cpu")
B, m, SAMPLES, STEPS = 12, 4, 30, 9  # 3 micro-batches a step; an epoch's last step has 6 samples in 2


class Task:
    """Keeps the promise. Tests change what they need."""

    def augment(self, batch: dict[str, Tensor], random: Any) -> dict[str, Tensor]:
        return {**batch, "x": batch["x"] + 0.1 * random.uniform(5)}

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return F.mse_loss(outputs[:, 0], batch["y"], reduction="sum"), len(outputs)


class Engine:
    """What a rehearsal asks of `engine.deepspeed_engine.Engine`."""

    zero_stage, compiled = 0, False

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {p: n for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names)
        self.momentum = {n: torch.ones_like(p) for p, n in self.names.items()}
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def state(self) -> dict[str, Tensor]:
        tensors = {f"parameter {n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= {f"buffer {n}": b for n, b in self.model.named_buffers()}
        return tensors | {f"optimizer {n}.momentum": t for n, t in self.momentum.items()}


def net() -> nn.Module:
    """With BatchNorm and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))


def staged(task: Any = None, model: nn.Module | None = None, first_step: int = 0, **split: Any) -> Stage:
    """A stage of one rank; needs a process group where `another_rank` is asked for."""
    task, model = task or Task(), model or net()
    generator = torch.Generator().manual_seed(1)
    arrays = {"x": torch.randn(SAMPLES, 5, generator=generator), "y": torch.randn(SAMPLES, generator=generator)}
    data = Split(arrays, **split)
    batches = GlobalBatches(
        data, CPU, seed=0, global_batch_size=B, micro_batch_size=m, drop_last=False, total_steps=STEPS
    )
    statistics = RunningStatistics(model)
    micro_batches = MicroBatches(task, model, data, device=CPU, seed=0, micro_batch_size=m)
    engine: Any = Engine(model)
    subject = Subject(
        task=task,
        engine=engine,
        batches=batches,
        micro_batches=micro_batches,
        statistics=statistics,
        host_split=data,
        split=data,
        plan=resolve(1, B, m, None),
        device=CPU,
        ranks=Ranks(),
    )
    return Stage(subject, first_step)
