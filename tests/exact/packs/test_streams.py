"""Each micro-batch of a pack draws what it draws alone."""

from __future__ import annotations

import pytest
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


def test_a_draw_at_rest_is_noticed_at_once() -> None:
    streams = Streams(2, CPU)
    streams.begin([5, 6])
    torch.rand(1)
    assert streams.disturbed()
    streams.begin([5, 6])
    assert not streams.disturbed()


def test_a_draw_before_a_comparison_is_noticed() -> None:
    streams = Streams(2, CPU)
    streams.begin([5, 6])
    torch.rand(1)
    with streams.aside():
        pass
    assert streams.disturbed()


def test_one_micro_batch_that_draws_is_enough() -> None:
    streams = Streams(3, CPU)
    streams.begin([5, 6, 7])
    assert not streams.host_drawn()
    for k in (0, 1):
        with streams.of(k):
            if k:
                torch.rand(1)
    assert streams.host_drawn()


def test_a_function_that_takes_a_generator_draws_from_the_same_stream() -> None:
    streams = Streams(2, CPU)
    streams.begin([5, 6])
    with streams.of(1):
        drawn = torch.rand(3).tolist()
    drawn += torch.rand(3, generator=streams.generator(1, CPU)).tolist()
    torch.manual_seed(6)
    assert drawn == [*torch.rand(3).tolist(), *torch.rand(3).tolist()]
    assert streams.all_on_gpu() == []
    streams.end()


# A GPU's generators


class Gpu:
    """Stands for a GPU's generator: its state can be swapped, and has a seed and an offset that draws increase."""

    def __init__(self, seed: int, offset: int) -> None:
        self.state = {"seed": seed, "offset": offset}

    def draw(self) -> tuple[int, int]:
        self.state["offset"] += 4
        return self.state["seed"], self.state["offset"] - 4

    def manual_seed(self, seed: int) -> None:
        self.state |= {"seed": seed, "offset": 0}

    def get_offset(self) -> int:
        return self.state["offset"]

    def clone_state(self) -> Gpu:
        return Gpu(**self.state)

    def graphsafe_get_state(self) -> Gpu:
        found = Gpu(0, 0)
        found.state = self.state
        return found

    def graphsafe_set_state(self, other: Gpu) -> None:
        self.state = other.state


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    own = Gpu(99, 7)
    monkeypatch.setattr(torch.cuda, "default_generators", (Gpu(0, 0), own))
    return own


DEVICE = torch.device("cuda", 1)


def test_a_gpus_streams_go_on_where_they_were_left(gpu: Gpu) -> None:
    streams = Streams(2, DEVICE)
    for keys in ([5, 6], [7, 8]):
        streams.begin(keys)
        drawn = []
        for k in (0, 1, 1):
            with streams.of(k):
                drawn.append(gpu.draw())
        assert drawn == [(keys[0], 0), (keys[1], 0), (keys[1], 4)]
        assert not streams.disturbed()
        streams.end()
        assert gpu.state == {"seed": 99, "offset": 7}, "as it was"
    streams.end()
    assert gpu.state == {"seed": 99, "offset": 7}


def test_a_graph_knows_the_generators_of_all_micro_batches(gpu: Gpu) -> None:
    streams = Streams(2, DEVICE)
    streams.begin([5, 6])
    generators = streams.all_on_gpu()
    assert [own.draw() for own in generators] == [(5, 0), (6, 0)]
    assert streams.generator(1, DEVICE) is generators[1]
    assert isinstance(streams.generator(1, CPU), torch.Generator)
    with streams.of(0):
        assert gpu.draw() == (5, 4)


def test_a_draw_on_a_gpu_at_rest_is_noticed(gpu: Gpu) -> None:
    streams = Streams(2, DEVICE)
    streams.begin([5, 6])
    gpu.draw()
    with streams.of(0):
        gpu.draw()
    with streams.of(1):
        pass
    assert streams.disturbed()
    streams.end()
    streams.begin([5, 6])
    assert not streams.disturbed()


def test_after_a_micro_batch_a_gpu_is_at_rest(gpu: Gpu) -> None:
    streams = Streams(2, DEVICE)
    streams.begin([5, 6])
    with streams.of(0):
        gpu.draw()
    gpu.draw()
    assert streams.disturbed()
    with streams.of(0):
        assert gpu.draw() == (5, 4), "the stream has not moved"


def test_a_draw_on_a_gpu_in_a_comparison_is_nobodys(gpu: Gpu) -> None:
    streams = Streams(2, DEVICE)
    streams.begin([5, 6])
    with streams.aside():
        gpu.draw()
    assert not streams.disturbed()
    with streams.of(0):
        assert gpu.draw() == (5, 0)


def test_while_a_graph_is_recorded_no_state_of_a_gpu_is_read(gpu: Gpu) -> None:
    streams = Streams(2, DEVICE)
    streams.begin([5, 6])
    gpu.draw()
    with streams.recording():
        assert not streams.disturbed()
    assert streams.disturbed()
