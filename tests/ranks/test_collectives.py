"""What ranks say to one another: over gloo between three processes, and with one rank, where nothing is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.errors import LostRankError, NonFiniteError, RanksDifferError, TrainerError, UserError
from trainer.ranks import collectives
from trainer.ranks.collectives import (
    all_gather_flat,
    broadcast_object,
    broadcast_tensor,
    common_value,
    gather_int64,
    gather_objects,
    gather_rows,
    meetings,
    message_device,
    raise_together,
)
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks

W = 3
# nan with a payload, negative zero, the smallest number, infinity: bits that arithmetic would change.
BITS = [0x7FC00123, 0x80000000, 0x00000001, 0x7F800000]
TENSORS = {
    "float32": torch.tensor(BITS, dtype=torch.int64).to(torch.int32).view(torch.float32),
    "bfloat16": torch.tensor([1.5, -0.0, 3e-39], dtype=torch.bfloat16),
    "int64": torch.tensor([[2**62, -1], [0, 7]]),
    "bool": torch.tensor([True, False, True]),
    "strided": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}
ERRORS: list[type[TrainerError]] = [UserError, NonFiniteError, RanksDifferError, LostRankError, TrainerError]


def caught(error: TrainerError | None) -> tuple[str, str, bool] | None:
    try:
        raise_together(error)
    except TrainerError as raised:
        return type(raised).__name__, str(raised), raised.agreed
    return None


def bits(tensor: Tensor) -> tuple[Any, ...]:
    data = tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []
    return tuple(tensor.shape), str(tensor.dtype), str(tensor.device), data


def talk(ranks: Ranks, backend: str) -> dict[str, Any]:
    """Everything in one meeting of the ranks, as starting them takes longest."""
    from trainer.ranks.rendezvous import start

    start(ranks, backend, 60.0)
    r, found = ranks.rank, {}
    found["objects"] = gather_objects({"rank": r, "none": None})
    found["row"] = bits(gather_rows(torch.tensor([1.0, 2.0, 3.0]) * 10**r))
    found["numbers"] = gather_int64(torch.tensor(2**53 + r))
    flat = torch.full((W * 4,), torch.nan)
    all_gather_flat(flat, TENSORS["float32"] if r == 1 else torch.full((4,), float(r)))
    found["flat"] = bits(flat)
    found["object"] = broadcast_object({"from": 0} if r == 0 else None)
    found["tensors"] = {
        name: bits(broadcast_tensor(t if r == 0 else None, t.dtype, tuple(t.shape))) for name, t in TENSORS.items()
    }
    found["no error"] = caught(None)
    found["errors"] = [caught(cls(f"rank {r} is wrong") if r in (1, 2) else None) for cls in ERRORS]
    before = meetings.count
    gather_rows(torch.zeros(2))
    gather_objects(None)
    broadcast_object(1)
    found["meetings"] = meetings.count - before
    return found


@pytest.fixture(scope="module", params=["gloo", "cpu:gloo,cuda:gloo"])
def found(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """On the CPU, and with the two backends of GPUs, of which one plays NCCL, and carries nothing of this."""
    return run_ranks(talk, W, request.param, timeout_s=120.0)


def same(found: list[dict[str, Any]], name: str) -> Any:
    """What every rank has found."""
    assert all(other[name] == found[0][name] for other in found)
    return found[0][name]


def test_objects_come_by_rank(found: list[dict[str, Any]]) -> None:
    assert same(found, "objects") == [{"rank": r, "none": None} for r in range(W)]


def test_rows_and_numbers_come_by_rank(found: list[dict[str, Any]]) -> None:
    assert same(found, "row") == bits(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [100.0, 200.0, 300.0]]))
    assert same(found, "numbers") == [2**53, 2**53 + 1, 2**53 + 2]  # a float would merge them


def test_pieces_are_moved_bit_by_bit(found: list[dict[str, Any]]) -> None:
    assert same(found, "flat") == bits(torch.cat([torch.zeros(4), TENSORS["float32"], torch.full((4,), 2.0)]))


def test_rank_0_speaks_to_all(found: list[dict[str, Any]]) -> None:
    assert same(found, "object") == {"from": 0}
    tensors = same(found, "tensors")
    for name, tensor in TENSORS.items():
        assert tensors[name] == bits(tensor), name


def test_one_ranks_error_is_everyones(found: list[dict[str, Any]]) -> None:
    """The lowest rank's, of its own kind, and agreed: rank 0 alone reports it. Nobody goes on or is left waiting."""
    assert same(found, "no error") is None
    assert same(found, "errors") == [(cls.__name__, "rank 1 is wrong", True) for cls in ERRORS]


def test_meetings_are_counted_alike_on_every_rank(found: list[dict[str, Any]]) -> None:
    """By them it is known which rank the others wait for. One within another is one."""
    assert same(found, "meetings") == 3


@pytest.mark.parametrize(
    ("backend", "device", "place"),
    [
        ("gloo", "cpu", "cpu"),
        ("gloo", "cuda:1", "cpu"),  # ranks that share a GPU
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
    ],
)
def test_where_messages_lie(monkeypatch: pytest.MonkeyPatch, backend: str, device: str, place: str) -> None:
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    assert message_device(torch.device(device)) == torch.device(place)


# One rank


def test_alone_everything_is_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "meetings", None)  # nobody is met
    assert gather_objects("mine") == ["mine"]
    assert bits(gather_rows(torch.tensor([1.0, 2.0]))) == bits(torch.tensor([[1.0, 2.0]]))
    assert gather_int64(torch.tensor(7)) == [7]
    assert broadcast_object("mine") == "mine"
    for tensor in TENSORS.values():
        assert bits(broadcast_tensor(tensor, tensor.dtype, tuple(tensor.shape))) == bits(tensor)
    assert caught(None) is None
    assert caught(NonFiniteError("nan")) == ("NonFiniteError", "nan", True)


def test_since_when_a_rank_waits_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """From when it came to the first meeting to which the other has not come. One within another is no other one."""
    clock = iter(range(100))
    monkeypatch.setattr(collectives.time, "monotonic", lambda: next(clock))
    meeting = collectives._Meetings()
    with meeting, meeting, meeting.from_first():  # at 0
        assert meeting.count == 1
    assert [meeting.since_s(count) for count in (0, 1)] == [0, None]
    with pytest.raises(ConnectionError), meeting:  # at 1
        raise ConnectionError
    with meeting.from_first():  # at 2
        assert [meeting.since_s(count) for count in (0, 1, 2, 3)] == [0, 1, 2, None]
    # It has heard rank 0, and has left: it waits for nobody there.
    assert [meeting.since_s(count) for count in (1, 2, 3)] == [1, None, None]
    with meeting:  # at 3
        assert (meeting.count, meeting.since_s(2)) == (4, 3)
    meeting.restart()
    assert (meeting.count, meeting.since_s(0)) == (0, None)


@pytest.mark.parametrize(
    ("values", "common"),
    [
        (["a", "b", "b"], "b"),
        (["a", "b"], "a"),  # equally frequent: the lowest rank's
        (["c", "b", "a", "b", "a"], "b"),
        ([{"x": 1}, {"x": 2}, {"x": 2}], {"x": 2}),  # need not be hashable
        ([None], None),
        ([1, True, True], True),
    ],
)
def test_the_value_that_most_ranks_have(values: list[Any], common: Any) -> None:
    assert common_value(values) == common and type(common_value(values)) is type(common)
