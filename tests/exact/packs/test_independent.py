"""Which functions are called once for all micro-batches of a pack: by their names and arguments, and in runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.packed import Task, floats, made, trained
from trainer.exact.packs import layers
from trainer.exact.packs.independent import MOVES, is_in_place, is_independent, plain_name, takes_sizes
from trainer.exact.packs.nested import mapped, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")
in_a_run = pytest.mark.usefixtures("group_of_one", "early_packs")

# Names of functions


@pytest.mark.parametrize(
    ("func", "options", "changes"),
    [
        (Tensor.add, {}, False),
        (Tensor.add_, {}, True),
        (F.relu, {"inplace": False}, False),
        (F.relu, {"inplace": True}, True),
        (torch.add, {"out": None}, False),
        (torch.add, {"out": torch.zeros(1)}, True),
        (Tensor.__add__, {}, False),
        (Tensor.__iadd__, {}, True),
        (Tensor.__ixor__, {}, True),
        (Tensor.__invert__, {}, False),
        (Tensor.__index__, {}, False),
        (Tensor.__setitem__, {}, True),
        (Tensor.__delitem__, {}, True),
        (Tensor.data.__set__, {}, True),  # type: ignore[attr-defined]
    ],
)
def test_what_changes_an_argument_is_known_by_its_name(func: Any, options: dict[str, Any], changes: bool) -> None:
    assert is_in_place(func, options) == changes


@pytest.mark.parametrize(
    ("func", "name"),
    [
        (torch.add, "add"),
        (Tensor.add_, "add"),
        (Tensor.__add__, "add"),
        (Tensor.__iadd__, "add"),
        (Tensor.__radd__, "radd"),
        (Tensor.__ilshift__, "lshift"),
        (Tensor.__invert__, "invert"),
        (Tensor.__index__, "index"),
    ],
)
def test_one_name_stands_for_all_kinds_of_a_function(func: Any, name: str) -> None:
    assert plain_name(func) == name


def test_sizes_may_be_those_of_all_samples_only_in_functions_of_shapes() -> None:
    assert all(takes_sizes(f) for f in (Tensor.view, torch.reshape, Tensor.expand, torch.broadcast_to))
    assert not any(takes_sizes(f) for f in (torch.sum, torch.mul, Tensor.narrow))


def test_functions_that_only_move_values_need_no_comparison() -> None:
    assert all(plain_name(f) in MOVES for f in (torch.cat, Tensor.to, F.relu, Tensor.__getitem__, Tensor.view))
    assert not any(plain_name(f) in MOVES for f in (torch.sin, torch.matmul, torch.sum, torch.softmax))


# Calls


class Call(NamedTuple):
    """A call of a function."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def c(func: Any, *args: Any, **kwargs: Any) -> Call:
    return Call(func, args, kwargs)


G, DRAW = 2, torch.Generator().manual_seed(6)


def P(*shape: int, of: int | None = None) -> Tensor:
    """A tensor with a part for each micro-batch, whose first dimension is that of 8 samples; of whole numbers < of."""
    tensor = torch.randn(shape, generator=DRAW) if of is None else torch.randint(of, shape, generator=DRAW)
    tensor._parted = True  # type: ignore[attr-defined]
    return tensor


def S(*shape: int, of: int | None = None) -> Tensor:
    """A tensor that all micro-batches share."""
    return torch.rand(shape, generator=DRAW) if of is None else torch.randint(of, shape, generator=DRAW)


def has_part(value: Any) -> bool:
    return hasattr(value, "_parted")


A, B, V, Q = P(8, 3), P(8, 3), P(8), P(8, 4, 3)
HEADS, PLACES, CLASSES = P(8, 2, 4, 3), P(8, 2, of=3), P(8, of=3)
ROW, ROWS, TABLE, COLUMNS = S(3), S(8, 3), S(5, 3), torch.tensor([2, 0])
ALL = slice(None)

LAYERS = [
    c(F.linear, A, S(5, 3)),
    c(F.linear, A, S(5, 3), S(5)),
    c(F.linear, A, weight=S(5, 3)),
    c(F.group_norm, P(8, 4), 2),
    c(F.batch_norm, A, S(3), S(3)),
    *(
        c(getattr(F, f"conv{t}{n}d"), P(8, 2, *[4] * n), S(2, 2, *[2] * n))
        for n in (1, 2, 3)
        for t in ("", "_transpose")
    ),
    *(
        c(getattr(F, f"{kind}_pool{n}d"), P(8, 2, *[4] * n), 2)
        for n in (1, 2, 3)
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
    ),
    c(F.interpolate, P(8, 2, 3), 6),
    c(F.pixel_shuffle, P(8, 4, 2, 2), 2),
    c(F.pixel_unshuffle, P(8, 1, 4, 4), 2),
    c(torch.triu, Q, 1),
    c(torch.tril, Q),
]

