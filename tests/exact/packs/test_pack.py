"""A pack has the bits of its micro-batches computed one by one, in models of many kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.exact.packs.packed import SAMPLES, dense, floats, m, made, trained
from trainer.exact.packs import layer_functions, rules

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one", "early_packs")


class Tokens(nn.Module):
    """Tied embeddings, positions that no sample has a part of, a class token, and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8, padding_idx=0), nn.Embedding(6, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.gain = nn.Parameter(torch.randn(8))
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.words(x) + self.places(torch.arange(6)[None])
        y = torch.cat([self.first.expand(len(x), -1, -1), y], dim=1)
        y = self.dropout(self.norm(y * self.gain))
        q = y.unflatten(-1, (2, 4)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, dropout_p=0.1).transpose(1, 2).flatten(2)
        return F.linear(y.mean(1), self.words.weight)


class Recurrent(nn.Module):
    """A layer that is computed one micro-batch at a time, and one that mixes places."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.memory(x)[0]
        return self.attention(y, y, y)[0]


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(3, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm1d(6), nn.ReLU(inplace=True)),
        *(nn.Dropout1d(0.2), nn.ConvTranspose1d(6, 4, 2, stride=2), nn.GroupNorm(2, 4), nn.SiLU()),
        *(nn.InstanceNorm1d(4, track_running_stats=True), nn.PReLU(), nn.BatchNorm1d(4, affine=False, momentum=None)),
        *(nn.Flatten(), nn.LazyLinear(5), nn.Sigmoid()),
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dense": (dense, lambda: floats(3)),
    "convolutions": (convolutions, lambda: floats(3, 6)),
    "tokens": (Tokens, lambda: torch.randint(0, 20, (SAMPLES, 6), generator=torch.Generator().manual_seed(2))),
    "recurrent": (Recurrent, lambda: floats(5, 3)),
}


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("case", list(CASES))
def test_packs_have_the_bits_of_single_micro_batches(case: str, size: int) -> None:
    torch.manual_seed(0)
    make, data = CASES[case]
    model, x = make(), data()
    with torch.no_grad():
        model(x[:m])  # lazy layers
    expected, _ = trained(model, x, 0)
    found, packs = trained(model, x, size)
    assert found == expected
    assert packs is not None
    assert packs.refusals() == {}, "they were used"


def test_packs_have_the_bits_of_single_micro_batches_in_bfloat16() -> None:
    torch.manual_seed(0)
    model, x = convolutions(), floats(3, 6)
    model(x[:m])
    options = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    found, packs = trained(model, x, 4, **options)
    assert found == trained(model, x, 0, **options)[0]
    assert packs is not None and packs.refusals() == {}


def test_a_frozen_weight_whose_rows_divide_is_no_part_of_a_micro_batch() -> None:
    """In packs of 2, a frozen layer of 8 features looks as if it had 4 rows for each micro-batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    found, packs = trained(model, floats(5), 2, micro_batch_size=2)
    assert found == trained(model, floats(5), 0, micro_batch_size=2)[0]
    assert packs is not None and packs.refusals() == {}


def test_a_batch_norm_whose_gradient_lies_in_memory_in_another_way() -> None:
    """Torch adds such a gradient in another order. The random tasks found it: all places of a channel come in a row."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope, self.norm = nn.PReLU(1), nn.BatchNorm3d(2, affine=False)
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.slope(x)).flatten(2).transpose(1, 2)
            return self.head(y).amax(1)

    torch.manual_seed(0)
    model, x = Turned(), floats(2, 3, 4, 3)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
    assert "batch_norm" in packs.summary()["one_at_a_time"]


class Places(nn.Module):
    """Adds what stands in a table at places that all samples share: some of them twice, one of them for padding."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 2)
        self.table = nn.Embedding(7, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tensor([[4, 1, 0, 4, 6, 1]])
        return self.outer((self.inner(x) + self.table(places).to(x.device)).tanh())


class Calls(TorchDispatchMode):
    """Counts an operation's calls."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == self.name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}])
def test_a_table_that_all_samples_share_has_its_gradients_made_in_one_call(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x = Places(**options), floats(6, 3)
    found, packs = trained(model, x, 8)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
    step, batches = made(model, x, 8)
    for number, batch in enumerate(batches.starting_at(0)):
        with Calls("aten::embedding_dense_backward") as calls:
            step(batch)
        if number == 4:  # a step of 8 micro-batches; trials compute more, for comparison
            assert calls.count == 1


def test_a_table_whose_gradients_are_others_in_one_call_is_passed_on_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a device whose kernel adds in an order that follows the number of indices."""

    def wrong(site: Any, grad: Tensor, *rest: Any) -> Any:
        return rules._embedding_backward(site, grad.roll(1, 0), *rest)

    monkeypatch.setattr(layer_functions, "EMBEDDING", (rules.EMBEDDING[0]._replace(backward=wrong),))
    torch.manual_seed(0)
    model, x = Places(), floats(6, 3)
    found, packs = trained(model, x, 8)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
