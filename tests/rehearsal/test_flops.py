"""The operations of a step: counted once, with the numbers that one finds by hand, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rehearsal.staged import SAMPLES, Task, m, net, staged
from trainer.exact.checks.hashes import state_sha256
from trainer.rehearsal.flops import ModelFlops, count
from trainer.rehearsal.stage import generators_kept

pytestmark = pytest.mark.usefixtures("one_thread")

# The first layer needs no gradient of its input: two products of matrices; the others have three.
OF_A_SAMPLE = 2 * (2 * 5 * 4) + 3 * (2 * 4 * 1)


def test_a_count_by_hand() -> None:
    stage = staged()
    found = count(stage)
    assert found == ModelFlops(OF_A_SAMPLE)
    batch = stage.subject.batches.at(0)
    assert found.of(batch) == OF_A_SAMPLE * len(batch.indices)
    assert found.of(stage.subject.batches.at(2)) == OF_A_SAMPLE * 6, "an epoch's last step is smaller"


def test_frozen_layers_count_less() -> None:
    model = net()
    model[0].requires_grad_(False)
    assert count(staged(model=model)) == ModelFlops((2 * 5 * 4) + 3 * (2 * 4 * 1))


def test_a_count_leaves_nothing_behind() -> None:
    """BatchNorm's buffers, gradients, generators and the task's own values, as they are restored in a rehearsal."""

    class Counts(Task):
        calls = 0

        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
            self.calls += 1
            return super().forward(model, batch) + 0.0 * torch.rand(())

    task = Counts()
    stage = staged(task)

    def state() -> tuple[str, list[int], int]:
        return state_sha256(stage.engine.state()), torch.get_rng_state().tolist(), task.calls

    before = state()
    with generators_kept(stage.subject.device):
        assert isinstance(count(stage), ModelFlops)
        assert task.calls == 1
        assert stage.put_back() == {}
    assert state() == before
    assert not any(parameter.grad.any() for parameter in stage.engine.parameters if parameter.grad is not None)


class Attends(Task):
    """Attention over samples of different lengths, which are padded to 5 positions."""

    def augment(self, batch: dict[str, Tensor], random: Any) -> dict[str, Tensor]:
        return batch

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Any:
        x = model(batch["x"][:, :, None])[:, None]
        return F.scaled_dot_product_attention(x, x, x).sum((1, 3))


def test_texts_cost_by_their_lengths() -> None:
    """Linear layers by the position, attention by pairs of them; the products of attention are counted, too."""
    lengths = torch.arange(SAMPLES) % 4 + 2
    stage = staged(Attends(), nn.Linear(1, 3), lengths=lengths, padded=("x",))
    found = count(stage)
    assert isinstance(found, ModelFlops)
    assert found.linear == pytest.approx(2 * (2 * 1 * 3))
    # Two products forward, and five backward, as the scores are computed again.
    assert found.quadratic == pytest.approx(7 * 2 * 3)
    batch = stage.subject.batches.at(1)
    assert batch.longest is not None
    by_hand = sum(m * (12 * length + 42 * length**2) for length in batch.longest)
    assert found.of(batch) == pytest.approx(by_hand)


def test_what_cannot_be_counted_is_said() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x[:, None])[0][:, 0]

    assert count(staged(model=Recurrent())) == "torch has no formula for aten.mkldnn_rnn_layer"

    class Fails(Task):
        def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Any:
            raise NotImplementedError("not under a mode\nreally")

    stage = staged(Fails())
    assert count(stage) == "NotImplementedError: not under a mode"
    assert stage.put_back() == {}

    stage = staged()
    stage.exact = False
    assert count(stage) == "with ZeRO, no rank has whole gradients"
