"""Functions that draw random numbers or that the host reads: each micro-batch has what it has alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.one_pack import one_by_one, pack_of
from tests.exact.packs.packed import floats, trained
from trainer.exact.packs.functions import FUNCTIONS
from trainer.exact.packs.pack import Pack
from trainer.exact.packs.values import same_bits
from trainer.exact.packs.verdicts import RefusedError

pytestmark = pytest.mark.usefixtures("one_thread")
in_a_run = pytest.mark.usefixtures("group_of_one", "early_packs")

# The parts of micro-batches are no multiples of 64 bytes, so that they are copied, and some are turned in memory.
X = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(3))
TURNED = X.transpose(0, 1).contiguous().transpose(0, 1)
FRAMES = torch.randn(8, 4, 3, 3, 2, generator=torch.Generator().manual_seed(4))


def called(pack: Pack, func: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function gives in a pack; NotImplemented if it needs nothing special."""
    return FUNCTIONS[func](pack, func, args, kwargs)


class Noted:
    """Notes which of a pack's ways to draw are taken."""

    def __init__(self, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        for name in ("apart", "drawn", "generator"):
            monkeypatch.setattr(pack, name, self._noting(name, getattr(pack, name)))

    def _noting(self, name: str, way: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            self.names.add(name)
            return way(*args, **kwargs)

        return noting


class OnAGPU(Tensor):
    """Says that it lies on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    device = property(lambda self: torch.device("cuda"))  # type: ignore[assignment]


# Dropout


@pytest.mark.parametrize("func", [F.dropout, torch.dropout])
@pytest.mark.parametrize(
    ("x", "p", "way"),
    [
        (X, 0.3, "generator"),
        (X.bfloat16(), 0.3, "generator"),
        (X.double(), 0.5, "generator"),
        (X, 1.0, "apart"),
        (TURNED, 0.3, "apart"),
        (X.as_subclass(OnAGPU), 0.3, "drawn"),
        (X.bfloat16().as_subclass(OnAGPU), 0.3, "apart"),
        (TURNED.as_subclass(OnAGPU), 0.3, "apart"),
    ],
    ids=["float32", "bfloat16", "float64", "all", "turned", "GPU", "GPU, bfloat16", "GPU, turned"],
)
def test_dropout_drops_what_each_micro_batch_drops_alone(
    func: Any, x: Tensor, p: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the draws are made one by one where the rest is known to have the same bits."""
    pack = pack_of(x)
    noted = Noted(pack, monkeypatch)
    found = called(pack, func, x, p, True)
    plain = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.as_subclass(Tensor))
    assert same_bits(found.as_subclass(Tensor), one_by_one(lambda x: func(x, p, True), plain))
    assert noted.names == {way}


def test_dropout_has_the_defaults_of_torch() -> None:
    assert same_bits(called(pack_of(X), F.dropout, X), one_by_one(F.dropout, X))


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (F.dropout, (0.5, False), {}),
        (F.dropout, (), {"training": False}),
        (F.dropout, (0.0,), {}),
        (F.dropout, (1.0, False), {}),
        (F.dropout1d, (0.5, False), {}),
        (F.dropout2d, (), {"p": 0.5, "training": False}),
        (F.alpha_dropout, (), {}),
        (F.alpha_dropout, (0.5,), {}),
        (F.feature_alpha_dropout, (0.5, False), {}),
    ],
)
def test_dropout_that_drops_nothing_needs_nothing_special(func: Any, args: Any, kwargs: Any) -> None:
    assert called(pack_of(X), func, X, *args, **kwargs) is NotImplemented


@pytest.mark.parametrize(
    ("func", "x", "args", "kwargs"),
    [
        (F.dropout1d, X, (), {}),
        (F.dropout1d, X, (0.3,), {}),
        (F.dropout2d, FRAMES[..., 0], (0.3, True), {}),
        (F.dropout3d, FRAMES, (), {"p": 0.3, "training": True}),
        (F.alpha_dropout, X, (0.3, True), {}),
        (F.feature_alpha_dropout, X, (0.3,), {"training": True}),
    ],
)
def test_other_dropouts_drop_what_each_micro_batch_drops_alone(func: Any, x: Tensor, args: Any, kwargs: Any) -> None:
    found = called(pack_of(x), func, x, *args, **kwargs)
    assert same_bits(found, one_by_one(lambda x: func(x, *args, **kwargs), x))


@pytest.mark.parametrize("func", [F.dropout, torch.dropout, F.dropout1d, F.alpha_dropout])
def test_dropout_of_what_all_micro_batches_share_is_refused(func: Any) -> None:
    with pytest.raises(RefusedError, match=f"{func.__name__} gets a tensor that is the same for all micro-batches"):
        called(pack_of(X), func, torch.ones(3, 5), 0.5, True)


