"""Layers in a pack: how a rule is compared with the layer, what a backward leaves, and how tensors are taken apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.exact.packs.pieces import Pieces, one_by_one
from tests.exact.packs.pieces import trained as parameter
from trainer.exact.packs import layers
from trainer.exact.packs.findings import ALONE
from trainer.exact.packs.layers import Cut, Join, Rule, Site, cut, joined, laid_apart, name_of, piece, put_pieces
from trainer.exact.packs.rules import LINEAR
from trainer.exact.packs.values import same_bits
from trainer.exact.packs.verdicts import RefusedError

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


# How often, and with which values, a rule is compared


def noting(notes: list[tuple[Tensor, ...]], g: int = 3) -> Site:
    """A layer whose rule is right; it notes its input, weight, bias and gradient."""

    def backward(s: Site, grad: Tensor, *own: Any) -> Any:
        notes.append((*own, grad))
        return s.alone(grad, *own)

    found = site(Rule(one_by_one, backward))
    found.sites = SimpleNamespace(g=g)  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("samples", "inputs", "outputs", "draws"),
    [
        (6, 1, 1, 128),
        (16, 16, 8, 33),  # 128 of the output: 32 draws would be just enough
        (16, 8, 16, 33),  # 128 of the input
        (64, 64, 64, 2),
        (66, 64, 64, 1),
    ],
)
def test_small_layers_are_drawn_until_there_are_enough_values(
    samples: int, inputs: int, outputs: int, draws: int
) -> None:
    """More than 4,096 of the input and of the output, but 128 times at most; before them two whose sums cancel."""
    notes: list[tuple[Tensor, ...]] = []
    own = noting(notes, g=2)
    assert not own.differs(torch.ones(samples, inputs), torch.ones(outputs, inputs), torch.ones(outputs))
    assert len(notes) == 2 + draws


@pytest.mark.parametrize("wrong", [0, 1, 2, 30])
def test_each_draw_counts(wrong: int) -> None:
    draws: list[Tensor] = []

    def backward(s: Site, grad: Tensor, *own: Any) -> Any:
        draws.append(grad)
        dx, dw, db = s.alone(grad, *own)
        return dx, dw, db if len(draws) <= wrong else db + 1.0

    assert site(Rule(one_by_one, backward)).differs(torch.ones(6, 4), torch.ones(3, 4), torch.ones(3))
    assert len(draws) == wrong + 1


def test_sums_over_features_and_over_samples_cancel() -> None:
    """What is left of such a sum is rounding errors, which show the order of additions."""
    notes: list[tuple[Tensor, ...]] = []
    assert not noting(notes).differs(torch.ones(24, 4, 16), torch.ones(8, 16), torch.ones(8))

    def cancels(terms: Tensor, *dims: int) -> bool:
        return bool(terms.sum(dims).abs().max() < 1e-9 * terms.abs().max())

    seen = []
    for x, weight, bias, grad in ([t.double() for t in note] for note in notes[:3]):
        of_weight = (grad[:, :, :, None] * x[:, :, None]).unflatten(0, (3, 8))  # one sum a micro-batch
        products, of_input = x[:, :, None] * weight, grad[..., None] * weight
        seen.append((cancels(x, 0), cancels(bias, 0)))
        seen[-1] += (cancels(products, -1), cancels(of_weight, 1, 2), cancels(of_input, 2))
    # The input, the bias, products with the weight, the weight's gradient, and the input's.
    assert seen == [
        (False, True, True, True, True),
        (True, False, True, True, True),
        (False, False, False, False, False),
    ]


@pytest.mark.parametrize(("weight", "differs"), [(torch.zeros(8, 16), True), (torch.ones(8, 16), False)])
def test_a_weight_of_zeros_is_compared_as_it_is(weight: Tensor, differs: bool) -> None:
    """As LoRA begins."""

    def forward(s: Site, x: Tensor, w: Tensor, b: Tensor) -> Any:
        y, saved = one_by_one(s, x, w, b)
        return (y if w.any() else y + 1.0), saved

    own = site(Rule(forward, lambda s, *values: s.alone(*values)))
    assert own.differs(torch.ones(6, 16), weight, torch.ones(8)) == differs


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_compared_in_float32_without_autocast(autocast: bool) -> None:
    def forward(s: Site, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
        wide = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        y, saved = one_by_one(s, x, w, b)
        return (y + 1.0 if wide else y), saved

    own = site(Rule(forward, lambda s, *values: s.alone(*values)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        low = [t.bfloat16() for t in (torch.ones(6, 16), torch.ones(8, 16))]
        assert own.differs(low[0], low[1], low[1][:, 0].clone())
        own.bias = None
        assert own.differs(low[0], low[1], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_another_layout_is_drawn_in_that_layout(dtype: torch.dtype) -> None:
    strides = set()

    def backward(s: Site, grad: Tensor, *own: Any) -> Any:
        strides.add((grad.dtype, grad.stride()))
        return s.alone(grad, *own)

    own = site(Rule(one_by_one, backward))
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in ((6, 4), (8, 4), (8,)))
    own.differs(x, weight, bias, like=torch.ones(8, 6, dtype=dtype).t())
    types = {dtype, torch.float32}
    assert strides == {(t, (1, 6)) for t in types}


def test_gradients_that_a_rule_does_not_give_are_not_compared() -> None:
    own = site(Rule(one_by_one, lambda s, *values: (None, s.alone(*values)[1], None)))
    assert not own.differs(torch.ones(6, 4), torch.ones(8, 4), torch.ones(8))


# One micro-batch at a time


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_single_micro_batches(learns: tuple[bool, bool], bias: bool) -> None:
    x, weight = torch.arange(12.0).view(6, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    own = site(LINEAR[0])
    own.weight, own.bias = (place if t else None for place, t in enumerate(learns))
    if not bias:
        own.bias = None
    grad = torch.ones(6, 3) * torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])[:, None]
    dx, dw, db = own.alone(grad, x, weight, torch.ones(3) if bias else None)
    assert dx is not None and torch.equal(dx, grad @ weight)
    assert (dw is not None, db is not None) == (learns[0], learns[1] and bias)
    if dw is not None:
        assert dw.tolist() == [[row] * 3 for row in ([2.0, 4.0], [20.0, 24.0], [54.0, 60.0])]
    if db is not None:
        assert db.tolist() == [[2.0] * 3, [4.0] * 3, [6.0] * 3]


def test_each_micro_batch_alone_is_told_which_it_is() -> None:
    places: list[int] = []

    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        places.append(place)
        return F.embedding(x, w)

    own = Site(OfThree(), LINEAR[0], call, ("",), 0, None)  # type: ignore[arg-type]
    dx, dw, db = own.alone(torch.ones(6, 2), torch.tensor([0, 1, 1, 1, 2, 2]), torch.ones(3, 2), None)
    assert dx is None and db is None and places == [0, 1, 2]
    assert dw is not None and dw[..., 0].tolist() == [[1.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]


# The clock


class Clock:
    """Stands for the clock; each backward takes the next of these seconds."""

    def __init__(self, *times_s: float) -> None:
        self.now, self.times_s, self.events = 100.0, iter(times_s), list[str]()

    def rule(self) -> Rule:
        def backward(*arguments: Any) -> Any:
            self.events.append("backward")
            self.now += next(self.times_s)

        return LINEAR[0]._replace(backward=backward)

    def wait(self, tensor: Tensor) -> None:
        self.events.append("wait")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock(5.0, 3.0, 4.0, 1.0)
    monkeypatch.setattr(layers.time, "perf_counter", lambda: own.now)
    monkeypatch.setattr(layers, "_wait_for", own.wait)
    return own


@pytest.mark.parametrize("bias", [torch.ones(8), None])
def test_the_shortest_of_three_times_counts(clock: Clock, bias: Tensor | None) -> None:
    """A device has to be done before a time begins, and before it ends."""
    assert site(clock.rule()).backward_s(torch.ones(6, 4), torch.ones(8, 4), bias) == 3.0
    assert clock.events == ["wait", "backward", "wait"] * 3


def test_a_rule_without_a_kernel_takes_for_ever() -> None:
    def fails(*arguments: Any) -> Any:
        raise NotImplementedError("Could not run this kernel on the backend.")

    arguments = (torch.ones(6, 4), torch.ones(8, 4), None)
    assert site(LINEAR[0]._replace(backward=fails)).backward_s(*arguments) == math.inf
    assert site(LINEAR[0]._replace(forward=fails)).backward_s(*arguments) == math.inf


def test_too_little_memory_is_no_time() -> None:
    def fails(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        site(LINEAR[0]._replace(backward=fails)).backward_s(torch.ones(6, 4), torch.ones(8, 4), None)


def test_only_a_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    layers._wait_for(torch.ones(1))
    assert waited == []
    layers._wait_for(SimpleNamespace(is_cuda=True, device="cuda:1"))  # type: ignore[arg-type]
    assert waited == ["cuda:1"]


# What a backward leaves


class Backward:
    """A layer that gives its input plus 0; its rule's backward gives what it is told to give."""

    def __init__(self, gives: Callable[..., Any], needs_input: bool = True, trial: bool = True) -> None:
        self.pieces = Pieces(parameter(3), parameter(3), trial=trial)
        self.given: list[tuple[Any, ...]] = []

        def backward(s: Site, grad: Tensor, *own: Any) -> Any:
            self.given.append((grad, *own))
            return gives(grad, *own)

        def call(x: Tensor, w: Tensor, b: Tensor, place: int = 0) -> Tensor:
            return x * w + b

        rule = Rule(lambda s, x, w, b: (x * w + b, ()), backward, **({} if needs_input else {"needs_input": False}))
        self.site = Site(self.pieces.sites, rule, call, ("layer",), 0, 1)

    def __call__(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        for place in (0, 1):
            self.pieces.leaves.expect(place)
            self.pieces.leaves.expect(place)  # another use will come
        own = self.pieces.parameters
        return layers.Layer.apply(self.site, x, own[0] if weight is None else weight, own[1])

    def rows(self, place: int) -> Tensor:
        return self.pieces.leaves._rows[place]


def right(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return grad * weight, (grad * x).view(2, -1, 3).sum(1), grad.view(2, -1, 3).sum(1)


def test_the_inputs_gradient_goes_on_and_the_parameters_stay_with_the_pack() -> None:
    layer, x = Backward(right), torch.arange(12.0).view(4, 3).requires_grad_()
    layer(x).backward(torch.ones(4, 3))
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 3.0]] * 4
    assert layer.rows(0).tolist() == [[3.0, 5.0, 7.0], [15.0, 17.0, 19.0]]
    assert layer.rows(1).tolist() == [[2.0] * 3, [2.0] * 3]
    assert all(p.grad is None for p in layer.pieces.parameters)


