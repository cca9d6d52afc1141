"""Layers in a pack against the layer applied to one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.exact.packs.packed import floats, trained
from tests.exact.packs.pieces import Pieces
from trainer.exact.packs import layer_functions, rules
from trainer.exact.packs.layers import Layer, Rule, Site, cut
from trainer.exact.packs.rules import LINEAR
from trainer.exact.packs.values import same_bits
from trainer.exact.packs.verdicts import RefusedError

pytestmark = pytest.mark.usefixtures("one_thread")

G = 3  # micro-batches


class OfThree:
    """Stands for a pack of three micro-batches."""

    g = G


class Case(NamedTuple):
    """A layer: the rules of its kind, its function, the shapes of its input and parameters, and options."""

    rules: tuple[Rule, ...]
    call: Callable[..., Tensor]
    x: tuple[int, ...]
    weight: tuple[int, ...] | None
    bias: tuple[int, ...] | None
    options: dict[str, Any]


def linear(*x: int, bias: bool = True) -> Case:
    def call(x: Tensor, w: Tensor, b: Tensor | None, place: int = 0) -> Tensor:
        return F.linear(x, w, b)

    return Case(rules.LINEAR, call, x, (4, x[-1]), (4,) if bias else None, {})


def addmm() -> Case:
    def call(x: Tensor, w: Tensor, b: Tensor, place: int = 0) -> Tensor:
        return torch.addmm(b, x, w)

    return Case(rules.ADDMM, call, (6, 5), (5, 4), (4,), {})


def convolution(*x: int, transposed: bool = False, groups: int = 1, bias: bool = True) -> Case:
    n = len(x) - 2
    o: dict[str, Any] = {"stride": [2] * n, "padding": [1] * n, "output_padding": [int(transposed)] * n}
    o |= {"dilation": [1] * n, "groups": groups, "transposed": transposed}

    def call(x: Tensor, w: Tensor, b: Tensor | None, place: int = 0) -> Tensor:
        rest = (o["stride"], o["padding"], o["dilation"], transposed, o["output_padding"], groups)
        return torch.convolution(x, w, b, *rest)

    channels = 6
    shape = (x[1], channels // groups) if transposed else (channels, x[1] // groups)
    return Case(rules.CONVOLUTION, call, x, (*shape, *[3] * n), (channels,) if bias else None, o)


def layer_norm(*shape: int, weight: bool = True, bias: bool = True) -> Case:
    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        return F.layer_norm(x, shape, w, b, 1e-3)

    own = (shape if weight else None, shape if bias else None)
    return Case(rules.LAYER_NORM, call, (6, 2, 4), *own, {"shape": list(shape), "eps": 1e-3})


def rms_norm(*shape: int, eps: float | None = 1e-3) -> Case:
    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return F.rms_norm(x, shape, w, eps)

    return Case(rules.RMS_NORM, call, (6, 2, 4), shape, None, {"shape": list(shape), "eps": eps})


def group_norm(groups: int, *x: int) -> Case:
    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        return F.group_norm(x, groups, w, b, 1e-3)

    return Case(rules.GROUP_NORM, call, x, (x[1],), (x[1],), {"groups": groups, "eps": 1e-3})


def batch_norm(*x: int, affine: str = "both", statistics: bool = True) -> Case:
    mean, var = (torch.full((G, x[1]), 0.5) if statistics else None for _ in range(2))

    def call(x: Tensor, w: Tensor | None, b: Tensor | None, place: int = 0) -> Tensor:
        own = [None if rows is None else rows[place].data for rows in (mean, var)]
        return F.batch_norm(x, own[0], own[1], w, b, True, 0.25, 1e-3)

    options = {"mean": mean, "var": var, "momentum": 0.25, "eps": 1e-3}
    weight, bias = ((x[1],) if affine in ("both", own) else None for own in ("weight", "bias"))
    return Case(rules.BATCH_NORM, call, x, weight, bias, options)


def broadcast(multiplies: bool, x: tuple[int, ...], weight: tuple[int, ...]) -> Case:
    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return x * w if multiplies else x + w

    return Case(rules.BROADCAST, call, x, weight, None, {"multiplies": multiplies})


SHAPES = [((6, 5, 4), ()), ((6, 5, 4), (4,)), ((6, 5, 4), (5, 1)), ((6, 5, 4), (1, 5, 4)), ((6, 5, 4), (1, 1, 4))]
SHAPES += [((6, 1, 4), (1, 4)), ((6, 2, 3, 4), (2, 1, 1)), ((6, 2, 3, 4), (3, 1)), ((6, 4), (1, 1)), ((6, 4), (1,))]
SHAPES += [((6, 5, 1), (1, 1)), ((3, 5, 4), (5, 1))]
CASES: dict[str, Case] = {
    "linear": linear(6, 5),
    "linear of places": linear(6, 2, 5),
    "linear without a bias": linear(6, 5, bias=False),
    "addmm": addmm(),
    "conv1d": convolution(6, 4, 7),
    "conv2d in groups": convolution(6, 4, 5, 4, groups=2),
    "conv2d without a bias": convolution(6, 4, 5, 4, bias=False),
    "conv1d, transposed": convolution(6, 4, 7, transposed=True),
    "conv2d, transposed, in groups": convolution(6, 4, 5, 4, transposed=True, groups=2),
    "layer_norm": layer_norm(4),
    "layer_norm of two dimensions": layer_norm(2, 4),
    "layer_norm without a bias": layer_norm(4, bias=False),
    "rms_norm": rms_norm(4),
    "rms_norm of two dimensions": rms_norm(2, 4, eps=None),
    "group_norm": group_norm(2, 6, 4, 5),
    "group_norm of features": group_norm(2, 6, 4),
    "group_norm of one channel": group_norm(1, 6, 1, 5),
    "batch_norm": batch_norm(12, 4),
    "batch_norm of places": batch_norm(6, 4, 5),
    "batch_norm of images": batch_norm(6, 4, 5, 2),
    "batch_norm without parameters": batch_norm(12, 4, affine="none"),
    "batch_norm without a bias": batch_norm(12, 4, affine="weight"),
    "batch_norm without statistics": batch_norm(12, 4, statistics=False),
    **{f"mul {x} {w}": broadcast(True, x, w) for x, w in SHAPES},
    **{f"add {x} {w}": broadcast(False, x, w) for x, w in SHAPES},
}


class Kernels(TorchDispatchMode):
    """Counts the gradients that kernels are asked for where they may leave some out."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(argument.name == "output_mask" for argument in func._schema.arguments):
            self.asked += sum(args[-1])
        return func(*args, **(kwargs or {}))


