"""The networks for rows of tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer.tasks.tabular_models import MLP, NORMS, Inputs, ResNet, embedding_size

pytestmark = pytest.mark.usefixtures("one_thread")


def made(cls: Any, norm: str, numbers: int = 3, categories: tuple[int, ...] = (4, 2)) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = cls(Inputs(numbers, categories, 5), 2, 8, 2, 0.0, NORMS[norm])
    return model.eval()


def test_sizes_of_embeddings_follow_the_rule() -> None:
    assert [embedding_size(n) for n in (2, 3, 10, 1000, 10**6)] == [2, 3, 6, 77, 600]
    assert Inputs(3, [9, 1], 0).width == 3 + 6 + 2
    assert Inputs(3, [9, 1], 5).width == 3 + 5 + 5


@pytest.mark.parametrize("cls", [MLP, ResNet])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_do_not_see_one_another_in_evaluation(cls: Any, norm: str) -> None:
    model = made(cls, norm)
    numbers, categories = torch.randn(6, 3), torch.tensor([[0, 1], [4, 2], [1, 0], [2, 2], [3, 1], [0, 0]])
    whole = model(numbers, categories)
    assert whole.shape == (6, 2)
    torch.testing.assert_close(model(numbers[:1], categories[:1]), whole[:1])
    assert made(cls, norm, categories=())(numbers, None).shape == (6, 2)
    assert made(cls, norm, numbers=0)(None, categories).shape == (6, 2)


def test_an_unknown_category_adds_nothing_before_it_is_learnt() -> None:
    inputs = Inputs(1, [3], 4)
    unknown, known = inputs(torch.ones(2, 1), torch.tensor([[0], [2]]))
    assert unknown.tolist() == [1, 0, 0, 0, 0]
    assert known[1:].abs().min() > 0


def test_the_residual_network_is_that_of_the_paper() -> None:
    """A block is x + linear(ReLU(linear(norm(x)))), with twice as many units inside; last come norm, ReLU, linear."""
    model: Any = made(ResNet, "layer", categories=())
    x = torch.randn(5, 3)
    expected = model.stem(x)
    for block in model.blocks:
        norm, inside, _, _, outside, _ = block.layers
        assert inside.weight.shape == (16, 8)
        expected = expected + outside(inside(norm(expected)).relu())
    norm, _, head = model.head
    torch.testing.assert_close(model(x, None), head(norm(expected).relu()))
    assert isinstance(made(ResNet, "batch").get_submodule("head.0"), nn.BatchNorm1d)
