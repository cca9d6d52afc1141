"""Layers in a pack against the layer applied to one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.packed import floats, trained
from trainer.exact.packs import layer_functions
from trainer.exact.packs.layers import Rule, Site, cut, laid_apart, piece, put_pieces
from trainer.exact.packs.rules import LINEAR
from trainer.exact.packs.values import drawn_like, same_bits

pytestmark = pytest.mark.usefixtures("one_thread")


class OfThree:
    """Stands for a pack of three micro-batches."""

    g = 3


def site(rule: Rule) -> Site:
    def call(x: Tensor, w: Tensor, b: Tensor, place: int = 0) -> Tensor:
        return F.linear(x, w, b)

    return Site(OfThree(), rule, call, ("linear",), 0, 1)  # type: ignore[arg-type]


def test_a_rule_that_is_right_does_not_differ() -> None:
    x = torch.randn(24, 16, requires_grad=True)
    assert not site(LINEAR[0]).differs(x, torch.randn(8, 16), torch.randn(8))


def wrong_forward(rule: Rule) -> Rule:
    return rule._replace(forward=lambda s, x, w, b: (torch.nextafter(F.linear(x, w, b), torch.tensor(9.0)), ()))


def wrong_backward(rule: Rule) -> Rule:
    def backward(s: Site, *arguments: Any) -> Any:
        dx, dw, db = rule.backward(s, *arguments)
        return dx, dw, db.roll(1, 0)  # another micro-batch's

    return rule._replace(backward=backward)


@pytest.mark.parametrize("change", [wrong_forward, wrong_backward])
def test_a_rule_that_is_wrong_differs(change: Any) -> None:
    x = torch.randn(24, 16, requires_grad=True)
    assert site(change(LINEAR[0])).differs(x, torch.randn(8, 16), torch.randn(8))


def test_a_difference_is_found_in_layers_of_a_few_numbers() -> None:
    """Matrix products of one row and of two have other bits in a part of the numbers only, on many processors."""
    one = torch.nn.Linear(19, 2)
    same = all(
        same_bits(one(x), torch.cat([one(row.clone()) for row in x.split(1)])) for x in torch.randn(500, 3, 19).unbind()
    )
    assert site(LINEAR[0]).differs(torch.randn(3, 19), one.weight.detach(), one.bias.detach()) != same


def test_sums_in_another_order_are_found_where_only_low_precision_has_them() -> None:
    """The random tasks found it: the processor adds bfloat16 in an order that follows the number of rows."""

    def forward(s: Site, *values: Tensor) -> Any:
        return torch.cat([s.call(i, *values[1:]) for i in cut(values[0], 3)]), ()

    def backward(s: Site, *values: Tensor) -> Any:
        """One micro-batch at a time, but for the weight in low precision: there samples are added backwards."""
        dx, dw, db = s.alone(*values)
        if values[1].dtype != torch.float32:
            d, i = (t.view(3, -1, t.shape[-1]).flip(1).float() for t in values[:2])
            dw = torch.bmm(d.transpose(1, 2), i).to(values[1].dtype)
        return dx, dw, db

    x, weight, bias = torch.randn(48, 16), torch.randn(8, 16), torch.randn(8)
    low = [t.bfloat16() for t in (x, weight, bias)]
    assert site(Rule(forward, backward)).differs(*low)
    assert not site(Rule(forward, lambda s, *values: s.alone(*values))).differs(*low)


def _of_times(samples: int, start: int = 0) -> Tensor:
    """As a recurrent layer gives: (samples, 7, 5), whose first dimension in memory is the second."""
    return torch.arange(start + 7 * samples * 5.0)[start:].view(7, samples, 5).transpose(0, 1)


@pytest.mark.parametrize(
    "made",
    [
        _of_times,
        lambda n: _of_times(n, start=3),
        lambda n: torch.arange(n * 35.0).view(n, 7, 5)[:, 1:],
        lambda n: torch.arange(n * 5.0).view(n, 1, 5).expand(n, 7, 5),
        lambda n: torch.arange(5.0).expand(n, 5),
        lambda n: torch.arange(n * 6.0).view(n, 2, 3).to(torch.float64).transpose(1, 2),
    ],
)
def test_pieces_lie_in_memory_as_tensors_of_their_own(made: Callable[[int], Tensor]) -> None:
    """Math libraries choose by strides and by where a tensor starts. The random tasks found a difference in a head."""
    whole, alone = made(6), made(2)
    for pieces in (cut(whole, 3), laid_apart(whole, 3), [piece(whole, k, 3) for k in range(3)]):
        for k, own in enumerate(pieces):
            assert torch.equal(own, whole[2 * k : 2 * k + 2])
            assert own.stride() == alone.stride()
            assert (own.data_ptr() - alone.data_ptr()) % 64 == 0 or own.data_ptr() % 64 == alone.data_ptr() % 64


@pytest.mark.parametrize("features", [3, 16])
def test_pieces_start_where_fresh_tensors_do(features: int) -> None:
    x = torch.randn(6, features)
    for k, own in enumerate(cut(x, 3)):
        assert torch.equal(own, x[2 * k : 2 * k + 2])
        assert own.storage_offset() * 4 % 64 == 0
    assert piece(x, 0, 3).data_ptr() == x.data_ptr(), "not copied needlessly"


@pytest.mark.parametrize("features", [3, 32])
def test_what_is_changed_in_a_piece_is_written_back(features: int) -> None:
    x = torch.zeros(6, features)
    pieces = cut(x, 3)
    pieces[1].fill_(1.0)
    put_pieces(x, pieces)
    assert x.sum(1).tolist() == [0, 0, features, features, 0, 0]


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


class Scaled(nn.Module):
    """Bare parameters: on the left and on the right, of fewer dimensions, of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(8) / 5), nn.Parameter(torch.rand(1, 1, 8) / 5)
        self.places = nn.Parameter(torch.rand(5, 1) / 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.shift + self.scale * x) * self.places + self.places


