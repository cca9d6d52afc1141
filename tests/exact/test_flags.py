"""The flags of the ranks: when they are read."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.flags import Flags


def test_flags_of_a_gpu_are_read_two_steps_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """When their copy has long arrived; it is waited for nevertheless."""
    happened: list[str] = []

    class Event:
        def record(self) -> None:
            happened.append("recorded")

        def synchronize(self) -> None:
            happened.append("waited")

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda shape, pin_memory: empty(shape))
    flags = Flags(torch.device("cuda"))
    raised = [torch.tensor([0.0, 1.0, 0.0]), torch.zeros(3)]
    asked = [1, 0, 1, 1, 1, 1]  # the second step's flag is raised
    assert [flags.read(raised[i]) for i in asked] == [False, False, False, True, False, False]
    assert happened == ["recorded"] * 3 + ["waited", "recorded"] * 3 + ["waited"]


def test_flags_of_the_cpu_are_read_at_once() -> None:
    flags = Flags(torch.device("cpu"))
    assert [flags.read(torch.tensor(row)) for row in ([0.0, 0.0], [0.0, 1.0], [0.0, 0.0])] == [False, True, False]
