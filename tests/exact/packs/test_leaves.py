"""Gradients of a pack, until the sink has them."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.exact.packs.leaves import Leaves


class Sink:
    def __init__(self) -> None:
        self.taken: list[tuple[int, list[float], list[bool] | None]] = []

    def take(self, place: int, rows: Tensor, present: list[bool] | None) -> None:
        self.taken.append((place, rows.flatten().tolist(), present))


def made(g: int = 2) -> tuple[Leaves, Sink]:
    sink = Sink()
    return Leaves([torch.zeros(1), torch.zeros(())], g, sink), sink


def test_a_parameter_is_passed_on_when_all_its_uses_have_come() -> None:
    leaves, sink = made()
    for _ in range(2):
        leaves.expect(0)
    leaves.put(0, torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16))
    assert sink.taken == []
    leaves.put(0, torch.tensor([[10.0], [20.0]]))
    assert sink.taken == [(0, [11.0, 22.0], None)]
    leaves.finish()
    assert len(sink.taken) == 1


def test_micro_batches_that_do_not_use_a_parameter_are_told_apart() -> None:
    leaves, sink = made()
    leaves.expect(1)
    leaves.expect(1)
    leaves.put_one(1, 1, torch.tensor(-0.0))
    assert sink.taken == []
    leaves.finish()
    ((place, rows, present),) = sink.taken
    assert (place, present) == (1, [False, True])
    assert str(rows[1]) == "-0.0", "nothing was added to it"


def test_both_kinds_of_use_are_added() -> None:
    leaves, sink = made()
    for _ in range(2):
        leaves.expect(0)
    leaves.put_one(0, 0, torch.tensor([1.0]))
    leaves.put(0, torch.tensor([[4.0], [5.0]]))
    assert sink.taken == [(0, [5.0, 5.0], None)]


def test_a_parameter_that_is_held_waits_for_the_end() -> None:
    leaves, sink = made()
    leaves.expect_shape(-1, torch.zeros(3))
    leaves.hold({0})
    leaves.expect(0)
    leaves.put(0, torch.tensor([[1.0], [2.0]]))
    leaves.put_one(-1, 1, torch.ones(3))
    assert sink.taken == []
    found = leaves.of(-1)
    assert found is not None and found[1] == [False, True] and found[0][1].tolist() == [1.0, 1.0, 1.0]
    assert leaves.of(-2) is None
    leaves.put_one(0, 1, torch.tensor([5.0]))
    leaves.finish()
    assert sink.taken == [(0, [1.0, 7.0], None)]