TOGETHER = [
    *LAYERS,
    # Of each element.
    *(c(torch.sin, A), c(F.relu, V), c(Tensor.add_, A, B), c(torch.add, A, 2.0), c(Tensor.__rsub__, A, 2.0)),
    *(c(torch.add, A, ROW), c(torch.add, ROW, A), c(torch.add, A, S(1, 3)), c(torch.add, A, S(), alpha=2)),
    *(c(torch.where, ROW > 0.5, A, B), c(torch.max, A, B), c(torch.min, A, ROW), c(Tensor.to, A, torch.float64)),
    *(c(F.mse_loss, A, B, reduction="none"), c(F.huber_loss, A, B, reduction="none")),
    # Along a dimension.
    *(c(torch.sum, A, 1), c(torch.sum, A, -1, True), c(torch.sum, A, dim=1), c(torch.sum, Q, [1, 2])),
    *(c(torch.sum, A, [1]), c(torch.sum, Q, dim=(1, -1)), c(torch.sum, A, axis=1), c(torch.max, A, 1)),
    *(c(torch.softmax, A, -1), c(torch.std, A, 1), c(F.glu, P(8, 4)), c(F.glu, P(8, 2, 3), 1)),
    *(c(Tensor.flip, Q, 1), c(Tensor.flip, Q, 1, 2), c(torch.flip, Q, [1, 2]), c(torch.flip, Q, dims=[2])),
    *(c(torch.chunk, A, 3, 1), c(torch.split, A, 2, 1), c(torch.split, A, [1, 2], dim=1), c(Tensor.unbind, A, 1)),
    *(c(torch.gather, A, 1, PLACES), c(torch.take_along_dim, A, PLACES, 1), c(Tensor.narrow, A, 1, 0, 2)),
    *(c(torch.scatter, A, 1, PLACES, B), c(torch.scatter, A, 1, index=PLACES, src=B)),
    # Shapes.
    *(c(Tensor.view, Q, -1, 12), c(Tensor.flatten, Q, 1), c(Tensor.unsqueeze, A, 1), c(Tensor.expand, A, -1, -1)),
    *(c(torch.transpose, Q, 1, 2), c(torch.transpose, Q, -1, -2), c(torch.swapaxes, HEADS, 1, 3)),
    *(c(Tensor.permute, Q, 0, 2, 1), c(torch.permute, Q, (0, 2, 1)), c(Tensor.permute, V, 0)),
    *(c(Tensor.repeat, A, 1, 2), c(Tensor.repeat, A, (1, 2)), c(Tensor.repeat, V, 1)),
    *(c(F.pad, A, (1, 1)), c(F.pad, A, pad=[1, 0]), c(F.pad, Q, (1, 1, 2, 0), "constant", 1.0)),
    # Joined.
    *(c(torch.cat, [A, B], 1), c(torch.cat, (A, B), dim=-1), c(torch.cat, tensors=[A, B], dim=1), c(torch.cat, [A], 1)),
    *(c(torch.stack, [A, B], 1), c(torch.stack, [A, B], dim=-1), c(torch.stack, [V, V], 1)),
    # Products.
    *(
        c(torch.matmul, A, S(3, 5)),
        c(torch.matmul, A, ROW),
        c(torch.matmul, Q, S(3, 5)),
        c(torch.matmul, Q, S(1, 3, 5)),
    ),
    *(c(torch.bmm, Q, P(8, 3, 4)), c(torch.matmul, HEADS, P(8, 2, 3, 4))),
    *(c(torch.matmul, S(5, 4), Q), c(torch.matmul, S(4), Q), c(torch.matmul, S(1, 5, 4), Q)),
    *(c(F.scaled_dot_product_attention, *[x] * 3) for x in (Q, HEADS)),
    c(F.scaled_dot_product_attention, Q, P(8, 5, 3), P(8, 5, 3)),
    c(F.scaled_dot_product_attention, *[HEADS] * 3, S(4, 4)),
    c(F.scaled_dot_product_attention, *[HEADS] * 3, None, 0.0),
    c(F.scaled_dot_product_attention, *[HEADS] * 3, attn_mask=P(8, 1, 4, 4)),
    # Places.
    *(
        c(Tensor.__getitem__, A, places)
        for places in (ALL, (ALL, 0), (ALL, slice(1, None)), (ALL, None), (ALL, None, 0))
    ),
    *(c(Tensor.__getitem__, Q, places) for places in (..., (..., 0), (..., 0, 0), (..., None, 0), (ALL, ..., 0))),
    *(c(Tensor.__getitem__, TABLE, CLASSES), c(Tensor.__getitem__, TABLE, PLACES)),
    *(c(torch.index_select, A, 1, COLUMNS), c(torch.index_select, A, -1, index=COLUMNS)),
    *(c(torch.index_select, A, dim=1, index=COLUMNS), c(torch.index_select, TABLE, 0, CLASSES)),
    *(c(torch.index_select, TABLE, -2, index=CLASSES), c(torch.index_select, S(5), 0, CLASSES)),
    *(c(Tensor.__setitem__, A, (ALL, 0), value) for value in (1, 2.0, V, S())),
    *(c(Tensor.__setitem__, A, ALL, value) for value in (B, ROW, S(1, 3))),
    # Others.
    *(c(F.layer_norm, A, (3,)), c(F.layer_norm, Q, [4, 3]), c(F.layer_norm, A, normalized_shape=(3,), weight=ROW)),
    *(c(F.layer_norm, A, (3,), ROW, ROW), c(F.rms_norm, Q, (3,))),
    c(F.cross_entropy, A, CLASSES, reduction="none"),
    c(F.cross_entropy, A, CLASSES, ROW, reduction="none"),
    c(F.cross_entropy, P(8, 3, 2), PLACES, weight=ROW, reduction="none"),
    *(c(F.one_hot, CLASSES, 3), c(F.one_hot, CLASSES, num_classes=4), c(F.one_hot, P(8, of=1), 1)),
    *(c(F.embedding, PLACES, TABLE), c(F.embedding, PLACES, TABLE, 0), c(F.embedding, PLACES, TABLE, None, None, 2.0)),
    c(F.dropout, A, 0.5, False),
]

