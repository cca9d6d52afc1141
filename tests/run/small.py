"""A run in this process: everything that `build` makes but DeepSpeed's engine, in whose place is a plain optimizer."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.keys import Config, parse
from trainer.engine.rates import Rates
from trainer.exact.micro_batches import GlobalBatches
from trainer.exact.splits import as_splits
from trainer.ranks.place import Ranks
from trainer.record.checkpoints import Snapshot
from trainer.record.console import DeepSpeedLog
from trainer.record.folder import OutputFolder
from trainer.run import build as build_module
from trainer.run.build import Pieces, measures_norms
from trainer.run.claim import Resume
from trainer.run.course import Course, set_out
from trainer.run.run import run

CPU = torch.device("cpu")


def config_of(**trainer: Any) -> Config:
    """3 epochs of 4 steps: 30 samples, 8 a step in 2 micro-batches, 6 in an epoch's last step. Keys as in jobs.py."""
    values: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "tensorboard": {"enabled": False},
    }
    top_level = set(Config.__dataclass_fields__) - {"trainer"}
    values |= {name: trainer.pop(name) for name in list(trainer) if name in top_level}
    values["trainer"] = {"task": "mine.py:Task", "epochs": 3, "log_every_steps": 2, "guard_every_steps": 0} | trainer
    return parse({name: value for name, value in values.items() if value is not None})


class Task:
    """Regression on two numbers, with all three splits."""

    notes = ("a note of the task",)

    def __init__(self, splits: Sequence[str] = ("train", "validation", "test")) -> None:
        self._splits = splits
        self.evaluated: list[int] = []  # samples, of each call of metrics

    def splits(self) -> dict[str, dict[str, Tensor]]:
        x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        y = x[:, 0] - x[:, 1]
        parts = {"train": slice(0, 30), "validation": slice(30, 40), "test": slice(40, 50)}
        return {name: {"x": x[parts[name]], "y": y[parts[name]]} for name in self._splits}

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.mse_loss(outputs[:, 0], batch["y"], reduction="sum"), len(outputs)

    def metrics(self, outputs: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
        self.evaluated.append(len(outputs))
        return {"error": (outputs[:, 0] - batch["y"]).abs().mean().item()}


class PlainEngine:
    """`deepspeed_engine.Engine` at ZeRO stage 0, with torch's SGD."""

    zero_stage, compiled, device = 0, False, CPU

    def __init__(self, model: nn.Module, rate: float = 0.1) -> None:
        self.model = self.forward_module = model
        self.names = {p: n for n, p in model.named_parameters()}
        self.parameters = list(self.names)
        self.optimizer = torch.optim.SGD(self.parameters, lr=rate, momentum=0.9)
        self._rate = rate

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def whole_parameters(self, change: bool = False) -> Iterator[None]:
        yield

    def model_state(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.model.named_parameters()} | dict(self.model.named_buffers())

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"{self.names[p]}.{k}": v for p, s in self.optimizer.state.items() for k, v in s.items()}
        return tensors, {}

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.model_state().items()}

    def load_state(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], values: dict[str, Any]) -> None:
        for name, tensor in self.model_state().items():
            tensor.copy_(model[name])
        for parameter, name in self.names.items():
            self.optimizer.state[parameter]["momentum_buffer"] = optimizer[f"{name}.momentum_buffer"]

    def state(self) -> dict[str, Tensor]:
        tensors = {f"parameter {n}": p.detach() for n, p in self.model.named_parameters()}
        tensors |= {f"buffer {n}": b for n, b in self.model.named_buffers()}
        return tensors | {f"optimizer {name}": tensor for name, tensor in self.optimizer_state()[0].items()}

    def skip_update_where(self, flag: Tensor) -> bool:
        return False

    def set_learning_rate(self, factor: float | None) -> float:
        self.optimizer.param_groups[0]["lr"] = self._rate * (1.0 if factor is None else factor)
        return float(self.optimizer.param_groups[0]["lr"])

    def use_gradient(self, flat: Tensor, views: list[Tensor]) -> None:
        for parameter, view in zip(self.parameters, views):
            parameter.grad = view

    def update(self, unused: Sequence[int] = ()) -> None:
        self.optimizer.step()


def engine_module() -> Any:
    """In place of `engine.deepspeed_engine`."""
    return SimpleNamespace(
        VERSION="0", builds_an_op=lambda config: False, Engine=lambda model, config, **sizes: PlainEngine(model)
    )


def pieces_of(config: Config, task: Any = None) -> Pieces:
    """What `build` gives, on one rank."""
    task = Task() if task is None else task
    plan = config.plan(1)
    splits = as_splits(task.splits(), type(task).__name__)
    per_epoch = -(-len(splits["train"]) // plan.global_batch_size)
    total = min(per_epoch * config.trainer.epochs, config.trainer.max_steps or 10**9)
    batches = GlobalBatches(
        splits["train"],
        CPU,
        seed=config.trainer.seed,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        drop_last=config.trainer.drop_last,
        total_steps=total,
        counted=measures_norms(config),
    )
    model = task.model()
    model.train()
    return Pieces(
        config=config,
        ranks=Ranks(),
        plan=plan,
        task=task,
        device=CPU,
        host_splits=splits,
        splits=splits,
        batches=batches,
        engine=PlainEngine(model, config.optimizer.params["lr"]),  # type: ignore[arg-type]
        rates=Rates(config, plan, per_epoch, total),
        inexact=[],
        facts={"torch": torch.__version__, "device_model": "a processor"},
        hosts=["here cpu"],
    )


_open: list[tuple[Course, DeepSpeedLog]] = []


def course_of(
    folder: Path, task: Any = None, snapshot: Snapshot | None = None, trace: Any = None, **trainer: Any
) -> Course:
    """A run before its first step, its files in `folder`. It is asked to stop by setting `watch.stop_reason`."""
    pieces = pieces_of(config_of(**trainer), task)
    claimed = OutputFolder.claim(str(folder), "test")
    watch: Any = SimpleNamespace(step=0, stop_reason=None)
    log = DeepSpeedLog(keep=True)
    course = set_out(pieces, claimed, log, watch, snapshot, trace, time.time(), time.monotonic())
    _open.append((course, log))
    return course


def make(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    task: Any = None,
    trace: Any = None,
    resume: str = "none",
    allow: bool = False,
    **trainer: Any,
) -> dict[str, Any]:
    """A whole run in `folder`; its summary. It needs the fixture `plain_engine`."""
    monkeypatch.setattr(build_module, "load_task", lambda name, options: Task() if task is None else task)
    # A run holds its folder until its process ends, and here all runs are of one process.
    monkeypatch.setattr("trainer.record.folder._lock", lambda path: None)
    config = config_of(output_dir=str(folder), **trainer)
    return run(config, Ranks(), config_name="test", started_at_s=time.time(), trace=trace, resume=Resume(resume, allow))


def records(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        while _open:
            course, log = _open.pop()
            course.record.close()
            log.close()
        dist.destroy_process_group()
