"""How often is audited, what is chosen, and that every bit counts."""

from __future__ import annotations

import pytest
import torch

from trainer.errors import RanksDifferError
from trainer.exact.checks import audit as audit_module
from trainer.exact.checks.audit import LARGEST_SHARE, Audit, interval
from trainer.exact.checks.hashes import hash64
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


# Comparing: the ranks of one step, in this process


class Gathered(Exception):
    """A rank has handed over its row."""


Noted = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]


def computed(j: int, **wrong: float) -> Noted:
    """What is noted of micro-batch j: loss, statistics and the gradients of two parameters, one of which is unused."""
    place = float(j)
    return (
        torch.tensor(place + wrong.get("loss", 0.0)),
        torch.tensor([place, 2.0 + wrong.get("statistics", 0.0)]),
        [torch.full((3,), place + wrong.get("gradient", 0.0)), None],
    )


def compared(
    monkeypatch: pytest.MonkeyPatch,
    together: list[Audit],
    step: int,
    leaves: int,
    summed_wrongly: dict[int, dict[str, float]] | None = None,
) -> list[RanksDifferError | None]:
    """Every rank's verdict on one step; what the ranks in `summed_wrongly` sum is wrong."""
    rows: list[torch.Tensor] = []

    def hand_over(row: torch.Tensor) -> torch.Tensor:
        rows.append(row)
        raise Gathered

    monkeypatch.setattr(audit_module, "gather_rows", hand_over)
    for rank, audit in enumerate(together):
        audit.choose(step, leaves)
        if audit.own is not None:
            audit.note_summed(*computed(audit.own, **(summed_wrongly or {}).get(rank, {})))
        if audit.other is not None:
            audit.note_again(*computed(audit.other))
        with pytest.raises(Gathered):
            audit.compare()
    monkeypatch.setattr(audit_module, "gather_rows", lambda row: torch.stack(rows))
    verdicts: list[RanksDifferError | None] = []
    for audit in together:
        try:
            audit.compare()
            verdicts.append(None)
        except RanksDifferError as error:
            verdicts.append(error)
    return verdicts


def named_audits(world_size: int, alike: bool = True) -> list[Audit]:
    hosts = [f"host{rank}" for rank in range(world_size)]
    return [
        Audit(Ranks(r, world_size), hosts, ["w", "b"], every_steps=5, total_steps=23, seed=0, alike=alike)
        for r in range(world_size)
    ]


@pytest.mark.parametrize(("world_size", "leaves"), [(1, 7), (2, 5), (3, 13), (5, 3)])
@pytest.mark.parametrize("alike", [True, False])
def test_ranks_that_compute_alike_pass(
    monkeypatch: pytest.MonkeyPatch, world_size: int, leaves: int, alike: bool
) -> None:
    """Also where a rank has no micro-batch in a small step."""
    together = named_audits(world_size, alike)
    for step in range(6):
        assert compared(monkeypatch, together, step, leaves) == [None] * world_size


@pytest.mark.parametrize(
    ("wrong", "tensor"),
    [
        ("loss", "loss"),
        ("statistics", "BatchNorm's statistics"),
        ("gradient", "the gradient of w"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_summed_something_else_is_named(
    monkeypatch: pytest.MonkeyPatch, wrong: str, tensor: str, rank: int
) -> None:
    together = named_audits(3)
    witnesses = set()
    for step in range(8):
        verdicts = compared(monkeypatch, together, step, 13, {rank: {wrong: 1.0}})
        own = together[rank].own
        (witness,) = (r for r, audit in enumerate(together) if audit.other == own)
        witnesses.add(witness)
        for error in verdicts:  # every rank says the same
            assert error is not None and error.agreed
            assert (
                f"The audit of step {step + 1} found two results for micro-batch {own}: rank {rank} on host{rank} "
                f"summed it, rank {witness} on host{witness} computed it again, and they differ, first in {tensor}."
            ) in str(error)
            assert f"Step {step + 1} was not applied. No audit has passed" in str(error)
    assert witnesses == {0, 1, 2} - {rank}  # not always the same one looks


def test_of_several_differences_the_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = compared(monkeypatch, named_audits(2), 0, 4, {1: {"statistics": 1.0, "gradient": 1.0}})
    assert all("first in BatchNorm's statistics" in str(error) for error in verdicts)


@pytest.mark.parametrize(("world_size", "alike"), [(1, True), (2, False)])
def test_a_rank_that_disagrees_with_itself(monkeypatch: pytest.MonkeyPatch, world_size: int, alike: bool) -> None:
    together = named_audits(world_size, alike)
    last = world_size - 1
    assert compared(monkeypatch, together, 4, 6) == [None] * world_size
    for error in compared(monkeypatch, together, 9, 6, {last: {"loss": 1.0}}):
        assert f"rank {last} on host{last} computed it twice, and its two results differ, first in loss" in str(error)
        assert "Step 10 was not applied. The audit of step 5 passed: do not trust checkpoints of later" in str(error)


def test_a_model_without_statistics_is_audited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    (audit,) = named_audits(1)
    rows: list[torch.Tensor] = []
    monkeypatch.setattr(audit_module, "gather_rows", lambda row: rows.append(row) or row[None])
    audit.choose(0, 3)
    for note in (audit.note_summed, audit.note_again):
        note(torch.tensor(2.0), torch.empty(0), [torch.ones(2), None])
    audit.compare()
    first, again = rows[0].view(2, 4).tolist()
    assert first == again
    # What is not there has no hash; what is there has its own.
    assert first == [int(hash64([torch.tensor(2.0)])), 0, int(hash64([torch.ones(2)])), 0]
