"""Random values for trials."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.packs.values import EVEN, ODD, cancelling_like, drawn_gradient, drawn_like, same_bits, start_of


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


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_bits_of_all_types_are_compared(dtype: torch.dtype) -> None:
    one = torch.tensor([[1, 0, 1], [0, 0, 1]]).to(dtype)
    other = one.clone()
    assert same_bits(one, other) and same_bits(one.t(), other.t().contiguous())
    other[1, 2] = 0
    assert not same_bits(one, other)
    assert not same_bits(torch.zeros(2, dtype=torch.int32), torch.zeros(2))


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((40,), set()),
        ((9, 4), {1}),
        ((9, 3), set()),
        ((9, 5, 2), {1}),
        ((9, 2, 5), {2}),
        ((9, 5, 7, 6), {1, 3}),
        ((9, 2, 7, 3), set()),
    ],
)
def test_features_are_the_second_and_the_last_dimension_unless_they_are_few(
    shape: tuple[int, ...], dims: set[int]
) -> None:
    """Only features are 0 in all samples: no sample is, and no place."""
    torch.manual_seed(1)
    found = set()
    for _ in range(20):
        zero = drawn_like(torch.empty(shape)) == 0
        if not zero.all():
            for dim in range(len(shape)):
                others = [d for d in range(len(shape)) if d != dim]
                found |= {dim} if (zero.all(others) if others else zero).any() else set()
    assert found == dims


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float32, 8.0), (torch.bfloat16, 8.0), (torch.float16, 4.0)])
def test_terms_that_cancel_have_many_sizes(dtype: torch.dtype, spread: float) -> None:
    """Products of one size are added without an error. Half of their logarithms lie within the spread."""
    torch.manual_seed(0)
    sizes = cancelling_like(torch.empty(300, 300, dtype=dtype), EVEN).float().abs().log2().flatten().sort().values
    assert sizes[len(sizes) * 3 // 4] - sizes[len(sizes) // 4] == pytest.approx(spread, abs=0.4)


@pytest.mark.parametrize(
    ("shape", "parts", "zeros"),
    [
        ((6,), 1, 0),
        ((5,), 1, 1),
        ((6,), 2, 2),
        ((7,), 2, 1),
        ((4, 6), 2, 0),
        ((1, 1), 1, 0),
        ((2,), 1, 0),
        ((3,), 3, 0),
    ],
)
def test_the_last_of_an_odd_number_of_places_is_zero(shape: tuple[int, ...], parts: int, zeros: int) -> None:
    """But a single place keeps its number. Pairs lie within a micro-batch."""
    own = cancelling_like(torch.empty(shape), EVEN, *([parts] if parts > 1 else []))
    assert int((own == 0).sum()) == zeros


def test_where_a_tensor_starts_counts_from_a_fresh_place() -> None:
    assert [start_of(torch.empty(64)[start:]) for start in (0, 3, 16, 20)] == [0, 3, 0, 4]
    assert start_of(torch.empty(64, dtype=torch.bfloat16)[40:]) == 8
