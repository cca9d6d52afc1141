"""CUDA graphs on a pretended GPU: when they are used, and what they follow. Whole runs: tests/pretended_gpu."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.pretended_gpu.device import PretendedGpu
from trainer.exact.optional import graphs
from trainer.exact.optional.graphs import TRIALS, Computed, Graphs, OneStream, Work, _difference
from trainer.exact.packs.streams import Streams

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with PretendedGpu() as there:
        yield there


class Rank:
    """Computes a sum of samples times a weight, with noise, as a rank computes a micro-batch."""

    def __init__(self) -> None:
        self.weight = torch.ones(3).to(GPU)
        self.graphs = Graphs([self.weight], follows_progress=False)
        self.calls, self.step = 0, 0
        self.factor = 1.0

    def compute(self, x: Tensor, seed: int) -> float:
        def function(arrays: dict[str, Tensor]) -> Computed:
            self.calls += 1
            products = arrays["x"] * self.weight + torch.randn_like(arrays["x"])
            return Computed(products.sum() * self.factor, products.sum(0), [(0, arrays["x"].sum(0), None)])

        self.graphs.begin()
        self.step += 1
        work = Work(("one",), function, OneStream(GPU), [seed], self.step)
        return self.graphs.compute(work, {"x": x}).losses.item()

    def settle(self) -> None:
        for seed in range(TRIALS):
            self.compute(torch.full((4, 3), float(seed)).to(GPU), seed)


def plain(x: Tensor, seed: int, weight: float = 1.0) -> float:
    torch.manual_seed(seed)
    return float((x * weight + torch.randn(4, 3)).sum())


def test_after_its_trials_only_the_graph_runs(gpu: PretendedGpu) -> None:
    rank = Rank()
    rank.settle()
    calls = rank.calls
    assert calls == TRIALS + 1, "once a step, and once to record"
    for seed in (7, 8):
        x = torch.full((4, 3), 0.5 * seed)
        assert rank.compute(x.to(GPU), seed) == plain(x, seed)
    assert rank.calls == calls
    assert rank.graphs.summary() == {"shapes": 1}


def test_another_shape_has_a_graph_of_its_own(gpu: PretendedGpu) -> None:
    rank = Rank()
    rank.settle()
    calls = rank.calls
    rank.compute(torch.ones(2, 3).to(GPU), 1)
    assert rank.calls == calls + 2


def test_weights_are_read_where_they_lie(gpu: PretendedGpu) -> None:
    rank = Rank()
    rank.settle()
    calls, x = rank.calls, torch.ones(4, 3)
    rank.weight.mul_(3.0)
    assert rank.compute(x.to(GPU), 5) == plain(x, 5, 3.0)
    assert rank.calls == calls
    rank.weight = torch.full((3,), 2.0).to(GPU)
    rank.graphs._tensors = [rank.weight]
    assert rank.compute(x.to(GPU), 5) == plain(x, 5, 2.0)
    assert rank.calls == calls + 2, "in another place: recorded anew"


def test_what_the_host_changes_is_found_in_a_trial(gpu: PretendedGpu) -> None:
    rank = Rank()
    rank.compute(torch.ones(4, 3).to(GPU), 0)
    rank.factor = 2.0
    x = torch.ones(4, 3)
    assert rank.compute(x.to(GPU), 1) == 2.0 * plain(x, 1)
    assert rank.graphs.summary() == {"shapes": 0, "refused": ["the loss has other bits"]}
    calls = rank.calls
    rank.compute(x.to(GPU), 2)
    assert rank.calls == calls + 1


def test_only_so_many_shapes_have_a_graph(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    rank = Rank()
    rank.settle()
    rank.compute(torch.ones(2, 3).to(GPU), 1)
    assert rank.graphs.summary() == {"shapes": 1, "refused": ["1 shapes have one already"]}


def test_a_task_that_follows_progress_has_none(gpu: PretendedGpu) -> None:
    rank = Rank()
    rank.graphs = Graphs([rank.weight], follows_progress=True)
    rank.settle()
    assert rank.calls == TRIALS
    assert rank.graphs.summary() == {"shapes": 0, "refused": ["the task's forward or loss takes `progress`"]}


def test_bits_are_compared_in_three_steps(gpu: PretendedGpu) -> None:
    """What the README promises."""
    rank, x = Rank(), torch.ones(4, 3).to(GPU)
    for seed in range(3):
        assert rank.graphs.summary() == {"shapes": 0}
        rank.compute(x, seed)
    assert rank.graphs.summary() == {"shapes": 1}


@pytest.mark.parametrize("other", ["bits", "parameters"])
def test_gradients_that_differ_refuse_a_graph(other: str) -> None:
    alone = Computed(torch.ones(()), torch.zeros(2), [(0, torch.ones(3), None), (2, torch.ones(4), None)])
    assert _difference(alone, alone) == ""
    gradient, place = torch.ones(4), 2
    if other == "bits":
        gradient[3] = 1.0 + 2**-23
    else:
        place = 1
    graph = alone._replace(gradients=[alone.gradients[0], (place, gradient, None)])
    assert _difference(alone, graph) == "gradients have other bits"


def test_all_graphs_share_one_pool_of_memory(gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one of them runs at a time, so each may use the memory of the others' activations."""
    pools, record, handles = [], torch.cuda.graph, iter(range(7, 9))

    def noted(graph: Any, *, pool: Any, **options: Any) -> Any:
        pools.append(pool)
        return record(graph, pool=pool, **options)

    monkeypatch.setattr(torch.cuda, "graph", noted)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    rank = Rank()
    for samples in (4, 2, 3):
        rank.compute(torch.ones(samples, 3).to(GPU), 0)
    assert pools == [7, 7, 7]


def test_a_graph_may_draw_from_the_generators_of_a_packs_micro_batches(gpu: PretendedGpu) -> None:
    """CUDA refuses to record draws from a generator that the graph does not know."""
    streams, found = Streams(2, GPU), Graphs([], follows_progress=False)

    def function(arrays: dict[str, Tensor]) -> Computed:
        noise = []
        for k in range(2):
            with streams.of(k):
                noise.append(torch.randn_like(arrays["x"]))
        losses = torch.stack(noise).sum(1)
        return Computed(losses, losses.new_empty(2, 0), [])

    x = torch.zeros(3).to(GPU)
    for step in range(TRIALS + 1):
        keys = [10 + step, 20 + step]
        losses = found.compute(Work(("pack",), function, streams, keys, step), {"x": x}).losses
        wanted = [torch.randn(3, generator=torch.Generator().manual_seed(k)).sum() for k in keys]
        assert losses.tolist() == torch.stack(wanted).tolist()
    assert found.summary() == {"shapes": 1}