def test_the_inputs_gradient_goes_on_through_a_frozen_weight() -> None:
    layer, x = Backward(right), torch.ones(4, 3, requires_grad=True)
    layer.site.weight = None
    layer(x, torch.tensor([1.0, 2.0, 3.0])).backward(torch.ones(4, 3))
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 3.0]] * 4
    assert 0 not in layer.pieces.leaves._rows


def test_an_input_without_a_gradient_gets_none() -> None:
    layer = Backward(right)
    y = layer(torch.ones(4, 3))
    assert torch.autograd.grad(y.sum(), layer.pieces.parameters, allow_unused=True) == (None, None)
    assert layer.rows(1).tolist() == [[2.0] * 3, [2.0] * 3]


@pytest.mark.parametrize("needs_input", [True, False])
def test_the_input_is_kept_only_where_a_rule_needs_it(needs_input: bool) -> None:
    layer, x = Backward(lambda grad, *own: right(grad, torch.ones(4, 3), *own[1:]), needs_input), torch.ones(4, 3)
    layer(x.requires_grad_()).backward(torch.ones(4, 3))
    assert (layer.given[0][1] is None) == (not needs_input)
    assert len(layer.given) == 1


TURNED = torch.ones(3, 4).t()  # a gradient that lies in memory in another way


