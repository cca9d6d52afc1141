"""Each micro-batch of a pack draws what it draws alone."""

from __future__ import annotations

import torch

from trainer.exact.packs.streams import Streams

CPU = torch.device("cpu")


def test_streams_go_on_where_they_were_left() -> None:
    streams = Streams(2, CPU)
    streams.begin([5, 6])
    drawn: list[list[float]] = [[], []]
    for k in (0, 1, 1, 0):
        with streams.of(k):
            drawn[k] += torch.rand(3).tolist()
    assert streams.host_drawn() and not streams.disturbed()
    for k, seed in enumerate((5, 6)):
        torch.manual_seed(seed)
        assert drawn[k] == [*torch.rand(3).tolist(), *torch.rand(3).tolist()]
    streams.begin([7, 8])
    assert not streams.host_drawn()
    with streams.of(1):
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(8)))
    streams.end()


def test_numbers_that_are_nobodys_are_noticed() -> None:
    streams = Streams(2, CPU)
    streams.begin([5, 6])
    with streams.of(0):
        torch.rand(1)
    with streams.aside():
        torch.rand(1)
    assert not streams.disturbed()
    torch.rand(1)
    with streams.of(1):
        torch.rand(1)
    assert streams.disturbed()
