"""Random values for trials."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.packs.values import EVEN, ODD, cancelling_like, drawn_gradient, drawn_like, same_bits


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_products_cancel_within_each_micro_batch(dtype: torch.dtype) -> None:
    """What is left of them is rounding errors, so that the order of additions shows."""
    x = cancelling_like(torch.empty(3 * 8, 4, 16, dtype=dtype), EVEN, 3)
    weight = cancelling_like(torch.empty(7, 16, dtype=dtype), ODD)
    grad = cancelling_like(torch.empty(3 * 8, 4, 7, dtype=dtype), [ODD, EVEN, EVEN], 3)
    assert x.dtype == dtype and bool(x.isfinite().all())
    exact, size = [t.double() for t in (x, weight, grad)], x.double().abs().mean() ** 2
    for sums in (
        exact[0] @ exact[1].t(),
        exact[2] @ exact[1],
        torch.einsum("kbtf,kbtg->kfg", exact[2].view(3, 8, 4, 7), exact[0].view(3, 8, 4, 16)),
    ):
        assert float(sums.abs().max()) < 1e-9 * float(size)
    terms = x[0, 0] * weight[weight.abs().sum(1).argmax()]
    orders = {float(sum(terms[torch.randperm(16)].unbind())) for _ in range(20)}
    assert len(orders) > 5
    assert len({abs(v) for v in x[:, 0, 0].tolist()} - {0.0}) == 3 * 4, "each micro-batch has numbers of its own"


def test_cancelling_values_lie_in_memory_as_the_tensor_does() -> None:
    for tensor in (torch.empty(6, 4).t(), torch.empty(4, 1).expand(4, 5), torch.empty(33)[1:], torch.empty(1, 1)):
        own = cancelling_like(tensor.requires_grad_(), ODD)
        assert own.shape == tensor.shape and own.requires_grad
        assert own.stride() == tensor.stride()
    labels = torch.arange(4)
    assert cancelling_like(labels, EVEN) is labels


def test_bits_are_compared_and_not_values() -> None:
    assert same_bits(torch.tensor([float("nan"), 0.0]), torch.tensor([float("nan"), 0.0]))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert same_bits(None, None) and not same_bits(None, torch.zeros(1))


def test_random_values_keep_what_a_kernel_depends_on() -> None:
    x = torch.zeros(4, 6, dtype=torch.bfloat16, requires_grad=True)
    drawn = drawn_like(x.detach().requires_grad_())
    assert (drawn.dtype, drawn.shape, drawn.requires_grad) == (x.dtype, x.shape, True)
    assert drawn_like(x.detach().t()).stride() == x.t().stride()
    places = torch.arange(3)
    assert drawn_like(places) is places