Q = torch.randn(8, 2, 3, 4, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("args", "kwargs", "draws"),
    [
        ((), {}, False),
        ((None,), {}, False),
        ((None, 0.0), {}, False),
        ((None, 0.0, False), {}, False),
        ((), {"dropout_p": 0.0}, False),
        ((None, 0.4), {}, True),
        ((None, 0.4, True), {}, True),
        ((), {"dropout_p": 0.4}, True),
        ((None, 1.0), {}, True),
    ],
)
def test_attention_is_special_where_it_drops(args: Any, kwargs: Any, draws: bool) -> None:
    attention = F.scaled_dot_product_attention
    found = called(pack_of(Q), attention, Q, Q, Q, *args, **kwargs)
    if draws:
        assert same_bits(found, one_by_one(lambda q: attention(q, q, q, *args, **kwargs), Q))
    else:
        assert found is NotImplemented


# Other random numbers


@pytest.mark.parametrize(
    ("func", "x", "args", "kwargs"),
    [
        (torch.rand_like, X, (), {}),
        (torch.randn_like, X, (), {"dtype": torch.float64}),
        (torch.randint_like, X, (3, 9), {}),
        (torch.bernoulli, X.sigmoid(), (), {}),
        (Tensor.bernoulli, X.sigmoid(), (), {}),
        (torch.normal, X, (2.0,), {}),
        (torch.poisson, X.exp(), (), {}),
        (torch.multinomial, X[:, 0].exp(), (2,), {}),
        (Tensor.multinomial, X[:, 0].exp(), (9,), {"replacement": True}),
    ],
)
def test_numbers_are_drawn_for_each_micro_batch(func: Any, x: Tensor, args: Any, kwargs: Any) -> None:
    found = called(pack_of(x), func, x, *args, **kwargs)
    assert same_bits(found, one_by_one(lambda x: func(x, *args, **kwargs), x))


@pytest.mark.parametrize("func", [torch.bernoulli, torch.multinomial])
def test_numbers_from_a_generator_of_its_own_are_refused(func: Any) -> None:
    with pytest.raises(RefusedError, match=f"{func.__name__} with a generator of its own"):
        called(pack_of(X[:, 0]), func, X[:, 0].exp(), generator=torch.Generator())


@pytest.mark.parametrize("features", [3, 16])
@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (Tensor.bernoulli_, (0.3,), {}),
        (Tensor.uniform_, (-2.0, 3.0), {}),
        (Tensor.uniform_, (), {"to": 3.0}),
        (Tensor.normal_, (1.0,), {"std": 2.0}),
        (Tensor.exponential_, (0.5,), {}),
        (Tensor.random_, (2, 900), {}),
        (Tensor.log_normal_, (), {}),
    ],
)
def test_a_tensor_is_filled_with_the_numbers_of_each_micro_batch(
    func: Any, args: Any, kwargs: Any, features: int
) -> None:
    x = torch.zeros(8, features)
    found = called(pack_of(x), func, x, *args, **kwargs)
    assert found is x
    assert same_bits(x, one_by_one(lambda x: func(x, *args, **kwargs), torch.zeros(8, features)))


def test_a_tensor_is_filled_with_numbers_that_follow_from_a_tensor() -> None:
    x, chances = torch.zeros(8, 15), X.flatten(1).sigmoid()
    called(pack_of(x, chances), Tensor.bernoulli_, x, chances)
    assert same_bits(x, one_by_one(Tensor.bernoulli_, torch.zeros(8, 15), chances))


@pytest.mark.parametrize(
    ("x", "parted", "options"),
    [
        (torch.zeros(8, 3), False, {}),
        (torch.zeros(3, 8).t(), True, {}),
        (torch.zeros(8, 3, requires_grad=True), True, {}),
        (torch.zeros(8, 3), True, {"generator": torch.Generator()}),
    ],
    ids=["the same for all", "turned", "trained", "with a generator"],
)
def test_a_tensor_that_cannot_be_filled_by_micro_batches_is_refused(x: Tensor, parted: bool, options: Any) -> None:
    pack = pack_of(x if parted else X)
    with pytest.raises(RefusedError, match="normal_, whose numbers are not those of a micro-batch"):
        called(pack, Tensor.normal_, x, 0.0, **options)


# What depends on values


