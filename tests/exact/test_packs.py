"""Packs: several micro-batches in one forward, with the bits of one at a time; what is taken apart; what refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.test_step import CPU, PlainSGD
from trainer.exact import packs as module
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.micro_batches import GlobalBatches, MicroBatches
from trainer.exact.packs import Packs
from trainer.exact.splits import Split
from trainer.exact.step import ExactStep
from trainer.ranks.place import Ranks

B, m, SAMPLES, STEPS = 32, 4, 72, 5  # 8 micro-batches a step, and a last step of 8 samples in 2

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one; packs are used from the second step on."""
    monkeypatch.setattr(module, "TRIALS", 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


class Task:
    """Regression on whatever the model returns."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return F.mse_loss(outputs.flatten(1).sum(1), batch["y"], reduction="sum"), len(outputs)


def made(model: nn.Module, x: Tensor, size: int | None, task: Any = None, **options: Any) -> tuple[ExactStep, Any]:
    """A step with packs of at most `size` micro-batches (0: none), and the batches."""
    y = torch.randn(SAMPLES, generator=torch.Generator().manual_seed(1))
    split, sizes = Split({"x": x, "y": y}), {"global_batch_size": B, "micro_batch_size": m}
    batches = GlobalBatches(split, CPU, seed=0, drop_last=False, total_steps=STEPS, **sizes)
    optimizer, statistics = PlainSGD(model, 0.01), RunningStatistics(model)
    optimizer.parameters = [p for p in optimizer.parameters if p.requires_grad]
    micro_batches = MicroBatches(task or Task(), model, split, device=CPU, seed=0, micro_batch_size=m, **options)
    leaves = batches.micro_batch_counts()
    step = ExactStep(
        optimizer, micro_batches, statistics, ranks=Ranks(), leaves=leaves, device=CPU, measures_norms=True
    )
    if size != 0:
        step.packs = Packs(micro_batches, optimizer.parameters, model, statistics, CPU, size)
    return step, batches


def trained(model: nn.Module, x: Tensor, size: int | None, **options: Any) -> tuple[list[Any], Packs | None]:
    """Everything that a short run finds, and its packs."""
    model = copy.deepcopy(model)
    step, batches = made(model, x, size, **options)
    found: list[Any] = []
    for batch in batches.starting_at(0):
        result = step(batch)
        found += [result.losses.tolist(), float(result.norm), result.norms.tolist()]
        found += [view.tolist() for view in step.gradient_views]
    return found + [tensor.tolist() for tensor in model.state_dict().values()], step.packs


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


def dense() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 1))
    model[2].weight.requires_grad_(False)
    return nn.Sequential(model, nn.utils.parametrizations.weight_norm(nn.Linear(1, 2)))


def floats(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(2))


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


class Mixes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Reads(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x[0, 0])


class Chooses(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[x[:, 0] > -9].sum() + torch.zeros(len(x), 1)


class DrawsUnseen(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.gumbel_softmax(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Mixes, "in packs of 4"),
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


def test_memory_that_runs_out_makes_packs_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = dense(), floats(3)
    expected, _ = trained(model, x, 0)
    compute, sizes = Packs.compute, []

    def limited(self: Packs, batch: Any, part: range, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(part))
        if len(part) > 2 and batch.step > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(self, batch, part, *arguments, **named)

    monkeypatch.setattr(Packs, "compute", limited)
    found, packs = trained(model, x, 8)
    assert found == expected
    assert packs is not None and packs.summary()["limited_by_memory_to"] == 4
    assert 8 in sizes
