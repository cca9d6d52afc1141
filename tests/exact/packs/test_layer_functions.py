"""Functions with a rule: which calls have one, and that the rule computes what torch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.one_pack import G, pack_of
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.packs.layer_functions import LAYER_FUNCTIONS
from trainer.exact.packs.layers import Rule, Site, cut
from trainer.exact.packs.nested import mapped, tensors_of
from trainer.exact.packs.pack import Pack
from trainer.exact.packs.rules import (
    ADDMM,
    BATCH_NORM,
    BROADCAST,
    CONVOLUTION,
    EMBEDDING,
    GROUP_NORM,
    LAYER_NORM,
    LINEAR,
    RMS_NORM,
)
from trainer.exact.packs.values import same_bits
from trainer.exact.packs.verdicts import RefusedError

pytestmark = pytest.mark.usefixtures("one_thread")

DRAW = torch.Generator().manual_seed(7)


def P(*shape: int, of: int | None = None) -> Tensor:
    """A tensor with a part for each micro-batch; of whole numbers < of."""
    tensor = torch.randn(shape, generator=DRAW) if of is None else torch.randint(of, shape, generator=DRAW)
    tensor._parted = True  # type: ignore[attr-defined]
    return tensor


def W(*shape: int) -> nn.Parameter:
    """A trained parameter."""
    return nn.Parameter(torch.randn(shape, generator=DRAW))


def S(*shape: int) -> Tensor:
    """Anything else, as a frozen weight."""
    return torch.randn(shape, generator=DRAW)


class Layers:
    """Stands for `Sites`: notes the layers, and computes them for one micro-batch at a time.

    Args:
        takes: whether layers are taken; otherwise they have to be computed in another way.
    """

    g = G

    def __init__(self, takes: bool = True) -> None:
        self.takes, self.names, self.rules, self.casts = takes, list[str](), list[Any](), list[bool]()
        self.sites: list[tuple[Site, Sequence[Tensor | None]]] = []

    def layer(
        self,
        rules: Sequence[Rule],
        name: str,
        call: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        casts: bool = True,
        **options: Any,
    ) -> Any:
        if not self.takes:
            return NotImplemented
        self.names.append(name)
        self.rules.append(rules)
        self.casts.append(casts)
        places = [0 if isinstance(p, nn.Parameter) else None for p in (weight, bias)]
        self.sites += [(Site(self, rule, call, (name,), *places, **options), (x, weight, bias)) for rule in rules]  # type: ignore[arg-type]
        return torch.cat([call(own, weight, bias, place=k) for k, own in enumerate(cut(x, G))])

    def shared(
        self, rules: Sequence[Rule], name: str, call: Callable[..., Tensor], x: Tensor, weight: Tensor, **options: Any
    ) -> Any:
        return Site(self, rules[0], call, (name,), 0, None, **options) if self.takes else None  # type: ignore[arg-type]


class Call(NamedTuple):
    """A call of a function."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def made(self, layers: Layers, statistics: RunningStatistics | None = None) -> tuple[Any, Pack]:
        """What the call gives in a pack, and the pack."""
        given = list(tensors_of((self.args, self.kwargs)))
        samples = [t for t in given if hasattr(t, "_parted")]
        parameters = [t for t in given if isinstance(t, nn.Parameter)]
        pack = pack_of(*(samples or [torch.zeros(8)]), parameters=parameters, statistics=statistics)
        pack.sites = layers  # type: ignore[assignment]
        return LAYER_FUNCTIONS[self.func](pack, self.func, self.args, self.kwargs), pack


def c(func: Any, *args: Any, **kwargs: Any) -> Call:
    return Call(func, args, kwargs)


def alone(value: Any, k: int) -> Any:
    """Arguments as micro-batch k has them alone."""
    if isinstance(value, Tensor):
        return value.chunk(G)[k].clone() if hasattr(value, "_parted") else value
    return mapped(value, lambda v: alone(v, k))