ON_A_GPU_ONLY = (rules.RMS_NORM[0],)
BOTH, WEIGHT, BIAS, NONE = (True, True), (True, False), (False, True), (False, False)


def each_rule() -> list[Any]:
    """(case, rule, which of weight and bias are trained)."""
    found = []
    for name, case in CASES.items():
        there = (case.weight is not None, case.bias is not None)
        always = case.rules in (rules.RMS_NORM, rules.BROADCAST)  # these have a rule only for a trained weight
        for learns in (BOTH, WEIGHT, BIAS, NONE):
            if all(t or not own for t, own in zip(there, learns)) and not (always and learns == NONE):
                own = [(case, rule) for rule in case.rules if rule not in ON_A_GPU_ONLY]
                found += [pytest.param(c, r, learns, id=f"{name}, {i}, {learns}") for i, (c, r) in enumerate(own)]
    return found


@pytest.mark.parametrize("input_needs", [True, False])
@pytest.mark.parametrize(("case", "rule", "learns"), each_rule())
def test_a_rule_computes_what_the_layer_does(
    case: Case, rule: Rule, learns: tuple[bool, bool], input_needs: bool
) -> None:
    """For one micro-batch at a time: values, and one gradient a micro-batch where one is wanted, and nowhere else."""
    torch.manual_seed(0)
    x = torch.randn(case.x, requires_grad=input_needs)
    weight, bias = (None if shape is None else torch.randn(shape) for shape in (case.weight, case.bias))
    places = [number if own else None for number, own in enumerate(learns)]
    own = Site(OfThree(), rule, case.call, ("layer",), places[0], places[1], **case.options)  # type: ignore[arg-type]
    rows = [r for r in (case.options.get("mean"), case.options.get("var")) if r is not None]
    for r in rows:
        r.fill_(0.5)
    with torch.no_grad():
        y, saved = rule.forward(own, x, weight, bias)
    statistics = [r.clone() for r in rows]
    for r in rows:
        r.fill_(0.5)
    with torch.no_grad():
        expected = torch.cat([case.call(part, weight, bias, place=k) for k, part in enumerate(cut(x, G))])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(statistics, rows)
    grad = torch.randn(y.shape)
    with Kernels() as kernels:
        found = rule.backward(own, grad, x, weight, bias, *saved)
    alone = own.alone(grad, x, weight, bias)
    always = case.rules in (rules.BROADCAST, rules.BATCH_NORM)  # those give the input's gradient in any case
    assert (found[0] is not None) == (input_needs or always)
    torch.testing.assert_close(found[0], alone[0] if input_needs or always else None)
    for gradient, single, is_trained, p in zip(found[1:], alone[1:], learns, (weight, bias)):
        assert (gradient is not None) == is_trained
        if gradient is not None and p is not None:
            assert gradient.shape == (G, *p.shape)
            torch.testing.assert_close(gradient, single)
    if kernels.asked:
        in_one_call = case.rules is rules.BATCH_NORM or rule is rules.CONVOLUTION[0]
        assert kernels.asked == (input_needs or always) + (1 if in_one_call else G) * sum(learns)


