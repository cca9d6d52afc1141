"""Functions, by name, that packs call singly or refuse: what outsiders' tasks got other bits from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.packed import Task, floats, made, trained
from trainer.exact.packs import layers

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one", "early_packs")


class Own(Task):
    """A task whose forward is given; `weight` is the model's (8, 8) weight."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self._forward(model(batch["x"]), model.weight)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda h, w: F.linear(h, w.t()), "a parameter is used in several ways"),
        (lambda h, w: h * w.double().cos().sum(0).float(), "is torch.float64"),
        (lambda h, w: (h.register_hook(lambda g: g * (100 / g.norm()).clamp(max=1)), h)[1], "a gradient has a hook"),
    ],
)
def test_what_packs_cannot_know_the_gradients_of_is_refused(forward: Any, why: str) -> None:
    """An outsider's tasks got other bits from these, where their effect was rare or came late."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), floats(8)
    found, packs = trained(model, x, 4, task=Own(forward))
    assert found == trained(model, x, 0, task=Own(forward))[0]
    assert packs is not None and packs.refusals()
    assert all(why in refusal for refusal in packs.refusals().values()), packs.refusals()


def test_a_parameter_with_a_hook_has_no_packs() -> None:
    model = nn.Linear(8, 8)
    model.weight.register_hook(lambda g: None if g is None else g.clamp(-0.1, 0.1))
    step, batches = made(model, floats(8), 4)
    for batch in batches.starting_at(0):
        step(batch)
    assert step.block.packs is not None
    assert (
        all("has a hook" in refusal for refusal in step.block.packs.refusals().values()) and step.block.packs.refusals()
    )


class Grows(Own):
    """Its values are small in the first steps, those of trials."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Any) -> Tensor:
        return self._forward(model(batch["x"]) * (1e4 if progress.step > 2 else 1.0), model.weight) * 1e-4


@pytest.mark.parametrize(
    "forward",
    [
        lambda h, w: torch.renorm(h, 2, 1, 1e3),
        lambda h, w: h + F.relu(h.cummax(0).values - 1e3),
        lambda h, w: h.masked_scatter(h > 1e3, h),
        lambda h, w: F.normalize(h, dim=0, eps=1e3),
    ],
)
def test_functions_that_may_bring_samples_together_are_called_singly(forward: Any) -> None:
    """They need not show it in a trial, so they are not tried."""
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), floats(8)
    found, packs = trained(model, x, 4, task=Grows(forward))
    assert found == trained(model, x, 0, task=Grows(forward))[0]
    assert packs is not None and not packs.refusals()


def test_an_expanded_value_of_micro_batches_keeps_the_order_of_its_dimensions() -> None:
    """As of a learned first state. With its strides sorted, later values lay in another order than singly."""
    own = [torch.arange(5.0).expand(2, 5) for _ in range(3)]
    assert layers.joined(own).stride() == (5, 1)


@pytest.mark.parametrize(
    "forward",
    [
        lambda h, w, a: h + 0.1 * h.roll(1, 1) + a * h.roll(1, 0),
        lambda h, w, a: torch.hypot(h, w[0]) + F.linear(h, w) + a * torch.hypot(h, w[0] + h),
        lambda h, w, a: h / (1 + a * torch.einsum("nd,nd->d", h, h)),
    ],
)
def test_gradients_of_several_uses_are_added_in_their_order(forward: Any) -> None:
    """An outsider's task got other bits when its third use began to count."""

    class Counts(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Any) -> Tensor:
            return forward(model(batch["x"]), model.weight, 0.3 if progress.step > 2 else 0.0)

    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), floats(8)
    found, packs = trained(model, x, 4, task=Counts())
    assert found == trained(model, x, 0, task=Counts())[0]
    assert packs is not None


TABLE = torch.randn(256, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: ((x[:, :, None] >> torch.arange(3) & 1).flatten(1) ^ (x << 1).repeat(1, 3)) / 256,
        lambda x: TABLE.index_select(0, x[:, 0]),
        lambda x: TABLE.index_select(dim=-2, index=x[:, 1]),
        lambda x: torch.index_select(x, 1, torch.tensor([3, 0])).float(),
        lambda x: x.index_select(1, index=torch.tensor([2, 2, 5])).float(),
    ],
    ids=["bits", "a table's rows", "rows, by name", "columns", "columns, by name"],
)
def test_whole_numbers_are_treated_together(forward: Any) -> None:
    """As a task unpacks bits and looks up rows of a table: one call a pack, and the bits of single ones."""

    class Looks(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(forward(batch["x"]))

    torch.manual_seed(0)
    x = torch.randint(0, 256, (72, 8), generator=torch.Generator().manual_seed(2))
    model = nn.Linear(forward(x).size(1), 2)
    found, packs = trained(model, x, 4, task=Looks())
    assert found == trained(model, x, 0, task=Looks())[0]
    assert packs is not None and packs.refusals() == {}
    assert all(call.together for call in packs._findings.calls.values())


@pytest.mark.parametrize(
    "forward",
    [
        lambda h, w: h + w.index_select(0, h.detach().abs().long().sum(1) % 8),
        lambda h, w: h + w.cos().index_select(0, h.detach().abs().long().sum(1) % 8),
        lambda h, w: h.index_select(0, torch.tensor([3, 2, 1, 0])),
        lambda h, w: h.index_select(1, h[0].detach().abs().long().clamp(max=7)),
    ],
    ids=["of a parameter", "of what follows from one", "samples", "columns that a sample chooses"],
)
def test_rows_that_belong_to_a_micro_batch_keep_its_bits(forward: Any) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 8), floats(8) * 3
    found, packs = trained(model, x, 4, task=Own(forward))
    assert found == trained(model, x, 0, task=Own(forward))[0]
    assert packs is not None