def test_a_rule_without_the_input_is_given_up_for_a_gradient_of_another_layout() -> None:
    layer = Backward(right, needs_input=False)
    with pytest.raises(RefusedError, match="layer gets a gradient that lies in memory in another way"):
        layer(torch.ones(4, 3, requires_grad=True)).backward(TURNED)


@pytest.mark.parametrize("known", [0, ALONE])
def test_a_gradient_of_another_layout_is_for_the_rule_if_that_is_exact(known: int) -> None:
    layer, x = Backward(right, trial=False), torch.ones(4, 3, requires_grad=True)
    layer.pieces.findings.sites[("layer", "gradient", (1, 4))] = known
    layer(x).backward(TURNED.clone(memory_format=torch.preserve_format))
    assert len(layer.given) == (known == 0)
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 3.0]] * 4
    assert layer.rows(0).tolist() == [[2.0] * 3, [2.0] * 3], "one micro-batch at a time, or by the rule"


SHARING: dict[str, Callable[..., Any]] = {
    "the gradient": lambda grad, x, w, b: (grad.clone(), grad[:2], torch.ones(2, 3)),
    "the input's gradient": lambda grad, x, w, b: ((dx := grad.clone()), dx[:2], torch.ones(2, 3)),
    "the input": lambda grad, x, w, b: (None, x.detach()[:2], torch.ones(2, 3)),
    "the weight": lambda grad, x, w, b: (None, w.detach()[None].expand(2, 3), torch.ones(2, 3)),
}