class FusedRmsNorm:
    """Stands for the kernels of a GPU that have no counterpart on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm", self.forward)
        monkeypatch.setattr(torch.ops.aten, "_fused_rms_norm_backward", self.backward)

    def forward(self, x: Tensor, shape: list[int], weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        dims = [-d - 1 for d in range(len(shape))]
        return F.rms_norm(x, shape, weight, eps), torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)

    def backward(
        self, grad: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        self.asked += sum(mask)
        with torch.enable_grad():
            own = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
            y = own[0] * rstd * own[1]  # only for the weight
            exact = F.rms_norm(own[0], shape, own[1], 1e-3)
        dx, dw = torch.autograd.grad(exact, own[0], grad)[0], torch.autograd.grad(y, own[1], grad)[0]
        return tuple(gradient if there else None for gradient, there in zip((dx, dw), mask))


@pytest.mark.parametrize("input_needs", [True, False])
def test_the_kernels_of_rms_norm_are_given_what_they_need(input_needs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    case, kernels = rms_norm(2, 4), FusedRmsNorm(monkeypatch)
    x, weight = torch.randn(case.x, requires_grad=input_needs), torch.randn(2, 4)
    own = Site(OfThree(), case.rules[0], case.call, ("",), 0, None, **case.options)  # type: ignore[arg-type]
    with torch.no_grad():
        y, saved = own.rule.forward(own, x, weight, None)
        torch.testing.assert_close(y, case.call(x, weight, None))
    grad = torch.randn(y.shape)
    dx, dw, db = own.rule.backward(own, grad, x, weight, None, *saved)
    alone = own.alone(grad, x, weight, None)
    torch.testing.assert_close((dx, dw), (alone[0] if input_needs else None, alone[1]))
    assert db is None and kernels.asked == input_needs + G


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_an_embedding_has_the_gradients_of_its_rows(options: dict[str, Any]) -> None:
    options = {"padding_idx": None, "scale_grad_by_freq": False} | options

    def call(x: Tensor, w: Tensor, b: None, place: int = 0) -> Tensor:
        return F.embedding(x, w, options["padding_idx"], None, 2.0, options["scale_grad_by_freq"])

    torch.manual_seed(0)
    x, weight = torch.randint(0, 5, (6, 4)), torch.randn(5, 3)
    own = Site(OfThree(), rules.EMBEDDING[0], call, ("",), 0, None, **options)  # type: ignore[arg-type]
    y, saved = own.rule.forward(own, x, weight, None)
    assert torch.equal(y, call(x, weight, None))
    grad = torch.randn(y.shape)
    dx, dw, db = own.rule.backward(own, grad, x, weight, None, *saved)
    assert dx is None and db is None
    torch.testing.assert_close(dw, own.alone(grad, x, weight, None)[1])


def test_a_gradient_of_another_layout_is_copied_for_group_norm() -> None:
    """Its kernel reads the gradient as one piece of memory."""
    torch.manual_seed(0)
    case = group_norm(2, 6, 4, 5)
    x, weight, bias = torch.randn(case.x, requires_grad=True), torch.randn(4), torch.randn(4)
    own = Site(OfThree(), case.rules[0], case.call, ("",), 0, 1, **case.options)  # type: ignore[arg-type]
    with torch.no_grad():
        _, saved = own.rule.forward(own, x, weight, bias)
    grad = torch.randn(6, 5, 4).transpose(1, 2)
    found = own.rule.backward(own, grad, x, weight, bias, *saved)
    torch.testing.assert_close(found, own.alone(grad, x, weight, bias))


def test_a_batch_norm_is_only_for_gradients_that_lie_as_its_output_does() -> None:
    case = batch_norm(6, 4, 5, statistics=False)
    pieces = Pieces(torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True), g=G)
    own = Site(pieces.sites, case.rules[0], case.call, ("batch_norm",), 0, 1, **case.options)
    y = Layer.apply(own, torch.randn(case.x, requires_grad=True), *pieces.parameters)
    with pytest.raises(RefusedError, match="batch_norm gets a gradient that lies in memory in another way"):
        y.backward(torch.randn(6, 5, 4).transpose(1, 2))


def test_a_weight_and_a_bias_are_repeated_by_one_kernel() -> None:
    weight, bias = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    both = rules._repeated(weight, bias, 2)
    assert [own is not None and own.tolist() for own in both] == [[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 3.0, 4.0]]
    assert both[0] is not None and both[1] is not None
    assert both[0].untyped_storage().data_ptr() == both[1].untyped_storage().data_ptr()


def test_a_weight_and_a_bias_of_two_types_keep_them() -> None:
    both = rules._repeated(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0], dtype=torch.bfloat16), 2)
    assert [own is not None and own.dtype for own in both] == [torch.float32, torch.bfloat16]
    assert [own is not None and own.tolist() for own in both] == [[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 3.0, 4.0]]


# In whole runs


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
