"""The audit finds a wrong summand, which the guard cannot see: every rank applies the same sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import USER_TASKS, small_config, train
from trainer.errors import RanksDifferError
from trainer.ranks.workers import run_ranks

WRONG = f"{USER_TASKS}/inexact_tasks.py"


@pytest.mark.parametrize("world_size", [2, 5])
def test_a_rank_that_computes_wrongly_is_named(tmp_path: Path, world_size: int) -> None:
    """In its eighth step, one bit is wrong in the gradients of rank 1; nothing is saved after that."""
    config = small_config(
        tmp_path / "run", task=f"{WRONG}:FlipsAGradient", audit_every_steps=2, checkpoint={"every_steps": 1, "keep": 9}
    )
    with pytest.raises(RanksDifferError) as found:
        run_ranks(train, world_size, config)
    message = str(found.value)
    assert "The audit of step 8 found two results for micro-batch" in message
    assert "rank 1 on" in message
    assert "first in the gradient of inner.weight" in message
    assert "Step 8 was not applied. The audit of step 6 passed: do not trust checkpoints of later steps." in message
    saved = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert 6 <= max(int(name.removeprefix("step-")) for name in saved) <= 7  # the writing of the last is not waited for


@pytest.mark.parametrize("world_size", [1, 2])
def test_state_that_begins_to_count_later_is_found(tmp_path: Path, world_size: int) -> None:
    """The rehearsal sees nothing of it, and the run says bitwise until the audit."""
    config = small_config(tmp_path / "run", task=f"{WRONG}:AnnealsLate", audit_every_steps=1)
    with pytest.raises(RanksDifferError, match=r"(?s)The audit of step \d+ found two results.*first in loss.*progress"):
        run_ranks(train, world_size, config)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}])
def test_an_audit_changes_nothing(tmp_path: Path, world_size: int, changes: dict[str, Any]) -> None:
    """BatchNorm, dropout, augmentation, a tail with fewer micro-batches: audited in every step or never."""
    runs = [
        run_ranks(train, world_size, small_config(tmp_path / str(every), audit_every_steps=every, **changes))[0]
        for every in (1, 0)
    ]
    assert runs[0]["trace"] == runs[1]["trace"]
    assert runs[0]["exactness"] == runs[1]["exactness"] == "bitwise"


def test_a_tail_with_fewer_micro_batches_than_ranks_is_audited(tmp_path: Path) -> None:
    """500 = 4 x 124 + 4: the fifth step has one micro-batch for three ranks."""
    config = small_config(tmp_path / "run", train_batch_size=124, audit_every_steps=1, epochs=1)
    assert run_ranks(train, 3, config)[0]["steps"] == 5