@pytest.mark.parametrize("what", SHARING)
def test_what_stays_with_the_pack_is_nobody_elses_memory(what: str) -> None:
    """It is added to in place."""
    layer, x, grad = Backward(SHARING[what]), torch.ones(4, 3, requires_grad=True), torch.ones(4, 3)
    layer(x).backward(grad)
    layer.pieces.leaves.put(0, torch.full((2, 3), 10.0))
    assert grad.tolist() == [[1.0] * 3] * 4 and x.tolist() == [[1.0] * 3] * 4
    assert layer.pieces.parameters[0].tolist() == [1.0, 2.0, 3.0]
    assert x.grad is None or x.grad.tolist() == [[1.0] * 3] * 4


def test_what_is_its_own_is_not_copied() -> None:
    own = torch.ones(2, 3)
    layer = Backward(lambda grad, *rest: (grad, own, torch.ones(2, 3)))
    layer(torch.ones(4, 3, requires_grad=True)).backward(torch.ones(4, 3))
    assert layer.rows(0).data_ptr() == own.data_ptr()


def test_functions_are_named() -> None:
    assert [name_of(f) for f in ("own", torch.relu, Tensor.add_)] == ["own", "relu", "add_"]
    assert name_of(SimpleNamespace(a=1)) == "namespace(a=1)"


# Tensors taken apart, and joined


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
        lambda n: torch.arange(n * 5.0).as_strided((n, 1, 5), (5, 0, 1)),
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


def _shared(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("g", "rows", "features", "shared"),
    [
        (2, 4, 8, True),  # 64 bytes a micro-batch
        (2, 4, 4, False),
        (3, 6, 8, True),
        (3, 6, 4, False),
        (4, 8, 8, True),
        (3, 6, 12, False),
        (5, 5, 4, False),  # the last would start at a multiple, and others not
        (1, 3, 5, True),
    ],
)
def test_pieces_that_start_where_fresh_tensors_do_are_no_copies(g: int, rows: int, features: int, shared: bool) -> None:
    x = torch.arange(float(rows * features)).view(rows, features)
    pieces = cut(x, g)
    assert [_shared(own, x) for own in pieces] == [shared] * g
    assert torch.equal(torch.cat(pieces), x)
    assert all(own.data_ptr() % 64 == x.data_ptr() % 64 for own in pieces)


def test_pieces_start_as_far_past_a_fresh_place_as_the_whole() -> None:
    whole = torch.arange(4 * 16.0 + 5)[5:].view(4, 16)
    assert all(_shared(own, whole) for own in cut(whole, 2))
    odd = torch.arange(4 * 3.0 + 5)[5:].view(4, 3)
    for k, own in enumerate(cut(odd, 2)):
        assert own.storage_offset() % 16 == 5 and torch.equal(own, odd[2 * k : 2 * k + 2])
        assert piece(odd, k, 2).storage_offset() % 16 == 5


@pytest.mark.parametrize("k", range(3))
def test_a_piece_of_another_layout_is_copied(k: int) -> None:
    """As of a recurrent layer's output, where the micro-batches' times lie beside one another."""
    whole = torch.arange(5 * 6 * 16.0).view(5, 6, 16).transpose(0, 1)
    own = piece(whole, k, 3)
    assert own.stride() == (16, 32, 1) and torch.equal(own, whole[2 * k : 2 * k + 2])
    assert not _shared(own, whole)
    flat = torch.arange(6 * 16.0).view(6, 16)
    assert _shared(piece(flat, k, 3), flat) and torch.equal(piece(flat, k, 3), flat[2 * k : 2 * k + 2])


@pytest.mark.parametrize(
    ("tensor", "own"),
    [
        (torch.empty(6, 4), (4, 1)),
        (torch.empty(4, 6).t(), (1, 2)),
        (torch.empty(5, 6, 4).transpose(0, 1), (4, 8, 1)),
        (torch.empty(4).expand(6, 4), (0, 1)),
        (torch.empty(6, 1).expand(6, 4), (1, 0)),
        (torch.empty(2, 6).expand(6, 2, 6), (0, 6, 1)),
        (torch.empty(1, 6, 4).transpose(0, 1), (4, 24, 1)),  # a dimension of size 1 has no stride that counts
        (torch.empty(4, 7)[:, :6].t(), (1, 7)),  # the samples do not fill the memory
        (torch.empty(6), (1,)),
        (torch.empty(1, 6, 6).transpose(0, 1).transpose(0, 2), (1, 12, 2)),
    ],
)
def test_the_strides_of_a_micro_batchs_own_tensor(tensor: Tensor, own: tuple[int, ...]) -> None:
    assert layers.own_strides(tensor, 3) == own


