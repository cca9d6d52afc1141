"""The gradients of a pack, added along the tree to what a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.errors import TrainerError
from trainer.exact.gradient_sum import GradientSum, norm_of
from trainer.exact.optional.buckets import Bucket, in_buckets
from trainer.exact.packs import pack_sum
from trainer.exact.packs.pack_sum import PackSum, given_up, taking

SHAPES = [(2,), (3, 2), ()]
Gradients = list[list[Tensor | None]]  # one list a micro-batch


def made(M: int) -> GradientSum:
    total = GradientSum([torch.zeros(s) for s in SHAPES], leaves={M}, rank=0, world_size=1, head_size=0)
    total.start(M)
    return total


def drawn(M: int, missing: Sequence[tuple[int, int]] = (), seed: int = 0) -> Gradients:
    """Random gradients; `missing` are (micro-batch, parameter) without one."""
    draw = torch.Generator().manual_seed(seed)
    found = [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(M)]
    return [[None if (j, i) in missing else g for i, g in enumerate(row)] for j, row in enumerate(found)]


def take(sink: PackSum, gradients: Gradients, part: Sequence[int], places: Sequence[int] = (0, 1, 2)) -> None:
    """As a pack's backward does: nothing comes of a parameter that no micro-batch of the pack uses."""
    for place in places:
        rows = [gradients[j][place] for j in part]
        present = [row is not None for row in rows]
        if any(present):
            stacked = torch.stack([torch.full(SHAPES[place], 9.0) if r is None else r for r in rows])
            sink.take(place, stacked, None if all(present) else present)


def singly(gradients: Gradients) -> Tensor:
    """The node that the tree gives."""
    total = made(len(gradients))
    for j, own in enumerate(gradients):
        total.add(j, own)
    total.finish()
    return total.nodes[0]


