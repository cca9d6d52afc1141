"""How packs are chosen, tried and given up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.exact.packs.packed import dense, floats, trained
from trainer.exact.packs.packs import Packs

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one", "early_packs")


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