def test_copies_may_be_changed_in_place() -> None:
    """Torch does not allow it for views that were made together."""
    own = laid_apart(torch.zeros(4, 3, requires_grad=True).detach(), 2)
    own[0].add_(1.0)
    assert own[1].sum() == 0 and not own[0]._is_view()


def test_copies_take_no_more_memory_than_they_need() -> None:
    for features, bytes_ in ((3, 2 * 64), (8, 2 * 64), (9, 2 * 128)):
        own = laid_apart(torch.zeros(4, features), 2)
        assert own[0].untyped_storage().nbytes() == bytes_


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_single_piece_that_is_a_copy_is_written_back(number: int) -> None:
    x = torch.zeros(6, 16)
    pieces = [own.clone() if k == number else own for k, own in enumerate(cut(x, 3))]
    pieces[number].fill_(1.0)
    put_pieces(x, pieces)
    assert x.sum(1).tolist() == [16.0 * (k // 2 == number) for k in range(6)]


def test_pieces_of_the_tensor_itself_are_not_written_back() -> None:
    x = torch.zeros(6, 16)
    pieces, version = cut(x, 3), x._version
    put_pieces(x, pieces)
    assert x._version == version


# Micro-batches' own tensors -> the strides of the whole


@pytest.mark.parametrize(
    ("pieces", "strides"),
    [
        ([torch.ones(2, 5)] * 3, (5, 1)),
        ([torch.ones(5, 2).t()] * 3, (1, 6)),
        ([torch.ones(4, 2, 5).transpose(0, 1)] * 3, (5, 30, 1)),
        ([torch.ones(2, 5, 4).transpose(1, 2)] * 3, (20, 1, 4)),
        ([torch.ones(2, 5), torch.ones(5, 2).t(), torch.ones(2, 5)], (5, 1)),
        ([torch.ones(5, 2).t(), torch.ones(2, 5), torch.ones(2, 5)], (1, 6)),
        ([torch.ones(5).expand(2, 5)] * 3, (5, 1)),
        ([torch.ones(5).expand(2, 5), torch.ones(2, 5), torch.ones(2, 5)], (5, 1)),
        ([torch.ones(4, 5, 1).expand(4, 5, 2).permute(2, 0, 1)] * 3, (20, 5, 1)),
        ([torch.ones(4, 5, 1).expand(4, 5, 3).permute(1, 2, 0)] * 3, (12, 4, 1)),
        ([torch.ones(5, 1, 2).expand(5, 1, 2).permute(2, 1, 0)] * 3, (1, 6, 6)),
        ([torch.ones(5, 2).as_strided((2, 1, 5), (1, 0, 2))] * 3, (1, 30, 6)),
    ],
)
def test_what_is_joined_keeps_its_order_of_strides(pieces: list[Tensor], strides: tuple[int, ...]) -> None:
    """Dropout draws in the order of memory."""
    whole = joined(pieces)
    assert torch.equal(whole, torch.cat(pieces))
    sized = [s for s, size in zip(whole.stride(), whole.shape) if size > 1]
    assert sized == [s for s, size in zip(strides, whole.shape) if size > 1]


def test_parts_and_their_gradients_have_memory_of_their_own() -> None:
    x = torch.arange(12.0).view(6, 2).requires_grad_()
    parts = Cut.apply(x, 3)
    assert all(not _shared(a, x) for a in parts) and torch.equal(torch.cat(parts), x)
    (parts[0].sum() + 2 * parts[2].sum()).backward()
    assert x.grad is not None and x.grad[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0, 2.0, 2.0]


def test_gradients_of_what_was_joined_start_where_fresh_tensors_do() -> None:
    own = [torch.ones(2, 3, requires_grad=True) for _ in range(3)]
    starts: list[int] = []
    for tensor in own:
        tensor.register_hook(lambda grad: starts.append(grad.data_ptr() % 64))
    Join.apply(*own).backward(torch.arange(18.0).view(6, 3))
    assert [float(t.grad[0, 0]) for t in own if t.grad is not None] == [0.0, 6.0, 12.0]
    assert starts == [0, 0, 0]
