"""What an evaluation computes, and what it leaves alone. That ranks agree on it is tested in tests/distributed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.run.small import PlainEngine, Task
from trainer.errors import UserError
from trainer.exact.progress import Progress
from trainer.exact.splits import Split, as_split
from trainer.ranks.place import Ranks
from trainer.run.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(task: Any, split: Split, size: int = 4, seed: int = 0, engine: Any = None, look: Any = None) -> Any:
    engine = PlainEngine(task.model()) if engine is None else engine
    return evaluate(task, engine, split, split, Ranks(), size, seed, Progress(3, 1, 12), look)


def some_samples() -> Split:
    return as_split(Task().splits()["test"], "test", "Task")


def test_the_loss_is_the_mean_and_the_metrics_are_those_of_the_whole_split() -> None:
    task, split = Task(), some_samples()
    model = task.model().eval()
    with torch.no_grad():
        outputs = model(split.arrays["x"])[:, 0]
    found = measured(task, split)
    assert list(found) == ["loss", "error"]
    assert found["loss"] == pytest.approx(float((outputs - split.arrays["y"]).square().mean()), rel=1e-5)
    assert found["error"] == pytest.approx(float((outputs - split.arrays["y"]).abs().mean()), rel=1e-5)
    assert task.evaluated == [10], "metrics see the split once, whole"


def test_the_size_of_a_micro_batch_changes_the_sum_of_rounding_alone() -> None:
    found = [measured(Task(), some_samples(), size) for size in (1, 3, 10, 64)]
    for other in found[1:]:
        assert other == {name: pytest.approx(value, rel=1e-5) for name, value in found[0].items()}


def test_outputs_come_in_the_order_of_the_samples() -> None:
    split, seen = some_samples(), {}

    def look(outputs: Tensor, arrays: dict[str, Tensor]) -> None:
        seen.update(outputs=outputs, arrays=arrays)

    task = Task()
    task.forward = lambda model, batch: batch["x"]
    measured(task, split, 3, look=look)
    assert torch.equal(seen["outputs"], split.arrays["x"])
    assert seen["arrays"] is split.arrays


def test_a_dictionary_of_outputs_is_gathered_by_name_without_what_is_no_tensor() -> None:
    class Named(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
            return {"value": model(batch["x"]), "twice": 2 * batch["x"], "note": "text"}

        def loss(self, outputs: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            return outputs["value"].sum(), len(batch["x"])

        def metrics(self, outputs: Any, batch: dict[str, Tensor]) -> dict[str, float]:
            assert set(outputs) == {"value", "twice"}
            return {"right": float(torch.equal(outputs["twice"], 2 * batch["x"]))}

    assert measured(Named(), some_samples())["right"] == 1.0


def test_a_weighted_loss_is_divided_by_the_weights() -> None:
    weights = torch.arange(1, 11, dtype=torch.float32)

    class Weighted(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
            return (batch["w"] * 2.0).sum(), float(batch["w"].sum())

    split = some_samples()
    split = as_split(Split({**split.arrays, "w": weights}, counts=weights), "test", "Task")
    assert measured(Weighted(), split)["loss"] == pytest.approx(2.0)


def test_padding_is_cut_to_the_longest_sample_of_a_micro_batch() -> None:
    lengths = torch.tensor([1, 2, 1, 3, 2, 1, 1, 1, 1, 1])
    widths = []

    class Padded(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            widths.append(batch["tokens"].shape[1])
            return model(batch["x"])

    arrays = {**some_samples().arrays, "tokens": torch.zeros(10, 5)}
    measured(Padded(), as_split(Split(arrays, lengths=lengths, padded=("tokens",)), "test", "Task"), 4)
    assert widths == [2, 3, 1]  # 3, 3 and 4 samples


def test_an_evaluation_leaves_training_as_it_was() -> None:
    task = Task()
    engine = PlainEngine(task.model())
    engine.model.train()
    before = {name: tensor.clone() for name, tensor in engine.state().items()}

    class Watched(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            assert not model.training
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled(), "a model may keep a table that it makes here"
            return model(batch["x"])

    measured(Watched(), some_samples(), engine=engine)
    assert engine.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state().items())


def test_a_model_that_draws_in_evaluation_draws_the_same_again() -> None:
    """From torch, numpy and Python; another seed of the run draws otherwise."""
    import random

    class Draws(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            drawn = torch.rand(len(batch["x"]), 1) + np.random.random() + random.random()
            return model(batch["x"]) + drawn

    engine = PlainEngine(Task().model())
    one = measured(Draws(), some_samples(), engine=engine)
    for draw in (lambda: torch.rand(1), np.random.random, random.random):
        draw()
        assert measured(Draws(), some_samples(), engine=engine) == one
    assert measured(Draws(), some_samples(), seed=1, engine=engine) != one


def test_a_task_that_asks_is_told_the_progress_of_the_run() -> None:
    class Asks(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Progress) -> Tensor:
            assert (progress.step, progress.epoch, progress.total_steps) == (3, 1, 12)
            return model(batch["x"])

    measured(Asks(), some_samples())


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (0.5, r"Odd\.metrics\(\) must return a dictionary"),
        ({"error": "small"}, "error"),
    ],
)
def test_metrics_that_are_no_numbers_by_name_are_one_message(metrics: Any, said: str) -> None:
    class Odd(Task):
        def metrics(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            return metrics

    with pytest.raises(UserError, match=said) as caught:
        measured(Odd(), some_samples())
    assert caught.value.agreed


def test_outputs_without_one_row_a_sample_are_named() -> None:
    task = Task()
    task.forward = lambda model, batch: model(batch["x"]).mean()
    task.loss = lambda outputs, batch: (outputs, 1)
    with pytest.raises(UserError, match="Each output needs one row a sample"):
        measured(task, some_samples())