def gradients(found: Tensor, call: Call) -> list[Tensor | None]:
    parameters = [t for t in tensors_of((call.args, call.kwargs)) if isinstance(t, nn.Parameter)]
    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(8))
    return list(torch.autograd.grad(found, parameters, seed))


def name_of(value: Any) -> str | None:
    return value.func.__name__ if isinstance(value, Call) else None


X, FEW, IMAGES, TOKENS = P(8, 3), P(8, 1), P(8, 4, 7, 6), P(8, 5, of=6)
ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
MULTIPLIES = (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
LINE, VOLUME = P(8, 4, 9), P(8, 4, 5, 4, 3)

RULED: list[tuple[Call, str, tuple[Rule, ...], bool]] = [
    *((c(F.linear, *args), "linear", LINEAR, True) for args in ((X, W(5, 3)), (P(8, 2, 3), W(5, 3), W(5)))),
    (c(F.linear, X, weight=S(5, 3), bias=W(5)), "linear", LINEAR, True),
    (c(F.linear, X, W(5, 3), S(5)), "linear", LINEAR, True),
    (c(torch.addmm, W(5), X, W(3, 5)), "addmm", ADDMM, True),
    (c(torch.addmm, S(5), X, W(3, 5)), "addmm", ADDMM, True),
    *(
        (c(*call), call[0].__name__, CONVOLUTION, True)
        for call in (
            (F.conv1d, LINE, W(6, 4, 2)),
            (F.conv2d, IMAGES, W(6, 4, 2, 3), W(6)),
            (F.conv3d, VOLUME, W(2, 4, 2, 2, 2)),
            (F.conv_transpose1d, LINE, W(4, 6, 2)),
            (F.conv_transpose2d, IMAGES, W(4, 6, 2, 3), W(6)),
            (F.conv_transpose3d, VOLUME, W(4, 2, 2, 2, 2)),
            (F.conv1d, LINE, W(6, 2, 2), None, 2, 1, 3, 2),
            (F.conv1d, LINE, W(6, 2, 2), None, (2,), [1], (3,), 2),
            (F.conv2d, IMAGES, W(6, 4, 2, 3), S(6), (2, 1), (0, 1)),
            (F.conv_transpose1d, LINE, W(4, 3, 2), W(6), 3, 1, 2, 2, 2),
            (F.conv_transpose2d, IMAGES, W(4, 6, 2, 3), None, (2, 3), (0, 1), (1, 2)),
        )
    ),
    (c(F.conv2d, IMAGES, weight=W(6, 4, 2, 3), padding=1, dilation=(1, 2)), "conv2d", CONVOLUTION, True),
    *(
        (c(F.embedding, TOKENS, table, *rest), "embedding", EMBEDDING, False)
        for table in (W(6, 4),)
        for rest in ((), (2,), (0,), (-1,), (-6,), (None, None, 2.0, True), (1, None, 2.0, False, False))
    ),
    (c(F.embedding, TOKENS, W(6, 4), scale_grad_by_freq=True, padding_idx=3), "embedding", EMBEDDING, False),
    *(
        (c(F.layer_norm, x, shape, *rest), "layer_norm", LAYER_NORM, False)
        for x, shape, rest in (
            (X, (3,), (W(3),)),
            (X, [3], (W(3), W(3))),
            (X, (3,), (None, W(3), 0.1)),
            (LINE, (4, 9), (W(4, 9), S(4, 9))),
        )
    ),
    *((c(F.rms_norm, X, (3,), W(3), *eps), "rms_norm", RMS_NORM, False) for eps in ((), (0.1,))),
    (c(torch.rms_norm, X, (3,), W(3), 0.1), "rms_norm", RMS_NORM, False),
    (c(F.rms_norm, LINE, [9], weight=W(9)), "rms_norm", RMS_NORM, False),
    *(
        (c(F.group_norm, LINE, 2, *rest), "group_norm", GROUP_NORM, False)
        for rest in ((W(4),), (W(4), W(4)), (W(4), S(4), 0.1))
    ),
    *((c(f, LINE, W(9)), "mul", BROADCAST, False) for f in MULTIPLIES),
    *((c(f, LINE, W(9)), "add", BROADCAST, False) for f in ADDS),
    *((c(torch.mul, LINE, W(*shape)), "mul", BROADCAST, False) for shape in ((4, 1), (1, 4, 9), (1,))),
    *((c(torch.add, LINE, W(*shape)), "add", BROADCAST, False) for shape in ((4, 1), (1, 4, 9), (1,))),
    *((c(f, W(1, 3), X), f.__name__, BROADCAST, False) for f in (torch.mul, torch.add)),
    (c(torch.mul, W(), X), "mul", BROADCAST, False),
]


@pytest.mark.parametrize(("call", "name", "rules", "casts"), RULED, ids=name_of)
def test_a_layer_with_a_rule_has_the_bits_of_the_layer_alone(
    call: Call, name: str, rules: tuple[Rule, ...], casts: bool
) -> None:
    """And so have the gradients of its parameters, whatever its options are."""
    layers = Layers()
    found, _ = call.made(layers)
    assert (layers.names, layers.rules, layers.casts) == ([name], [rules], [casts])
    expected = torch.cat([call.func(*alone(call.args, k), **alone(call.kwargs, k)) for k in range(G)])
    assert same_bits(found, expected)
    assert all(same_bits(a, b) for a, b in zip(gradients(found, call), gradients(expected, call)))


@pytest.mark.parametrize(("call", "name", "rules", "casts"), RULED, ids=name_of)
def test_a_rule_gets_the_options_of_its_layer(call: Call, name: str, rules: Any, casts: bool) -> None:
    """Up to rounding errors each rule computes what the layer does. Which of them has its bits, a trial finds out."""
    layers = Layers()
    found, _ = call.made(layers)
    for site, tensors in layers.sites:
        own = [None if t is None else t.detach() for t in tensors]
        if own[0] is not None and own[0].is_floating_point():
            own[0].requires_grad_()
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(8))
        try:
            y, saved = site.rule.forward(site, *own)
            back = site.rule.backward(site, grad, *own, *saved)  # type: ignore[arg-type]
        except NotImplementedError:  # there is no such kernel on a CPU
            assert site is not layers.sites[-1][0]
            continue
        for one, other in zip((y, *back), (found, *site.alone(grad, *own))):  # type: ignore[arg-type]
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


