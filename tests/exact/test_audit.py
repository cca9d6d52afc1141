"""How often is audited, what is chosen, and that every bit counts."""

from __future__ import annotations

import pytest
import torch

from trainer.exact.audit import LARGEST_SHARE, Audit, interval
from trainer.exact.hashes import hash64
from trainer.exact.plan import rank_block
from trainer.ranks.place import Ranks


@pytest.mark.parametrize(
    ("micro_batches", "world_size", "steps"),
    [(32, 1, 50), (32, 8, 50), (32, 9, 100), (32, 16, 100), (32, 32, 200), (13, 3, 50), (1, 1, 200)],
)
def test_the_default_goes_with_the_guard_as_far_as_that_is_cheap(
    micro_batches: int, world_size: int, steps: int
) -> None:
    assert interval(None, 50, micro_batches, world_size) == steps
    assert 1 / (micro_batches // world_size * steps) <= LARGEST_SHARE + 1e-12


def test_what_is_asked_for_is_done() -> None:
    assert interval(7, 50, 32, 32) == 7
    assert interval(0, 50, 32, 1) == 0
    assert interval(None, 0, 32, 1) == 0, "who has no guard wants no audit"


def audits(world_size: int, alike: bool = True) -> list[Audit]:
    return [
        Audit(Ranks(r, world_size), ["host"] * world_size, ["w"], every_steps=5, total_steps=23, seed=0, alike=alike)
        for r in range(world_size)
    ]


def test_the_last_step_is_audited_too() -> None:
    (audit,) = audits(1)
    assert [step + 1 for step in range(23) if audit.due(step)] == [5, 10, 15, 20, 23]


@pytest.mark.parametrize(("world_size", "leaves"), [(1, 7), (2, 13), (3, 13), (4, 3), (5, 5)])
@pytest.mark.parametrize("alike", [True, False])
def test_every_rank_is_audited_by_another_one(world_size: int, leaves: int, alike: bool) -> None:
    """Also in a step with fewer micro-batches than ranks; each position of a block has its turn."""
    together = audits(world_size, alike)
    chosen: set[int] = set()
    for step in range(300):
        for audit in together:
            audit.choose(step, leaves)
        own = [audit.own for audit in together]
        for rank, j in enumerate(own):
            block = rank_block(leaves, world_size, rank)
            assert (j is None) == (len(block) == 0)
            assert j is None or j in block
        assert sorted(map(str, own)) == sorted(str(audit.other) for audit in together)
        if world_size > 1 and alike:
            assert all(audit.own != audit.other or audit.own is None for audit in together)
        else:
            assert own == [audit.other for audit in together]
        chosen.update(j for j in own if j is not None)
    assert chosen == set(range(leaves))


def test_every_bit_counts() -> None:
    """One flipped bit anywhere changes the hash, every time: 4,000 tries."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(2000, generator=generator)
    before = int(hash64([gradient]))
    for _ in range(4000):
        place, bit = (int(torch.randint(high, (), generator=generator)) for high in (2000, 32))
        words = gradient.view(torch.int32)
        words[place] ^= (1 << bit) if bit < 31 else -(1 << 31)
        assert int(hash64([gradient])) != before
        words[place] ^= (1 << bit) if bit < 31 else -(1 << 31)
    assert int(hash64([gradient])) == before
