"""The step on one rank, with a plain optimizer in DeepSpeed's place: what it computes, and what it refuses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import NonFiniteError, RanksDifferError, UserError
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.checks.audit import Audit
from trainer.exact.micro_batches import GlobalBatches, MicroBatches
from trainer.exact.optional.early_exchange import EarlyExchange
from trainer.exact.own_block import OwnBlock
from trainer.exact.splits import Split
from trainer.exact.step import ExactStep, StepResult
from trainer.ranks.place import Ranks

CPU = torch.device("cpu")
B, m, SAMPLES = 12, 4, 30  # 3 micro-batches a step, and a last step of 6 samples in 2

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one")


class Task:
    """Regression."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return self.scale * F.mse_loss(outputs[:, 0], batch["y"], reduction="sum"), len(outputs)


class PlainSGD:
    """`exact.step.Updates` with torch's SGD."""

    def __init__(self, model: nn.Module, rate: float = 0.1) -> None:
        self._base = rate
        self._optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=0.5)
        self.parameters = list(model.parameters())
        self.unused: list[int] = []
        self.skips: Tensor | None = None

    def use_gradient(self, flat: Tensor, views: list[Tensor]) -> None:
        self._views = views
        for parameter, view in zip(self.parameters, views):
            parameter.grad = view

    def skip_update_where(self, flag: Tensor) -> bool:
        self.skips = flag
        return True

    def set_learning_rate(self, factor: float | None) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._base * (1.0 if factor is None else factor)
        return float(self._optimizer.param_groups[0]["lr"])

    def update(self, unused: Sequence[int] = ()) -> None:
        self.unused = list(unused)
        if self.skips is not None and bool(self.skips):
            return
        for i in unused:
            self.parameters[i].grad = None
        self._optimizer.step()
        for i in unused:
            self.parameters[i].grad = self._views[i]


class Partly(nn.Module):
    """A model with BatchNorm, and a weight that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.spare = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.norm(self.first(x)).tanh())
        return y * self.spare if bool((x[:, 0] > 1e6).any()) else y


def made(model: nn.Module | None = None, task: Task | None = None, **options: Any) -> tuple[ExactStep, Any]:
    """(a step, its parts by name)."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(SAMPLES, 5, generator=generator), torch.randn(SAMPLES, generator=generator)
    split, task = Split({"x": x, "y": y}), task or Task()
    sizes: dict[str, int] = {"global_batch_size": B, "micro_batch_size": m}
    batches = GlobalBatches(split, CPU, seed=0, drop_last=False, total_steps=9, counted=True, **sizes)
    optimizer, statistics = PlainSGD(model), RunningStatistics(model)
    micro_batches = MicroBatches(task, model, split, device=CPU, seed=0, micro_batch_size=m)
    leaves = batches.micro_batch_counts()
    ranks = options.pop("ranks", Ranks())
    step = ExactStep(optimizer, micro_batches, statistics, ranks=ranks, leaves=leaves, device=CPU, **options)
    parts = {"model": model, "task": task, "batches": batches, "optimizer": optimizer, "split": split}
    return step, parts


def mean_gradient(parts: Any, batch: Any) -> list[Tensor]:
    chosen = {name: array[batch.indices] for name, array in parts["split"].arrays.items()}
    loss, count = parts["task"].loss(parts["task"].forward(parts["model"], chosen), chosen)
    return list(torch.autograd.grad(loss / count, list(parts["model"].parameters())))


def copies(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("number", [0, 2])  # a full step, and an epoch's last
def test_the_gradient_is_that_of_the_mean_loss(number: int) -> None:
    step, parts = made()
    batch = parts["batches"].at(number)
    expected, before = mean_gradient(parts, batch), copies(parts["model"])
    result = step(batch)
    assert isinstance(result, StepResult)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in expected))
    assert float(result.norm) == pytest.approx(norm, rel=1e-5)
    assert len(result.losses) == (3 if number == 0 else 2)
    for view, gradient, parameter, old in zip(step.gradient_views, expected, parts["optimizer"].parameters, before):
        torch.testing.assert_close(view, gradient, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(parameter.detach(), old - 0.1 * (gradient + 0.5 * old), rtol=1e-5, atol=1e-6)


def test_clipping_and_the_rate_come_before_the_update() -> None:
    step, parts = made(max_norm=0.25)
    batch = parts["batches"].at(0)
    expected, before = mean_gradient(parts, batch), copies(parts["model"])
    result = step(batch, 0.5)
    assert result.learning_rate == 0.05
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in expected))
    assert norm > 0.25  # it clips
    assert float(result.norm) == pytest.approx(norm, rel=1e-5)  # what is reported is the norm before
    for gradient, parameter, old in zip(expected, parts["optimizer"].parameters, before):
        clipped = gradient * (0.25 / norm)
        torch.testing.assert_close(parameter.detach(), old - 0.05 * (clipped + 0.5 * old), rtol=1e-4, atol=1e-6)