@pytest.mark.parametrize(
    ("func", "x", "value"),
    [
        (Tensor.__bool__, torch.ones(2), True),
        (Tensor.item, torch.full((2,), 0.5), 0.5),
        (Tensor.__int__, torch.full((2,), 3), 3),
        (Tensor.__float__, torch.full((2,), 3), 3.0),
        (Tensor.__index__, torch.full((2,), 3), 3),
        (Tensor.tolist, torch.ones(4, 1), [[1.0], [1.0]]),
    ],
)
def test_the_host_reads_what_is_the_same_for_all_micro_batches(func: Any, x: Tensor, value: Any) -> None:
    found = called(pack_of(x), func, x)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("func", [Tensor.__bool__, Tensor.item, Tensor.tolist, Tensor.numpy])
def test_the_host_cannot_read_what_differs(func: Any) -> None:
    x = torch.tensor([0.0, 1.0])
    with pytest.raises(RefusedError, match="what is done next depends on values"):
        called(pack_of(x), func, x)


MASK = X[:, 0] > 0


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (torch.where, (MASK,), {}),
        (torch.where, (), {"condition": MASK}),
        (torch.nonzero, (MASK,), {}),
        (Tensor.nonzero, (MASK,), {"as_tuple": True}),
        (torch.masked_select, (X[:, 0], MASK), {}),
        (torch.unique, (MASK,), {}),
        (torch.bincount, (MASK[:, 0].long(),), {}),
    ],
)
def test_what_has_a_shape_by_its_values_is_refused(func: Any, args: Any, kwargs: Any) -> None:
    with pytest.raises(RefusedError, match=f"{func.__name__}: the shape of what it returns depends on values"):
        called(pack_of(MASK), func, *args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((MASK, X[:, 0], 0.0), {}), ((MASK,), {"input": X[:, 0], "other": 0.0}), ((MASK, X[:, 0]), {})],
    ids=["choose", "by name", "one is missing, which torch says itself"],
)
def test_where_with_values_to_choose_from_needs_nothing_special(args: Any, kwargs: Any) -> None:
    assert called(pack_of(MASK), torch.where, *args, **kwargs) is NotImplemented


@pytest.mark.parametrize(
    ("index", "refused"),
    [
        (MASK, True),
        (MASK.to(torch.uint8), True),
        ((slice(None), MASK), True),
        ((MASK, 0), True),
        (MASK.long(), False),
        ((slice(None), torch.tensor([True, False, True])), False),
        ((slice(None), 0), False),
        (slice(1, None), False),
        (0, False),
    ],
    ids=["booleans", "bytes", "the second", "the first", "numbers", "the same for all", "a place", "a slice", "a row"],
)
def test_booleans_of_samples_are_no_index(index: Any, refused: bool) -> None:
    places = [p for p in (index if isinstance(index, tuple) else (index,)) if isinstance(p, Tensor) and len(p) == 8]
    pack = pack_of(X, *places)
    if not refused:
        assert called(pack, Tensor.__getitem__, X, index) is NotImplemented
        return
    with pytest.raises(RefusedError, match="an index of booleans: the shape of what it gives depends on values"):
        called(pack, Tensor.__getitem__, X, index)


# In a run


class Reads(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x[:2].tolist() else x


class Chooses(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[x[:, 0] > -9].sum() + torch.zeros(len(x), 1)


class DrawsUnseen(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.gumbel_softmax(x))


@in_a_run
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Reads, "depends on values"),
        (Chooses, "depends on values"),
        (DrawsUnseen, "random numbers"),
    ],
)
def test_what_cannot_be_taken_apart_is_computed_one_by_one(kind: type[nn.Module], words: str) -> None:
    """packs.refusals() says why."""
    torch.manual_seed(0)
    model, x = kind(3, 1), floats(3)  # type: ignore[call-arg]
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None
    assert words in packs.refusals()[4]


class LooksAtAll(nn.Linear):
    """As transformers do: a mask without a gap is left out."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if bool((x[:, 0] > -1).all()) else y * 0.5


@in_a_run
def test_a_value_that_the_host_reads_decides_for_each_pack() -> None:
    torch.manual_seed(0)
    model, x = LooksAtAll(3, 1), floats(3)
    found, _packs = trained(model, x, 2)
    assert found == trained(model, x, 0)[0]


class DropsTurned(nn.Linear):
    """Dropout of a tensor that does not lie in memory sample after sample, as a transformer's layer does it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.reshape(-1, 3, 3)).transpose(0, 1).contiguous().transpose(0, 1)
        return F.dropout(y, 0.5).flatten(1)


class AttentionDrops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(3, 1, 8, 0.4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 3, 3)).flatten(1)


@in_a_run
@pytest.mark.parametrize("kind", [lambda: DropsTurned(3, 3), AttentionDrops])
def test_dropout_draws_in_the_order_of_a_micro_batchs_memory(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), floats(9)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