WITHOUT_A_RULE = [
    # Nothing that is trained, or no samples, or a weight for each sample.
    *(c(F.linear, X, S(5, 3)), c(F.linear, S(8, 3), W(5, 3)), c(F.linear, X, P(8, 3), W(8)), c(F.linear, X, P(8, 3))),
    c(F.linear, P(8), W(8)),
    *(c(torch.addmm, S(5), X, S(3, 5)), c(torch.addmm, W(5), X, W(3, 5), beta=2.0)),
    *(c(torch.addmm, W(8, 5), X, W(3, 5)), c(torch.addmm, W(5), S(8, 3), W(3, 5))),
    c(torch.addmm, W(5), X, mat2=W(3, 5)),
    *(c(F.conv1d, LINE, S(6, 4, 2)), c(F.conv1d, P(8, 9), W(6, 8, 2)), c(F.conv1d, input=LINE, weight=W(6, 4, 2))),
    *(c(F.conv1d, LINE, W(6, 4, 2), padding="same"), c(F.conv1d, LINE, W(6, 4, 2), None, (1.5,))),
    *(c(F.conv2d, IMAGES, W(6, 4, 2, 2), stride=(1, 1.5)), c(F.conv_transpose1d, LINE, S(4, 6, 2), W(6), 1, "same")),
    *(c(F.conv2d, S(8, 4, 7, 6), W(6, 4, 2, 2)), c(F.conv2d, P(8, 7, 6), W(6, 8, 2, 2))),
    *(c(F.embedding, TOKENS, S(6, 4)), c(F.embedding, TOKENS, P(8, 4))),
    *(c(F.embedding, TOKENS, W(6, 4), None, 1.0), c(F.embedding, TOKENS, W(6, 4), max_norm=1.0)),
    c(F.embedding, TOKENS, W(6, 4), sparse=True),
    *(c(F.layer_norm, X, (3,)), c(F.layer_norm, X, (3,), S(3)), c(F.layer_norm, X, (8, 3), W(8, 3))),
    c(F.layer_norm, S(8, 3), (3,), W(3)),
    *(c(F.rms_norm, X, (3,), S(3)), c(F.rms_norm, X, (8, 3), W(8, 3)), c(F.rms_norm, S(8, 3), (3,), W(3))),
    *(c(F.group_norm, LINE, 2, S(4)), c(F.group_norm, S(8, 4, 9), 2, W(4))),
    *(c(torch.mul, *args) for args in ((X, 2.0), (X, S(3)), (W(3), W(3)), (X, P(8, 3)), (W(3), 2.0))),
    *(c(torch.add, X, W(3), alpha=2), c(torch.add, X, other=W(3)), c(torch.mul, S(8, 3), W(3))),
    # The parameter is larger than a sample, or has something for each of them.
    *(c(torch.mul, X, W(2, 8, 3)), c(torch.mul, X, W(8, 3)), c(torch.add, FEW, W(3)), c(torch.mul, X, W(1, 8, 3))),
    # Another type comes out.
    c(torch.mul, X, nn.Parameter(torch.ones(3, dtype=torch.float64))),
    c(F.batch_norm, X, S(3), S(3), W(3)),
    c(F.batch_norm, X, S(3), S(3), W(3), None, False),
]


