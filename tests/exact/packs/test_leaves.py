"""Gradients of a pack, until the sink has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.exact.packs.leaves import Kept, Leaves


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


def test_parameters_are_passed_on_in_the_order_of_the_backward() -> None:
    kept = Kept()
    leaves = Leaves([torch.zeros(1), torch.zeros(())], 2, kept)
    for place in (0, 1):
        leaves.expect(place)
    leaves.put(1, torch.tensor([3.0, 4.0]))
    leaves.put(0, torch.tensor([1.0, 2.0]))
    assert [(place, rows.tolist(), present) for place, rows, present in kept.taken] == [
        (1, [3.0, 4.0], None),
        (0, [[1.0], [2.0]], None),
    ]


def test_a_use_that_leads_to_no_loss_sends_no_gradient() -> None:
    leaves, sink = made()
    leaves.expect(0)
    leaves.expect(0)
    assert leaves.is_expected(0) and not leaves.is_expected(1)
    leaves.put(0, torch.ones(2, 1))
    assert leaves.is_expected(0) and sink.taken == []
    leaves.finish()
    assert sink.taken == [(0, [1.0, 1.0], None)]


def test_one_parameter_is_enough() -> None:
    assert Leaves([torch.zeros(1)], 2, Kept()).device_type == "cpu"


def test_a_gradient_that_comes_too_late_is_an_error_of_our_own() -> None:
    leaves, _ = made()
    leaves.expect(0)
    leaves.put(0, torch.ones(2, 1))
    leaves.expect(0)
    with pytest.raises(AssertionError, match="after its parameter was complete"):
        leaves.put(0, torch.ones(2, 1))


@pytest.mark.parametrize("order", [("expect", "hold"), ("hold", "expect"), ("hold", "hold")])
def test_gradients_now_and_after_the_backward_come_in_no_known_order(order: tuple[str, str]) -> None:
    leaves, _ = made()
    for what in order:
        assert leaves.shared == set()
        if what == "hold":
            leaves.hold({0})
        else:
            leaves.expect(0)
    assert leaves.shared == {0}
    leaves.hold({1})
    assert leaves.shared == {0}, "the other one has only those after the backward"


# In bfloat16, 256 and 1 are 256, and 256 and 2 are 258
BIG, ONE, TWO = (torch.tensor([[v], [v]], dtype=torch.bfloat16) for v in (256.0, 1.0, 2.0))


def test_gradients_of_one_cast_are_added_in_its_type() -> None:
    """Autocast casts a parameter once a forward."""
    leaves, sink = made()
    for _ in range(4):
        leaves.expect(0)
    for rows in (BIG, ONE, TWO):
        leaves.put(0, rows.clone())
    leaves.put(0, torch.ones(2, 1))
    assert sink.taken == [(0, [259.0, 259.0], None)], "the last in float32"


def test_without_other_gradients_those_of_a_cast_are_passed_on() -> None:
    leaves, sink = made()
    for _ in range(3):
        leaves.expect(0)
    leaves.put(0, BIG.clone())
    leaves.put(0, ONE.clone())
    leaves.finish()
    assert sink.taken == [(0, [256.0, 256.0], None)]


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 257.0), (torch.bfloat16, 256.0)])
def test_what_follows_from_a_parameter_is_cast_for_each_use(dtype: torch.dtype, expected: float) -> None:
    leaves, _ = made()
    leaves.expect_shape(-1, torch.zeros(1, dtype=dtype))
    leaves.put(-1, BIG.clone())
    leaves.put(-1, ONE.clone())
    found = leaves.of(-1)
    assert found is not None and found[1] is None
    assert found[0].dtype == torch.float32 and found[0].tolist() == [[expected], [expected]]
    assert leaves.of(-1) is None, "it has been taken"


def test_what_came_one_by_one_for_all_is_there_for_all() -> None:
    leaves, _ = made()
    leaves.expect_shape(-1, torch.zeros(1))
    for k in range(2):
        leaves.put_one(-1, k, torch.ones(1))
    found = leaves.of(-1)
    assert found is not None and found[1] is None


def test_a_pack_that_is_given_up_leaves_nothing() -> None:
    leaves, sink = made()
    for place in (0, 0, 1, 1):
        leaves.expect(place)
    leaves.put(0, BIG.clone())
    leaves.put_one(1, 0, torch.tensor(1.0))
    leaves.clear()
    leaves.finish()
    assert sink.taken == []