def test_a_gradient_below_the_limit_is_not_scaled_up() -> None:
    loose, parts = made(max_norm=1e6)
    free, other = made()
    loose(parts["batches"].at(0))
    free(other["batches"].at(0))
    assert all(torch.equal(a, b) for a, b in zip(copies(parts["model"]), copies(other["model"])))


def test_a_step_without_norms_has_none() -> None:
    step, parts = made()
    assert step(parts["batches"].at(0)).norms is None


def test_a_wish_to_stop_is_heard_in_the_same_step() -> None:
    step, parts = made()
    assert not step(parts["batches"].at(0)).stop
    assert step(parts["batches"].at(1), 1.0, True).stop
    assert not step.deferred


def test_statistics_are_applied_in_order_and_unused_weights_passed_over() -> None:
    step, parts = made(Partly())
    model, batch = parts["model"], parts["batches"].at(0)
    mean, seen = torch.zeros(4), 0
    for start, stop in batch.bounds:
        y = model.first(parts["split"].arrays["x"][batch.indices[start:stop]])
        mean = 0.9 * mean + 0.1 * y.mean(0)
        seen += 1
    step(batch)
    torch.testing.assert_close(model.norm.running_mean, mean.detach(), rtol=1e-5, atol=1e-6)
    assert int(model.norm.num_batches_tracked) == seen == 3
    names = [name for name, _ in model.named_parameters()]
    assert parts["optimizer"].unused == [names.index("spare")]
    assert float(model.spare) == 1.0  # not even decayed
    step(parts["batches"].at(1))
    assert parts["optimizer"].unused == [names.index("spare")]


class Late(Partly):
    """Uses its spare weight in its first step alone."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = super().forward(x)
        return y * self.spare if self.calls <= 3 else y


def test_on_the_cpu_unused_weights_are_looked_for_in_every_step() -> None:
    step, parts = made(Late())
    step(parts["batches"].at(0))
    assert parts["optimizer"].unused == []
    step(parts["batches"].at(1))
    assert len(parts["optimizer"].unused) == 1


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    step, parts = made(task=Task(scale=bad))
    before = copies(parts["model"])
    with pytest.raises(NonFiniteError, match=r"Step 2 is not finite: the loss of micro-batch 0 is") as caught:
        step(parts["batches"].at(1))
    assert caught.value.good_steps == 1 and caught.value.agreed
    assert "The parameters are kept" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, copies(parts["model"])))


def test_a_gradient_alone_may_be_the_bad_one() -> None:
    class Steep(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            return (outputs * 0.0).abs().sqrt().sum(), len(outputs)  # 0, with an infinite slope

    step, parts = made(task=Steep())
    with pytest.raises(NonFiniteError, match="the losses are finite, but the gradient's norm is nan"):
        step(parts["batches"].at(0))


class Wrong(OwnBlock):
    """Every gradient that is summed is wrong, from a step on."""

    calls = 0
    wrong_from = 10**9

    def _gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = super()._gradients(loss)
        self.calls += 1
        return tuple(g + 1e-3 * self.calls if g is not None and self.calls > self.wrong_from else g for g in gradients)


def test_an_audited_step_is_compared_before_it_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    step, parts = made()
    step.own_block.__class__ = Wrong
    names = [name for name, _ in parts["model"].named_parameters()]
    step.audit = Audit(Ranks(), ["here"], names, every_steps=2, total_steps=9, seed=0, alike=True)
    wrong: Any = step.own_block
    step(parts["batches"].at(0))
    assert wrong.calls == 3  # not audited
    step(parts["batches"].at(1))
    assert wrong.calls == 7  # one more
    wrong.wrong_from = 0
    step(parts["batches"].at(2))  # not audited: nobody sees it
    before = copies(parts["model"])
    with pytest.raises(RanksDifferError, match=r"The audit of step 4 found two results for micro-batch \d"):
        step(parts["batches"].at(3))
    assert all(torch.equal(a, b) for a, b in zip(before, copies(parts["model"])))


def test_nothing_is_clipped_without_a_limit() -> None:
    step, parts = made(task=Task(scale=50.0))
    batch = parts["batches"].at(0)
    expected = mean_gradient(parts, batch)
    assert float(step(batch).norm) > 5.0
    for view, gradient in zip(step.gradient_views, expected):
        torch.testing.assert_close(view, gradient, rtol=1e-5, atol=1e-5)


def test_small_gradients_are_clipped_as_torch_does() -> None:
    """It adds 1e-6 to the norm, which shows here."""
    step, parts = made(task=Task(scale=1e-6), max_norm=1e-7)
    batch = parts["batches"].at(0)
    for parameter, gradient in zip(parts["optimizer"].parameters, mean_gradient(parts, batch)):
        parameter.grad = gradient.clone()
    norm = float(nn.utils.clip_grad_norm_(parts["optimizer"].parameters, 1e-7))
    assert 1e-7 < norm < 1e-5
    expected = [parameter.grad.clone() for parameter in parts["optimizer"].parameters]
    for parameter, view in zip(parts["optimizer"].parameters, step.gradient_views):
        parameter.grad = view
    step(batch)
    for view, gradient in zip(step.gradient_views, expected):
        torch.testing.assert_close(view, gradient, rtol=1e-4, atol=0.0)


def test_each_phase_is_marked_when_it_ends() -> None:
    marks: list[str] = []
    step, parts = made(mark=marks.append)
    step(parts["batches"].at(0))
    assert marks == ["compute"] * 3 + ["reduce", "optimizer"]
    step.audit = Audit(Ranks(), ["here"], ["w"] * 4, every_steps=1, total_steps=9, seed=0, alike=True)
    marks.clear()
    step(parts["batches"].at(1))
    assert marks == ["compute"] * 4 + ["reduce", "optimizer"]


def test_an_error_in_a_forward_leaves_the_model_as_anyone_expects() -> None:
    class Fails(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            raise RuntimeError("mine")

    step, parts = made(Partly(), Fails())
    with pytest.raises(RuntimeError, match="mine"):
        step(parts["batches"].at(0))
    norm = parts["model"].norm
    assert norm.momentum == 0.1 and norm.running_mean.tolist() == [0.0] * 4 and norm.num_batches_tracked is not None


# As on a GPU, where the host does not wait for a loss


class Freezes(Partly):
    """Its BatchNorm leaves training mode, or enters it, in a forward of the second step."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.trained, self.calls = trained, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            self.norm.train(not self.trained)
        return super().forward(x)