@pytest.mark.parametrize("call", WITHOUT_A_RULE, ids=name_of)
def test_a_call_without_a_rule_is_left_to_others(call: Call) -> None:
    layers = Layers()
    assert call.made(layers)[0] is NotImplemented
    assert layers.names == []


def test_a_group_norm_of_a_turned_tensor_has_no_rule() -> None:
    """Its kernel reads the samples as one piece of memory."""
    turned = P(8, 9, 4).transpose(1, 2)
    turned._parted = True  # type: ignore[attr-defined]
    assert c(F.group_norm, turned, 2, W(4)).made(Layers())[0] is NotImplemented


# A table that all samples share


PLACES = torch.tensor([[4, 1, 0, 4]])


def test_rows_that_all_samples_share_follow_from_the_table() -> None:
    for tables in ([W(6, 4)], [W(3), W(6, 4)]):  # at the first place of the parameters, and at a later one
        call = c(F.embedding, PLACES, tables[-1], 1)
        pack = pack_of(X, parameters=tables)
        pack.sites = Layers()  # type: ignore[assignment]
        found = LAYER_FUNCTIONS[F.embedding](pack, call.func, call.args, call.kwargs)
        assert same_bits(found.detach(), F.embedding(PLACES, tables[-1], 1).detach())
        assert pack.tensors.place(found) == -1, "a parameter of its own, whose gradients are passed on in the end"


@pytest.mark.parametrize("why", ["no rule is exact", "without gradients", "a frozen table", "a table that follows"])
def test_rows_that_all_samples_share_are_else_left_to_others(why: str) -> None:
    table = S(6, 4) if why in ("a frozen table", "a table that follows") else W(6, 4)
    pack = pack_of(X, parameters=[table] if isinstance(table, nn.Parameter) else ())
    pack.sites = Layers(takes=why != "no rule is exact")  # type: ignore[assignment]
    if why == "a table that follows":
        pack.tensors.derived[id(table)] = -1
    with torch.set_grad_enabled(why != "without gradients"):
        assert LAYER_FUNCTIONS[F.embedding](pack, F.embedding, (PLACES, table), {}) is NotImplemented


# BatchNorm