APART = [
    # What samples might see of one another, or what is not known to be free of it.
    *(c(torch.roll, A, 1, 1), c(torch.cumsum, A, 0), c(Tensor.T.__get__, A), c(torch.linalg.norm, A)),  # type: ignore[attr-defined]
    *(c(Tensor.data.__set__, A, B), c(Tensor.add_, ROWS, A), c(Tensor.add_, S(1, 3), A), c(torch.mul, 2.0, A)),  # type: ignore[attr-defined]
    # Tensors that do not lie sample beside sample.
    *(c(torch.add, A, ROWS), c(torch.add, A, other=ROWS), c(torch.add, V, S(8, 8)), c(torch.add, P(8, 8), V)),
    *(c(torch.add, A, P(1, 3)), c(torch.max, A, ROWS), c(torch.where, S(8, 1) > 0.5, A, B)),
    # Losses that are not those of samples.
    *(c(F.mse_loss, A, B), c(F.mse_loss, A, B, reduction="sum"), c(F.mse_loss, A, ROWS, reduction="none")),
    # Along the samples, or along all dimensions.
    *(c(torch.sum, A), c(torch.sum, A, 0), c(torch.sum, A, -2), c(torch.sum, V, 0), c(torch.sum, Q, [0, 1])),
    *(c(torch.sum, Q, (1, -3)), c(torch.sum, A, []), c(torch.max, A), c(torch.max, A, 0), c(torch.std, A, True)),
    *(c(Tensor.flip, Q, 1, 0), c(torch.flip, Q, [0]), c(torch.chunk, A, 1), c(torch.split, A, 1), c(F.glu, A, 0)),
    # With places that are not a sample's own.
    *(c(torch.gather, A, 1, S(8, 2, of=3)), c(torch.gather, ROWS, 1, PLACES), c(torch.scatter, A, 1, PLACES, ROWS)),
    *(c(torch.take_along_dim, A, S(8, 2, of=3), 1), c(torch.gather, A, 1, P(4, 2, of=3))),
    # Shapes that move samples.
    *(c(torch.transpose, Q, 0, 1), c(torch.transpose, Q, 1, 0), c(torch.transpose, Q, -3, 1)),
    c(torch.transpose, Q, dim0=1, dim1=0),
    *(c(Tensor.permute, Q, 1, 0, 2), c(torch.permute, Q, (1, 0, 2)), c(torch.permute, Q, dims=(1, 0, 2))),
    *(c(torch.permute, Q, ()), c(torch.transpose, ROWS, 0, 1)),
    *(
        c(Tensor.repeat, A, 2, 1),
        c(Tensor.repeat, A, (2, 1)),
        c(Tensor.repeat, A, 1, 1, 2),
        c(Tensor.repeat, A, 2, 1, 1),
    ),
    *(c(Tensor.repeat, A, repeats=(1, 1)), c(Tensor.view, ROWS, 24)),
    *(c(F.pad, A, (0, 0, 1, 1)), c(F.pad, A), c(F.pad, ROWS, (1, 1))),
    # Joined along the samples, or with something that is not a sample's.
    *(c(torch.cat, [A, B]), c(torch.cat, [A, B], 0), c(torch.cat, [A, B], -2), c(torch.cat, [A, ROWS], 1)),
    *(c(torch.cat, A, 1), c(torch.cat, [], 1), c(torch.cat, [A, B], "columns"), c(torch.cat, [A, Q], 1)),
    *(c(torch.stack, [A, B]), c(torch.stack, [A, B], -3), c(torch.cat, tensors=[A, B])),
    # Products over samples, and of what is not a sample's.
    *(c(torch.matmul, V, S(8, 5)), c(torch.matmul, P(8, 8), P(8, 8)), c(torch.matmul, A, P(3, 8))),
    *(c(torch.matmul, Q, S(8, 3, 5)), c(torch.matmul, S(8, 5, 4), Q), c(torch.matmul, S(5, 8), A)),
    *(c(torch.matmul, Q, P(1, 3, 4)), c(torch.matmul, HEADS, P(8, 3, 4)), c(torch.matmul, S(8, 2, 5, 4), Q)),
    *(c(torch.matmul, A, other=S(3, 5)), c(torch.matmul, A, S(2, 1, 3, 5))),
    *(c(F.scaled_dot_product_attention, A, A, A), c(F.scaled_dot_product_attention, HEADS, HEADS, value=HEADS)),
    *(c(F.scaled_dot_product_attention, *[HEADS] * 3, *mask) for mask in ([S(8, 1, 4, 4)], [None, S(8, 1, 4, 4)])),
    c(F.scaled_dot_product_attention, *[HEADS] * 3, attn_mask=S(8, 1, 4, 4)),
    c(F.scaled_dot_product_attention, S(8, 2, 4, 3), HEADS, HEADS),
    c(F.scaled_dot_product_attention, HEADS, P(1, 2, 4, 3), P(1, 2, 4, 3)),
    c(F.scaled_dot_product_attention, HEADS, Q, Q),
    # Places among the samples.
    *(c(Tensor.__getitem__, A, places) for places in (0, slice(1, None), (0, 0), None, (None, ALL), (), COLUMNS)),
    *(c(Tensor.__getitem__, A, places) for places in ((ALL, COLUMNS), (ALL, [0, 1]), (..., COLUMNS))),
    *(c(Tensor.__getitem__, Q, (..., 0, 0, 0)), c(Tensor.__getitem__, V, (..., 0))),
    *(c(Tensor.__getitem__, TABLE, places) for places in (CLASSES > 1, A, (CLASSES,), [CLASSES], S(2, of=3))),
    *(
        c(torch.index_select, A, 0, COLUMNS),
        c(torch.index_select, A, -2, COLUMNS),
        c(torch.index_select, A, 1, CLASSES),
    ),
    *(c(torch.index_select, TABLE, 1, CLASSES), c(torch.index_select, S(), 0, CLASSES)),
    c(torch.index_select, A, "columns", COLUMNS),
    *(c(Tensor.__setitem__, A, places, 1.0) for places in (0, slice(1, None), COLUMNS)),
    *(c(Tensor.__setitem__, A, (ALL, 0), value) for value in (S(8), "a", None)),
    *(c(Tensor.__setitem__, ROWS, ALL, A), c(Tensor.__setitem__, A, ALL, P(3))),
    # Layers whose parameters are a sample's own, or over the samples.
    *(c(F.linear, A, P(8, 3)), c(F.linear, A, P(8, 3), S(8)), c(F.linear, A, S(8, 3), bias=P(8)), c(F.linear, ROWS, A)),
    *(
        c(F.layer_norm, A, (8, 3)),
        c(F.layer_norm, A),
        c(F.layer_norm, A, (3,), P(3)),
        c(F.layer_norm, A, (3,), P(3), ROW),
    ),
    *(c(F.layer_norm, A, (3,), bias=P(3)), c(F.layer_norm, ROWS, (3,), A)),
    *(c(F.cross_entropy, A, CLASSES), c(F.cross_entropy, A, CLASSES, reduction="mean")),
    *(c(F.cross_entropy, A, target=CLASSES, reduction="none"), c(F.cross_entropy, A, S(8, of=3), reduction="none")),
    *(c(F.cross_entropy, A, CLASSES, P(3), reduction="none"), c(F.cross_entropy, V, CLASSES, reduction="none")),
    *(c(F.cross_entropy, A, CLASSES, weight=P(3), reduction="none"), c(F.cross_entropy, A, "a", reduction="none")),
    *(
        c(F.one_hot, CLASSES),
        c(F.one_hot, CLASSES, -1),
        c(F.one_hot, CLASSES, 0),
        c(F.one_hot, CLASSES, num_classes=-1),
    ),
    *(c(F.embedding, PLACES, TABLE, None, 1.0), c(F.embedding, PLACES, TABLE, max_norm=1.0)),
    *(c(F.embedding, PLACES, P(8, 3)), c(F.embedding, PLACES, weight=TABLE)),
]


