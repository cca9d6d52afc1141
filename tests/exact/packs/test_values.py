"""Random values for trials."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.packs.values import drawn_gradient, drawn_like, same_bits


def test_some_features_are_zero_in_all_samples() -> None:
    torch.manual_seed(0)
    own = drawn_like(torch.empty(6, 64))
    dead = (own == 0).all(0)
    assert 0 < int(dead.sum()) < 64 and bool((own[:, ~dead] != 0).all())
    assert bool((drawn_like(torch.empty(500, 1, 3)) != 0).all()), "few features stay as they are"


def test_some_features_of_a_gradient_are_negative() -> None:
    torch.manual_seed(0)
    own = drawn_gradient(torch.empty(20, 64))
    negative = (own < 0).all(0)
    assert 10 < int(negative.sum()) < 54


@pytest.mark.parametrize("tensor", [torch.empty(4, 3, 5).transpose(1, 2), torch.empty(4, 1, 5).expand(4, 7, 5)])
def test_values_lie_in_memory_as_a_tensor_does(tensor: torch.Tensor) -> None:
    assert drawn_gradient(tensor).stride() == tensor.stride()
    assert drawn_gradient(tensor).shape == tensor.shape


@pytest.mark.parametrize("tensor", [torch.empty(7, 4, 5).transpose(0, 1), torch.empty(4, 9)[:, 2:5]])
def test_values_take_the_way_of_a_tensor_through_torch(tensor: torch.Tensor) -> None:
    """Without a graph, torch's matmul takes another way for a view than for a parameter."""
    with torch.no_grad():
        own = drawn_like(tensor.requires_grad_())
    assert own.stride() == tensor.stride()
    assert own.data_ptr() % 64 == tensor.storage_offset() * 4 % 64
    assert own.requires_grad and own.is_leaf and not own._is_view()


def test_whole_numbers_stay() -> None:
    labels = torch.arange(3)
    assert drawn_like(labels) is labels


def test_the_sign_of_zero_is_a_bit() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