class Normed:
    """A BatchNorm of 3 features and one of 2, in the middle of a step."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2))
        self.statistics = RunningStatistics(self.model)
        self.statistics.begin()
        self.one, self.other = self.model  # type: ignore[misc]

    def alone(self, k: int, x: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
        """What micro-batch k alone gives, and its statistics."""
        own = [b.clone() for b in (self.one.running_mean, self.one.running_var)]  # type: ignore[operator]
        return F.batch_norm(x.chunk(G)[k].clone(), own[0], own[1], *rest), own


@pytest.mark.parametrize("takes", [True, False], ids=["by a rule", "one by one"])
@pytest.mark.parametrize(
    "rest",
    [(W(3), W(3), True), (None, None, True, 1.0), (W(3), None, True, 0.5, 0.1), (W(3), W(3), True, 1.0, 1e-3)],
)
def test_a_batch_norm_leaves_the_statistics_of_each_micro_batch(rest: Any, takes: bool) -> None:
    x, layers, normed = P(8, 3), Layers(takes), Normed()
    call = c(F.batch_norm, x, normed.one.running_mean, normed.one.running_var, *rest)
    found, pack = call.made(layers, normed.statistics)
    expected = [normed.alone(k, x, *rest) for k in range(G)]
    assert same_bits(found.detach(), torch.cat([y for y, _ in expected]).detach())
    rows = normed.statistics.rows_of(pack.shares.scratch, G)[:, :6]
    assert same_bits(rows, torch.stack([torch.cat(own) for _, own in expected]))
    if takes:
        assert (layers.names, layers.rules, layers.casts) == (["batch_norm"], [BATCH_NORM], [False])
        for site, tensors in layers.sites:
            y, _ = site.rule.forward(site, *(None if t is None else t.detach() for t in tensors))
            torch.testing.assert_close(y, found, rtol=1e-4, atol=1e-4)


def test_a_batch_norm_may_keep_no_statistics() -> None:
    layers = Layers()
    found, _ = c(F.batch_norm, X, None, None, W(3), None, True).made(layers)
    assert layers.names == ["batch_norm"] and found.shape == X.shape


@pytest.mark.parametrize(
    ("x", "buffers", "why"),
    [
        (S(8, 3), lambda n: (n.one.running_mean, n.one.running_var), "samples or statistics are not those of a micro"),
        (X, lambda n: (S(3), S(3)), "samples or statistics are not those of a micro-batch"),
        (P(8, 2), lambda n: (n.one.running_mean[:2], n.one.running_var[:2]), "statistics are a part of a layer's"),
        (P(8, 2), lambda n: (n.one.running_mean[:2], n.other.running_var), "statistics are a part of a layer's"),
        (P(8, 2), lambda n: (n.other.running_mean, n.one.running_var[:2]), "statistics are a part of a layer's"),
    ],
    ids=["samples of all", "other statistics", "a part of both", "of the mean", "of the variance"],
)
def test_a_batch_norm_with_other_statistics_is_refused(x: Tensor, buffers: Any, why: str) -> None:
    normed = Normed()
    with pytest.raises(RefusedError, match=f"a BatchNorm whose {why}"):
        c(F.batch_norm, x, *buffers(normed), None, None, True).made(Layers(), normed.statistics)


def test_an_instance_norm_is_computed_one_micro_batch_at_a_time() -> None:
    """Its running statistics are a mean over samples."""
    model = nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True))
    statistics = RunningStatistics(model)
    statistics.begin()
    mean, var = model[0].running_mean, model[0].running_var
    own, weight = [[t.clone() for t in (mean, var)] for _ in range(G)], W(4)  # type: ignore[operator]
    found, pack = c(F.instance_norm, LINE, mean, var, weight, momentum=1.0).made(Layers(), statistics)
    expected = [F.instance_norm(LINE.chunk(G)[k].clone(), *own[k], weight, momentum=1.0) for k in range(G)]
    assert same_bits(found.detach(), torch.cat(expected).detach())
    rows = statistics.rows_of(pack.shares.scratch, G)
    assert same_bits(rows, torch.stack([torch.cat(pair) for pair in own]))