class Llamas(nn.Module):
    """RMSNorm as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.usefixtures("group_of_one", "early_packs")
@pytest.mark.parametrize(
    ("layer", "shape", "name"),
    [
        (lambda: nn.RMSNorm(8), (5, 8), "rms_norm"),
        (lambda: nn.GroupNorm(5, 5), (5, 8), "group_norm"),
        (lambda: nn.GroupNorm(1, 5, affine=True), (5, 2, 4), "group_norm"),
        (Scaled, (5, 8), "mul"),
        (Llamas, (5, 8), "mul"),
    ],
)
def test_layers_of_few_parameters_have_rules(layer: Any, shape: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(layer(), nn.Tanh(), layer(), nn.Tanh()), floats(*shape)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
    rules = {key[0]: chosen for key, chosen in packs._findings.sites.items()}
    assert rules[name] >= 0, packs.summary()


@pytest.mark.usefixtures("group_of_one", "early_packs")
def test_a_stride_that_is_as_large_as_the_pack_is_no_number_of_samples() -> None:
    """A convolution of one sample has another kernel than of two, on many processors (the fuzzer found it)."""
    torch.manual_seed(0)
    frozen = nn.Conv1d(1, 1, 2, stride=2).requires_grad_(False)
    model, x = nn.Sequential(nn.Linear(11, 11), frozen, nn.Tanh()), floats(1, 11)
    one, two = (torch.cat([frozen(part) for part in x.split(size)]) for size in (1, 2))
    found, packs = trained(model, x, 2, micro_batch_size=1)
    assert found == trained(model, x, 0, micro_batch_size=1)[0]
    assert packs is not None
    alone = [key[0] for key, rule in packs._findings.sites.items() if rule < 0]
    assert ("conv1d" in alone) == (not same_bits(one, two))


@pytest.mark.usefixtures("group_of_one", "early_packs")
def test_a_rule_that_a_device_cannot_compute_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise NotImplementedError("Could not run this kernel on the backend.")

    monkeypatch.setattr(layer_functions, "LINEAR", (Rule(fails, fails), *LINEAR))
    torch.manual_seed(0)
    model, x = nn.Linear(8, 2), floats(8)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
    assert set(packs._findings.sites.values()) == {1}


@pytest.mark.usefixtures("group_of_one", "early_packs")
@pytest.mark.parametrize("expanded", [False, True])
def test_gradients_of_any_layout(expanded: bool) -> None:
    """A sum goes through memory in the order of strides, so that a gradient that lies in another way has other bits."""

    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.head(x.reshape(-1, 7, 6))
            if expanded:
                return y.mean(1)
            return torch.sin(y.transpose(1, 2).contiguous()).flatten(1)

    torch.manual_seed(0)
    model, x = Turns(), floats(42)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}


def test_a_rule_that_adds_in_another_order_is_found_in_low_precision() -> None:
    """There its sums are rounded to the same bits nearly always. An outsider's run ended in other bits by it."""

    def other_order(site: Site, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        d, i = grad.reshape(site.g, -1, grad.shape[-1]).float(), x.reshape(site.g, -1, x.shape[-1]).float()
        dw = torch.bmm(d.flip(1).transpose(1, 2), i.flip(1))
        return None, dw.to(grad.dtype), None

    x, weight = torch.randn(96, 5, dtype=torch.bfloat16), torch.randn(3, 5, dtype=torch.bfloat16)
    rule = LINEAR[0]._replace(backward=other_order)
    own = Site(OfThree(), rule, lambda x, w, b, place=0: F.linear(x, w, b), ("",), 0, None)  # type: ignore[arg-type]
    assert own.differs(x, weight, None)
