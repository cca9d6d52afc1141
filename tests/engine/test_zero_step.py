"""The step at ZeRO stages 1 to 3, with a few lines in the place of DeepSpeed's engine: what it is given, and gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.engine.zero_step import ZeroStep
from trainer.errors import NonFiniteError
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.micro_batches import GlobalBatches, MicroBatches
from trainer.exact.splits import Split
from trainer.ranks.place import Ranks

CPU = torch.device("cpu")
B, m, SAMPLES = 12, 4, 30  # 3 micro-batches a step, and a last step of 6 samples in 2

pytestmark = pytest.mark.usefixtures("one_thread")


class Task:
    scale = 1.0

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return self.scale * F.mse_loss(outputs[:, 0], batch["y"], reduction="sum"), len(outputs)


class Engine:
    """Goes backward through each loss, as DeepSpeed does, and keeps what it was given."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.factor: float | None = None

    def set_learning_rate(self, factor: float | None) -> float:
        self.factor = factor
        return 0.1 * (1.0 if factor is None else factor)

    def zero_step(self, losses: Iterator[Tensor]) -> Tensor:
        for loss in losses:
            loss.backward()
            self.losses.append(float(loss.detach()))
        return torch.tensor(0.5)


def made(ranks: Ranks = Ranks(), task: Task | None = None) -> tuple[ZeroStep, Engine, nn.Module, GlobalBatches]:  # noqa: B008
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, 5, generator=generator), torch.randn(SAMPLES, generator=generator)
    split, engine = Split({"x": x, "y": y}), Engine()
    sizes: dict[str, int] = {"global_batch_size": B, "micro_batch_size": m}
    batches = GlobalBatches(split, CPU, seed=0, drop_last=False, total_steps=9, **sizes)
    micro_batches = MicroBatches(task or Task(), model, split, device=CPU, seed=0, micro_batch_size=m)
    statistics: Any = RunningStatistics(model)
    step = ZeroStep(engine, micro_batches, statistics, ranks=ranks, device=CPU)  # type: ignore[arg-type]
    return step, engine, model, batches


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def losses_of(step: ZeroStep, batch: Any, block: range) -> list[Tensor]:
    step.statistics.begin()
    found = list(step.micro_batches.losses(batch, block))
    step.statistics.settle()
    return found


@pytest.mark.parametrize("number", [0, 2])  # a full step, and an epoch's last
def test_the_gradient_is_that_of_the_mean_loss_over_the_global_batch(number: int) -> None:
    step, engine, model, batches = made()
    batch = batches.at(number)
    sums = losses_of(step, batch, range(len(batch.bounds)))
    expected = torch.autograd.grad(sum(sums) / len(batch.indices), list(model.parameters()))  # type: ignore[arg-type]
    result = step(batch, 0.5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert result.losses.tolist() == [float(loss.detach()) for loss in sums], "what is logged are the sums"
    assert (float(result.norm), result.learning_rate, engine.factor) == (0.5, 0.05, 0.5)
    assert result.norms is None
    assert (step.audit, step.deferred) == (None, False)


def test_running_statistics_are_those_of_the_micro_batches_in_order() -> None:
    step, _, model, batches = made()
    other_step, _, other, _ = made()
    batch = batches.at(0)
    step(batch)
    rows = torch.empty(3, other_step.statistics.size)
    other_step.statistics.begin()
    for row, _ in zip(rows, other_step.micro_batches.losses(batch, range(3))):
        other_step.statistics.collect(row)
    other_step.statistics.settle()
    other_step.statistics.apply(rows)
    norm, expected = model[1], other[1]  # type: ignore[index]
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)
    assert int(norm.num_batches_tracked) == 3
    assert norm.momentum == 0.1, "outside of a step the layers are as usual"


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What rank 1 sends is what rank 0 has computed there before; everything else is a process group of one."""
    rows_of: list[Tensor] = []

    def all_gather(everyone: list[Tensor], own: Tensor) -> None:
        rows_of.append(own.clone())
        for place, rows in enumerate(rows_of):
            everyone[place].copy_(rows)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    return rows_of


def test_every_rank_goes_backward_equally_often_and_all_know_all_losses(two_ranks: list[Tensor]) -> None:
    """Three micro-batches on two ranks: one of them adds another of weight 0, which counts nowhere."""
    whole, _, model, batches = made()
    batch = batches.at(0)
    expected = whole(batch)
    parts, scaled = [], []
    for rank in (0, 1):
        step, engine, part, _ = made(Ranks(rank, 2, rank, 2))
        result = step(batch)
        parts.append(gradients(part))
        assert len(engine.losses) == 2
        scaled += engine.losses
    assert scaled.count(0.0) == 1
    assert result.losses.tolist() == expected.losses.tolist()
    # DeepSpeed averages over ranks.
    for one, other, ours in zip(*parts, gradients(model)):
        torch.testing.assert_close((one + other) / 2, ours)
    norm, alone = part[1], model[1]  # type: ignore[index]
    assert torch.equal(norm.running_mean, alone.running_mean), "the one of weight 0 leaves no statistics"


def test_a_wish_to_stop_of_any_rank_is_heard_by_all(two_ranks: list[Tensor]) -> None:
    _, _, _, batches = made()
    heard = []
    for rank, asks in ((0, True), (1, False)):
        step = made(Ranks(rank, 2, rank, 2))[0]
        heard.append(step(batches.at(0), 1.0, asks).stop)
    assert heard == [True, True]
    alone = made()[0]
    assert not alone(batches.at(0)).stop
    assert alone(batches.at(1), 1.0, True).stop


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_ends_the_run_and_says_that_it_may_be_too_late(bad: float) -> None:
    task = Task()
    task.scale = bad
    step, _, _, batches = made(task=task)
    with pytest.raises(NonFiniteError, match=r"Step 2 is not finite: the loss of micro-batch 0 is") as caught:
        step(batches.at(1))
    assert "The parameters may have been updated with it" in str(caught.value)
