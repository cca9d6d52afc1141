"""What cannot be taken apart is computed one micro-batch at a time, and packs.refusals() says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.packed import floats, trained

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one", "early_packs")


class Reads(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x[:2].tolist() else x


class Chooses(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[x[:, 0] > -9].sum() + torch.zeros(len(x), 1)


class DrawsUnseen(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.gumbel_softmax(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Reads, "depends on values"),
        (Chooses, "depends on values"),
        (DrawsUnseen, "random numbers"),
    ],
)
def test_what_cannot_be_taken_apart_is_computed_one_by_one(kind: type[nn.Module], words: str) -> None:
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


@pytest.mark.parametrize("kind", [lambda: DropsTurned(3, 3), AttentionDrops])
def test_dropout_draws_in_the_order_of_a_micro_batchs_memory(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), floats(9)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {}
