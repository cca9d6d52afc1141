"""The stage: which micro-batches are rehearsed, what is computed of them, and that nothing is left of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.jobs import USER_TASKS, small_config, train
from tests.rehearsal.staged import CPU, Task, staged
from trainer.errors import UserError
from trainer.exact.micro_batches import GlobalBatches
from trainer.exact.splits import Split
from trainer.ranks.workers import run_ranks
from trainer.rehearsal.results import Calls, differs
from trainer.rehearsal.stage import another_rank, generators_kept, items_of, watched

INEXACT = f"{USER_TASKS}/inexact_tasks.py"

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- which micro-batches


def chosen(samples: int, B: int, m: int, total: int, first: int = 0, drop_last: bool = False) -> list[tuple[int, int]]:
    """(step, samples) of the micro-batches that are rehearsed."""
    split = Split({"x": torch.zeros(samples, 1)})
    batches = GlobalBatches(
        split, CPU, seed=0, global_batch_size=B, micro_batch_size=m, drop_last=drop_last, total_steps=total
    )
    return [(item.batch.step, item.samples) for item in items_of(batches, first)]


def test_two_of_full_size_one_of_them_late_and_one_of_each_other_size() -> None:
    assert chosen(30, 12, 4, 9) == [(0, 4), (7, 4), (2, 3)]
    assert chosen(29, 12, 4, 9) == [(0, 4), (7, 4), (2, 2), (2, 3)]
    assert chosen(24, 12, 4, 8) == [(0, 4), (6, 4)], "all are alike"
    assert chosen(30, 12, 4, 9, drop_last=True) == [(0, 4), (8, 4)]


def test_a_resumed_run_is_rehearsed_from_where_it_stands() -> None:
    assert chosen(30, 12, 4, 9, first=4) == [(4, 4), (7, 4), (5, 3)]
    assert [step for step, _ in chosen(30, 12, 4, 9, first=8)] == [8, 8], "its last step, with two micro-batches"


def test_a_run_of_one_step_or_one_micro_batch() -> None:
    assert chosen(30, 12, 4, 1) == [(0, 4), (0, 4)]
    assert chosen(8, 4, 4, 1) == [(0, 4)]


def test_only_micro_batches_of_a_runs_first_step_must_have_a_finite_loss() -> None:
    class Infinite(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            return outputs.sum() * float("inf"), len(outputs)

    stage = staged(Infinite())
    with pytest.raises(UserError, match=r"Infinite\.loss\(\) is .*of the first step. It must be finite"):
        stage.visit(stage.items[0])
    stage.visit(stage.items[1])
    resumed = staged(Infinite(), first_step=3)
    resumed.visit(resumed.items[0])


# ---------------------------------------------------------------- what is computed


def test_a_visit_hashes_samples_outputs_loss_gradients_and_statistics() -> None:
    stage = staged()
    found = stage.visit(stage.items[0])
    gradients = [f"gradient {name}" for name in stage.engine.names.values()]
    assert list(found) == ["data x", "data y", "output ", "loss", *gradients, "statistics"]
    assert differs(found, stage.visit(stage.items[0])) is None, "nothing but the micro-batch counts"
    other = stage.visit(stage.items[1])
    assert all(found[name] != other[name] for name in found if name != "gradient 0.bias")
    forward = stage.forward(0)
    assert forward == {name: found[name] for name in ("data x", "data y", "output ", "loss")}


def test_nothing_is_left_of_a_visit() -> None:
    stage = staged()
    before = {name: tensor.clone() for name, tensor in stage.engine.state().items()}
    calls: Calls = []
    for item in stage.items:
        stage.visit(item, calls)
    stage.check_augmented()
    assert stage.put_back() == {}
    stage.check_what_is_not_the_tasks()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.engine.state().items())
    assert not any(module._forward_hooks for module in stage.model.modules())
    assert all(not p.grad.any() for p in stage.engine.parameters if p.grad is not None)


def test_several_micro_batches_from_the_start_give_the_last_ones_result() -> None:
    stage = staged()
    alone, calls = stage.from_the_start(0)
    later, calls_later = stage.from_the_start(1, 2, 0)
    assert alone == later
    assert [name for name, _, _ in calls] == ["0", "1", "2", "3", "4", ""] == [name for name, _, _ in calls_later]


def test_a_state_that_micro_batches_move_is_where_it_was_or_left_on_request() -> None:
    class Counts(Task):
        calls = 0

        def __init__(self) -> None:
            self.calls = 0

        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
            self.calls += 1
            return model(batch["x"]) * self.calls

    task = Counts()
    stage = staged(task)
    first = stage.from_the_start(0)[0]
    assert stage.from_the_start(0)[0] == first, "it starts from the same count"
    assert differs(first, stage.from_the_start(1, 0)[0]) == "output "
    key = next(key for key in stage.before if stage.python.name_of(key) == "the task's attribute calls")
    task.calls = 5
    assert differs(first, stage.from_the_start(0, leave=key)[0]) == "output "
    assert task.calls == 6
    stage.put_back()
    assert task.calls == 0


def test_what_the_tasks_code_has_changed_of_the_model_is_named() -> None:
    stage = staged()
    with torch.no_grad():
        stage.engine.model[0].bias.add_(1)  # type: ignore[index]
    assert "the parameter 0.bias changes in the forward" in stage.put_back()["0.bias"].what
    stage.engine.momentum["0.bias"].add_(1)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"Task changes the optimizer's 0\.bias\.momentum in its forward or loss"):
        stage.put_back()


# ---------------------------------------------------------------- what is refused


def refused(task: Any, model: nn.Module | None = None) -> str:
    """What is said when each micro-batch is computed in both ways."""
    stage = staged(task, model)

    def compute() -> None:
        for number in stage.numbers:
            stage.forward(number)
            stage.visit(stage.items[number])
        stage.check_what_is_not_the_tasks()

    with pytest.raises(UserError) as caught:
        compute()
    return str(caught.value)


def test_a_momentum_that_a_forward_sets() -> None:
    class Sets(Task):
        def forward(self, model: Any, batch: dict[str, Tensor]) -> Any:
            model[1].momentum = 0.01
            return model(batch["x"])

    assert "Sets sets the momentum of a normalisation layer in its forward" in refused(Sets())


def test_a_batch_norm_that_a_forward_calls_by_its_function() -> None:
    """With a momentum of its own, whose statistics nobody would have collected."""

    class Calls(Task):
        def forward(self, model: Any, batch: dict[str, Tensor]) -> Any:
            norm, x = model[1], model[0](batch["x"])
            x = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1)
            return model[2:](x)

    assert "Calls calls F.batch_norm with the running statistics of 1" in refused(Calls())


def test_a_parameter_that_a_forward_freezes() -> None:
    class Freezes(Task):
        def forward(self, model: Any, batch: dict[str, Tensor]) -> Any:
            model[0].bias.requires_grad_(False)
            return model(batch["x"])

    assert "Freezes freezes the parameter 0.bias in its forward or loss" in refused(Freezes())


def test_gradients_that_are_sparse() -> None:
    class Looks(Task):
        def forward(self, model: Any, batch: dict[str, Tensor]) -> Any:
            return model(batch["x"].abs().long().clamp(max=2)).sum(1)

    assert "The gradient of weight is sparse" in refused(Looks(), nn.Embedding(3, 1, sparse=True))


def test_data_that_a_task_writes_to_and_gradients_that_it_adds_to() -> None:
    class Writes(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            self.kept.add_(0)
            return super().loss(outputs, batch)

    class GoesBackward(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            outputs.sum().backward(retain_graph=True)
            return super().loss(outputs, batch)

    writes = Writes()
    stage = staged(writes)
    writes.kept = stage.subject.split.arrays["x"]  # type: ignore[attr-defined]
    stage.visit(stage.items[0])
    with pytest.raises(UserError, match="Writes changes its training data during training"):
        stage.check_what_is_not_the_tasks()
    assert "GoesBackward calls backward() in its forward or loss" in refused(GoesBackward())


def test_an_augmentation_that_is_no_batch_is_found_before_a_forward_trips_over_it() -> None:
    class Halves(Task):
        def augment(self, batch: dict[str, Tensor], random: Any) -> dict[str, Tensor]:
            return {name: array[::2] for name, array in batch.items()}

    with pytest.raises(UserError, match=r"Halves\.augment\(\) returned 'x' of shape \(2, 5\) for 4 samples"):
        staged(Halves()).check_augmented()


def test_a_claim_of_chunks_is_looked_at_only_where_a_task_makes_it() -> None:
    class Claims(Task):
        augment_in_chunks = True

    class ClaimsWrongly(Claims):
        def augment(self, batch: dict[str, Tensor], random: Any) -> dict[str, Tensor]:
            return {**batch, "x": torch.sigmoid(batch["x"])}

    assert staged().objection_to_chunks() is None
    stage = staged(Claims())
    state = torch.get_rng_state()
    assert stage.objection_to_chunks() is None
    assert torch.equal(torch.get_rng_state(), state)
    assert "it calls sigmoid" in str(staged(ClaimsWrongly()).objection_to_chunks())


def test_a_task_that_goes_backward_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GoesBackward calls backward\(\) in its forward or loss"):
        run_ranks(train, 2, small_config(tmp_path / "run", task=f"{INEXACT}:GoesBackward"))
    assert not (tmp_path / "run").exists()


def test_a_task_that_writes_to_its_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="WritesToItsData changes its training data during training"):
        run_ranks(train, 1, small_config(tmp_path / "run", task=f"{INEXACT}:WritesToItsData"))


def test_one_sample_without_a_variance_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", task=f"{INEXACT}:NormOverOnePlace", train_batch_size=499)
    with pytest.raises(UserError, match=r"(?s)one sample has no variance for BatchNorm1d.*drop_last"):
        run_ranks(train, 1, config)


# ---------------------------------------------------------------- around a micro-batch


def test_torchs_generator_is_afterwards_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    def fail() -> None:
        with generators_kept(CPU):
            torch.rand(7)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(torch.rand(3), expected)


def test_for_a_while_this_is_the_next_rank_of_one_more(group_of_one: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def seen() -> tuple[Any, ...]:
        environment = tuple(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return dist.get_rank(), dist.get_world_size(), *environment

    before = seen()
    with another_rank():
        assert seen() == (1, 2, "1", "1", "2")
    assert seen() == before == (0, 1, "0", None, None)

    def fail() -> None:
        with another_rank():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen() == before


def test_every_call_of_a_module_is_noted_with_what_went_in_and_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    calls: Calls = []
    x = torch.ones(3, 2)
    with watched(model, calls):
        model(x)
        model(x + 1)
        model(x)
    assert [name for name, _, _ in calls] == ["0", "1", ""] * 3, "in the order in which calls end"
    assert calls[:3] == calls[6:]
    for one, other in zip(calls[:3], calls[3:6]):
        assert one[1] != other[1] and one[2] != other[2]
    noted = len(calls)
    model(x)
    with watched(model, None):
        model(x)
    assert len(calls) == noted


class InOneCall(Task):
    """Its losses can be computed for several micro-batches in one call."""

    factor, noise = 1.0, False

    def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        losses = (outputs.flatten(1) ** 2).sum(1)
        return losses + torch.randn(len(losses)) if self.noise else losses

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
        return self.sample_losses(outputs, batch).sum() * self.factor, len(outputs)


def test_losses_in_one_call_have_to_be_those_of_loss() -> None:
    class Other(InOneCall):
        factor = 0.25

    class Shape(InOneCall):
        def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return super().sample_losses(outputs, batch).sum()

        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            return outputs.sum(), len(outputs)

    class Noisy(InOneCall):
        noise = True

    stage = staged(Other())
    with pytest.raises(UserError, match=r"Other\.sample_losses\(\) adds up to .* where Other\.loss\(\) returns"):
        stage.visit(stage.items[0])
    stage = staged(Shape())
    with pytest.raises(UserError, match=r"sample_losses\(\) must return one number a sample, .* of shape \(4,\)"):
        stage.visit(stage.items[0])
    for task in (InOneCall(), Noisy()):
        stage = staged(task)
        stage.visit(stage.items[0])