PARTS = {
    "all": (8, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    "odd": (7, [[0, 1, 2, 3, 4, 5, 6]]),
    "thirteen": (13, [[*range(13)]]),
    "two halves": (8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "no neighbours": (8, [[0, 2, 4, 6], [1, 3, 5, 7]]),
    "some neighbours": (8, [[0, 1, 3, 6, 7], [2, 4, 5]]),
    "in threes": (9, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
}


@pytest.mark.parametrize("missing", [(), ((1, 0), (2, 0), (6, 1)), tuple((j, 2) for j in range(13))])
@pytest.mark.parametrize("parts", PARTS)
def test_packs_are_added_as_single_micro_batches_are(parts: str, missing: tuple[tuple[int, int], ...]) -> None:
    """To the same bits, and the same counts of missing gradients, in buffers that held something else before."""
    M, packs = PARTS[parts]
    total = made(M)
    for seed in range(2):
        total.start(M)
        gradients = drawn(M, missing if seed else ((0, 1), (1, 1)), seed)
        for part in packs:
            sink = PackSum(total, M, part, norms=False, audited=None)
            take(sink, gradients, part)
            sink.close()
            assert sink.norms == [] and sink.audited == []
        total.finish()
        assert torch.equal(total.nodes[0].view(torch.int32), singly(gradients).view(torch.int32))


def test_a_pack_that_is_given_up_changes_nothing() -> None:
    total, gradients = made(4), drawn(4)
    for j in (0, 1):
        total.add(j, gradients[j])
    take(PackSum(total, 4, [2, 3], norms=True, audited=None), drawn(4, seed=1), [2, 3])
    for j in (2, 3):
        total.add(j, gradients[j])
    total.finish()
    assert torch.equal(total.nodes[0], singly(gradients))


def test_norms_are_those_of_single_micro_batches() -> None:
    gradients = drawn(4, ((1, 0), *((j, 2) for j in range(4))))
    sink = PackSum(made(4), 4, range(4), norms=True, audited=None)
    take(sink, gradients, range(4))
    sink.close()
    filled = [[torch.zeros(s) if g is None else g for g, s in zip(own, SHAPES)] for own in gradients]
    assert [float(norm) for norm in sink.norms] == [float(norm_of(own)) for own in filled]


@pytest.mark.parametrize("place", range(3))
def test_the_gradients_of_the_audited_micro_batch_are_kept(place: int) -> None:
    gradients = drawn(3, ((1, 0), (0, 1)))
    sink = PackSum(made(3), 3, range(3), norms=False, audited=place)
    take(sink, gradients, range(3))
    sink.close()
    for kept, own in zip(sink.audited, gradients[place], strict=True):
        assert (kept is None) == (own is None)
        assert kept is None or own is None or torch.equal(kept, own)


def test_gradients_wait_until_there_are_enough_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are added, many parameters at once, and their memory is free."""
    monkeypatch.setattr(pack_sum, "FLUSH_BYTES", 16)
    sink = PackSum(made(2), 2, [0, 1], norms=False, audited=None)
    small = torch.ones(2, 2)  # of 16 bytes
    sink.take(0, small, None)
    assert small.tolist() == [[1.0, 1.0]] * 2, "it waits"
    large = torch.ones(2, 3, 2)
    sink.take(1, large, None)
    assert small[0].tolist() == [2.0, 2.0] and large[0].tolist() == [[2.0, 2.0]] * 3
    last = torch.ones(2)
    sink.take(2, last, None)
    assert last.tolist() == [1.0, 1.0], "it waits for others"
    sink.close()
    assert last[0] == 2.0


def test_after_they_were_added_it_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_sum, "FLUSH_BYTES", 16)
    sink = PackSum(made(2), 2, [0, 1], norms=False, audited=None)
    sink.take(1, torch.ones(2, 3, 2), None)  # of 48 bytes
    small = torch.ones(2, 2)
    sink.take(0, small, None)
    assert small.tolist() == [[1.0, 1.0]] * 2


# What is complete is sent


class Sends:
    """A sender that keeps what it is given of each bucket."""

    def __init__(self, total: GradientSum) -> None:
        self.buckets: Sequence[Bucket] = in_buckets(total, 1)
        self.got: list[list[Tensor]] = []

    @property
    def sent(self) -> int:
        return len(self.got)

    def send(self, nodes: Sequence[Tensor]) -> None:
        ((start, stop),) = self.buckets[self.sent].segments
        self.got.append([node[start:stop].clone() for node in nodes])


def test_a_bucket_is_sent_as_soon_as_it_is_complete() -> None:
    gradients = drawn(4)
    total, expected = made(4), singly(gradients)
    total.add(0, gradients[0])
    sender = Sends(total)
    part = [1, 2, 3]
    sink = PackSum(total, 4, part, norms=False, audited=None, sender=sender)
    seen = []
    for place in (1, 2, 0):
        take(sink, gradients, part, [place])
        seen.append(sender.sent)
    assert seen == [0, 2, 2], "from the last parameter to the first; the last bucket is never early"
    for bucket, got in zip(sender.buckets, sender.got):
        ((start, stop),) = bucket.segments
        assert len(got) == 1 and torch.equal(got[0], expected[start:stop])
    sink.close()
    total.finish()
    assert torch.equal(total.nodes[0], expected)


# One micro-batch, whose gradients are taken as soon as they are there


def alone(M: int = 1) -> tuple[GradientSum, PackSum]:
    total = made(M)
    return total, PackSum(total, M, [0], norms=False, audited=None)


def parameters() -> list[Tensor]:
    return [torch.ones(shape, requires_grad=True) for shape in SHAPES]


def test_gradients_are_taken_while_they_are_computed() -> None:
    total, sink = alone()
    own = parameters()
    loss = sum((i + 2) * p.sum() for i, p in enumerate(own))
    with taking(own, sink):
        found = torch.autograd.grad(loss, own)
    sink.check(found)
    sink.close()
    total.finish()
    assert [view.flatten().tolist() for view in total.gradient_views] == [[2.0] * 2, [3.0] * 6, [4.0]]


def test_after_that_gradients_are_nobodys() -> None:
    _, sink = alone()
    own = parameters()
    with taking(own, sink):
        torch.autograd.grad(own[0].sum(), own[:1])
    torch.autograd.grad(own[0].sum(), own[:1])
    torch.autograd.grad(own[1].sum(), own[1:2])
    sink.check([torch.ones(2), None, None])


NESTED = "was computed inside of a backward of the task's own.*exchange_bucket_mib=null"


def test_a_gradient_that_comes_twice_ends_the_run() -> None:
    _, sink = alone()
    own = parameters()
    with taking(own, sink):
        torch.autograd.grad(own[0].sum(), own[:1])
        with pytest.raises(TrainerError, match=r"(?s)" + NESTED):
            torch.autograd.grad(own[0].sum(), own[:1])


@pytest.mark.parametrize("gradients", [[torch.ones(2), torch.ones(3, 2), None], [None, None, None]])
def test_other_gradients_than_those_of_the_loss_end_the_run(gradients: list[Any]) -> None:
    _, sink = alone()
    sink.take(0, torch.ones(1, 2), None)
    sink.check([torch.ones(2), None, None])
    with pytest.raises(TrainerError, match=r"(?s)" + NESTED):
        sink.check(gradients)


def test_a_pack_that_is_given_up_after_it_was_sent_ends_the_run() -> None:
    message = str(given_up(7, ValueError("odd")))
    assert message.startswith("A pack of step 8 could not be computed (odd), and parts of its gradient had been sent")
    assert message.endswith("Start the run again with trainer.exchange_bucket_mib=null.")