@pytest.mark.parametrize("trained", [True, False])
def test_a_batch_norm_whose_mode_a_forward_changes_stops_the_step(trained: bool) -> None:
    model = Freezes(trained)
    step, parts = made(model)
    model.norm.train(trained)
    step(parts["batches"].at(0))
    before = copies(model)
    with pytest.raises(UserError, match=r"changes the mode of norm \(BatchNorm1d\)[\s\S]*Step 2 was not made"):
        step(parts["batches"].at(1))
    assert all(torch.equal(old, new) for old, new in zip(before, copies(model)))
    assert model.norm.momentum == 0.1


def test_a_step_that_is_not_finite_is_skipped_on_the_device_and_all_later_ones_too() -> None:
    task = Task()
    step, parts = made(Partly(), task)
    assert parts["optimizer"].skips is None  # on the CPU nobody asks for it
    step.deferred = parts["optimizer"].skip_update_where(step.broken)
    step(parts["batches"].at(0))
    assert float(step.broken) == 0.0
    before, buffers = copies(parts["model"]), [b.clone() for b in parts["model"].buffers()]
    assert int(parts["model"].norm.num_batches_tracked) == 3
    for number, scale in ((1, math.inf), (2, 1.0)):
        task.scale = scale
        step(parts["batches"].at(number))  # raises nothing
        assert float(step.broken) == 1.0
        assert all(torch.equal(a, b) for a, b in zip(before, copies(parts["model"])))
        assert all(torch.equal(a, b) for a, b in zip(buffers, parts["model"].buffers()))


def test_another_thread_that_draws_during_a_step_is_noticed() -> None:
    """It draws while the optimizer works, here: only a task that draws itself is harmed."""
    for model, harmed in ((None, False), (nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 1)), True)):
        step, parts = made(model)
        update = parts["optimizer"].update

        def disturbed(unused: Any, update: Any = update) -> None:
            torch.rand(1)
            update(unused)

        parts["optimizer"].update = disturbed
        with pytest.raises(RanksDifferError, match="Another thread") if harmed else contextlib.nullcontext():
            step(parts["batches"].at(0))


@pytest.mark.parametrize(
    ("world_size", "bucket_bytes", "early"),
    [(1, 4, False), (2, None, False), (2, 1 << 20, False), (2, 100, True), (2, 4, True), (3, 4, True)],
    ids=["one rank", "not wanted", "one bucket", "two buckets", "many", "three ranks"],
)
def test_buckets_are_sent_early_where_there_are_several(world_size: int, bucket_bytes: int | None, early: bool) -> None:
    step, _ = made(ranks=Ranks(0, world_size), bucket_bytes=bucket_bytes)
    assert (step._early is not None) == early
    assert isinstance(step._exchange, EarlyExchange) == early
    if bucket_bytes == 100:
        assert step._early is not None and len(step._early.buckets) == 2