def name_of(call: Call) -> str:
    return call.func.__name__


def alone(value: Any, k: int) -> Any:
    """Arguments as micro-batch k has them alone."""
    if isinstance(value, Tensor):
        return (value.chunk(G)[k] if has_part(value) else value).clone()
    return mapped(value, lambda v: alone(v, k))


@pytest.mark.parametrize("call", TOGETHER, ids=name_of)
def test_calls_that_may_be_made_once_for_all_micro_batches(call: Call) -> None:
    """What comes out and what is changed has the values of the calls for one micro-batch at a time."""
    assert is_independent(*call, has_part)
    args, kwargs = mapped((call.args, call.kwargs), lambda v: mapped(v, lambda t: t))
    whole = [t.clone() if isinstance(t, Tensor) else t for t in args]
    expected = [list(tensors_of(call.func(*whole, **kwargs)))]
    found = []
    for k in range(G):
        own = alone(args, k)
        found.append(list(tensors_of(call.func(*own, **alone(kwargs, k)))))
        if args and has_part(args[0]):
            found[-1].append(own[0])
    if args and has_part(args[0]):
        expected[0].append(whole[0])
    for tensor, parts in zip(expected[0], zip(*found)):
        torch.testing.assert_close(torch.cat(parts), tensor)


@pytest.mark.parametrize("call", APART, ids=name_of)
def test_calls_that_are_made_for_one_micro_batch_at_a_time(call: Call) -> None:
    assert not is_independent(*call, has_part)


