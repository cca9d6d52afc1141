"""Another thread that draws from torch's generators is noticed."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import RanksDifferError
from trainer.exact.checks.foreign_draws import ForeignDraws

CPU = torch.device("cpu")


class Gpu:
    """A GPU's generator, seeded with 5. Each draw moves its offset."""

    offset = 0

    def initial_seed(self) -> int:
        return 5

    def get_offset(self) -> int:
        return self.offset


def after_a_micro_batch(draws: bool) -> ForeignDraws:
    foreign = ForeignDraws(CPU)
    torch.manual_seed(5)
    if draws:
        torch.rand(3)
    foreign.after_one(5)
    foreign.begin()
    return foreign


def test_draws_between_micro_batches_and_the_end_of_a_step_are_an_error() -> None:
    foreign = after_a_micro_batch(draws=True)
    foreign.end(3)
    torch.rand(1)  # as a callback may: between steps
    foreign.begin()
    foreign.end(4)
    foreign.begin()
    torch.rand(1)
    with pytest.raises(RanksDifferError, match=r"Another thread of this process draws .* in step 6 for example"):
        foreign.end(5)


def test_a_task_that_draws_nothing_is_left_alone() -> None:
    foreign = after_a_micro_batch(draws=False)
    torch.rand(1)
    foreign.end(3)


def test_draws_on_a_gpu_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "default_generators", (gpu,))
    foreign = ForeignDraws(torch.device("cuda", 0))
    torch.manual_seed(5)
    gpu.offset = 4
    foreign.after_one(5)
    foreign.begin()
    foreign.end(0)
    foreign.begin()
    gpu.offset = 8
    with pytest.raises(RanksDifferError):
        foreign.end(1)


def test_a_task_that_draws_nothing_on_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "default_generators", (gpu,))
    foreign = ForeignDraws(torch.device("cuda", 0))
    torch.manual_seed(5)
    foreign.after_one(5)
    foreign.begin()
    gpu.offset = 4
    foreign.end(0)