@pytest.mark.parametrize("call", LAYERS, ids=name_of)
def test_a_layer_of_one_sample_takes_the_samples_for_something_else(call: Call) -> None:
    """Without a dimension of samples, the first one is that of the features."""
    x = call.args[0].select(1, 0)
    x._parted = True
    assert not is_independent(call.func, (x, *call.args[1:]), call.kwargs, has_part)


# In a run


class Own(Task):
    """A task whose forward is given; `weight` is the model's (8, 8) weight."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return self._forward(model(batch["x"]), model.weight)


@in_a_run
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


@in_a_run
def test_a_parameter_with_a_hook_has_no_packs() -> None:
    model = nn.Linear(8, 8)
    model.weight.register_hook(lambda g: None if g is None else g.clamp(-0.1, 0.1))
    step, batches = made(model, floats(8), 4)
    for batch in batches.starting_at(0):
        step(batch)
    assert step.own_block.packs is not None
    assert (
        all("has a hook" in refusal for refusal in step.own_block.packs.refusals().values())
        and step.own_block.packs.refusals()
    )


class Grows(Own):
    """Its values are small in the first steps, those of trials."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Any) -> Tensor:
        return self._forward(model(batch["x"]) * (1e4 if progress.step > 2 else 1.0), model.weight) * 1e-4


@in_a_run
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


@in_a_run
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


@in_a_run
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


@in_a_run
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
