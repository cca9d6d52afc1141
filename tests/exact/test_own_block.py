"""A rank's own block: which micro-batches are computed in packs, which one at a time, and what an error does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.exact.packs import packed
from tests.exact.test_step import Partly, copies, made
from trainer.errors import RanksDifferError, TrainerError
from trainer.exact import exchange
from trainer.exact.checks.audit import Audit
from trainer.exact.optional import early_exchange
from trainer.exact.optional.early_exchange import EarlyExchange
from trainer.exact.optional.graphs import Computed, Work
from trainer.exact.packs.verdicts import Packed, RefusedError
from trainer.ranks.place import Ranks

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one")

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Packs:
    """Stands in for `packs.Packs`: says what is known of packs, computes none, and notes what it is told."""

    def __init__(self, known: bool | None = True, error: Exception | None = None, may_try: bool = False) -> None:
        self._known, self._error, self._may_try = known, error, may_try
        self.told: list[Any] = []
        self.packed, self.notes = 0, list[str]()

    def begin(self, batch: Any, block: range) -> int:
        return 2

    def parts(self, batch: Any, block: range) -> list[list[int]]:
        return [[0, 1], [2]]

    def end(self) -> None:
        self.told.append("end")

    def known(self, batch: Any, part: Sequence[int]) -> bool | None:
        return self._known

    def try_out(self, batch: Any, part: Sequence[int], scale: Tensor, singly: Callable[[Any], Any]) -> None:
        self.told.append(("try out", list(part), len(singly(part))))

    def compute(self, *_: Any) -> Packed:
        assert self._error is not None
        raise self._error

    def may_try_more(self) -> bool:
        return self._may_try

    def refuse(self, batch: Any, part: Sequence[int], error: Exception) -> None:
        self.told.append(("refuse", list(part), str(error)))

    def shrink(self, size: int) -> None:
        self.told.append(("shrink", size))


@pytest.mark.parametrize(
    ("packs", "told"),
    [
        (Packs(known=False), []),
        (Packs(known=None), [("try out", [0, 1], 2)]),
        (Packs(error=RefusedError("depends on values")), [("refuse", [0, 1], "depends on values")]),
        (Packs(error=RefusedError("new", untried=True), may_try=True), [("try out", [0, 1], 2)]),
        (Packs(error=RefusedError("new", untried=True)), [("refuse", [0, 1], "new")]),
        (Packs(error=RefusedError("values"), may_try=True), [("refuse", [0, 1], "values")]),
        (Packs(error=OUT_OF_MEMORY), [("shrink", 2)]),
        (Packs(error=IndexError("mine")), [("refuse", [0, 1], "mine")]),
    ],
    ids=["refused", "unknown", "values", "new", "new, too late", "no new ones", "memory", "an error of the task"],
)
def test_what_is_no_pack_is_computed_singly(packs: Packs, told: list[Any]) -> None:
    model = Partly()
    step, parts = made(copy.deepcopy(model))
    plain, others = made(model)
    step.block.packs = packs  # type: ignore[assignment]
    result, expected = step(parts["batches"].at(0)), plain(others["batches"].at(0))
    assert result.losses.tolist() == expected.losses.tolist()
    assert all(torch.equal(a, b) for a, b in zip(copies(parts["model"]), copies(others["model"])))
    assert packs.told == [*told, "end"]
    assert packs.packed == 0


@pytest.mark.parametrize("error", [RefusedError("of these values"), IndexError("mine")])
def test_a_pack_that_is_given_up_after_parts_were_sent_ends_the_run(error: Exception) -> None:
    """What was sent may be wrong. Memory that runs out is another matter: what was sent then is complete."""

    class Sent:
        sent = 1
        begin = staticmethod(lambda leaves: None)

    step, parts = made(Partly())
    step.block.packs = Packs(error=error)  # type: ignore[assignment]
    step.block._early = Sent()  # type: ignore[assignment]
    step.block._sender = lambda count: None  # type: ignore[method-assign]
    before = copies(parts["model"])
    with pytest.raises(TrainerError, match=f"A pack of step 1 could not be computed .{error}.*had been sent"):
        step(parts["batches"].at(0))
    assert all(torch.equal(a, b) for a, b in zip(before, copies(parts["model"])))


def test_a_step_that_finds_one_pack_at_most_computes_singly() -> None:
    """Packs of one micro-batch are single ones, and nobody asks for parts."""

    class One(Packs):
        def begin(self, batch: Any, block: range) -> int:
            return 1

        def parts(self, batch: Any, block: range) -> list[list[int]]:
            raise AssertionError

    step, parts = made()
    step.block.packs = packs = One()  # type: ignore[assignment]
    step(parts["batches"].at(0))
    assert packs.told == ["end"]


def audited(every_steps: int = 2) -> tuple[Any, Any]:
    step, parts = made()
    step.audit = Audit(Ranks(), ["here"], ["w"] * 7, every_steps=every_steps, total_steps=9, seed=0, alike=True)
    return step, parts


def test_what_cannot_be_computed_again_is_no_traceback() -> None:
    """A list in a model that grows with each forward, say, and in a pack gets something of another shape."""
    step, parts = audited()
    step(parts["batches"].at(0))
    before = copies(parts["model"])

    def fail(*_: Any) -> Any:
        raise ValueError("4 things instead of 3")

    step.micro_batches.compute = fail
    with pytest.raises(
        RanksDifferError, match=r"could not compute micro-batch \d again \(ValueError: 4 things instead"
    ):
        step(parts["batches"].at(1))
    assert all(torch.equal(a, b) for a, b in zip(before, copies(parts["model"])))


@pytest.mark.parametrize("error", [TrainerError("says it all"), OUT_OF_MEMORY])
def test_an_error_that_says_its_cause_is_not_explained_again(error: Exception) -> None:
    step, parts = audited(every_steps=1)

    def fail(*_: Any) -> Any:
        raise error

    step.micro_batches.compute = fail
    with pytest.raises(type(error)) as caught:
        step(parts["batches"].at(0))
    assert caught.value is error


# With CUDA graphs and with buckets, whose own parts are stood in for


class Graphs:
    """Stands in for `graphs.Graphs`: computes all work as it comes, and counts it."""

    def __init__(self) -> None:
        self.begun, self.shapes = 0, list[Any]()

    def begin(self) -> None:
        self.begun += 1

    def compute(self, work: Work, arrays: dict[str, Tensor]) -> Computed:
        self.shapes.append(work.shape)
        work.draws.begin(work.keys)
        try:
            return work.function(arrays)
        finally:
            work.draws.end()


class Drops(nn.Module):
    """With dropout, BatchNorm, and a weight that no sample uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.dropout(self.norm(self.first(x)), 0.5, True))


@pytest.mark.usefixtures("early_packs")
@pytest.mark.parametrize(("size", "shape"), [(0, ("one",)), (4, ("pack", 4))])
def test_work_for_graphs_gives_what_is_computed_without(size: int, shape: Any) -> None:
    torch.manual_seed(3)
    model, x = Drops(), packed.floats(3)
    (step, batches), (plain, others) = packed.made(copy.deepcopy(model), x, size), packed.made(model, x, 0)
    step.block.graphs = graphs = Graphs()  # type: ignore[assignment]
    for batch, other in zip(batches.starting_at(0), others.starting_at(0)):
        found, expected = step(batch), plain(other)
        assert found.losses.tolist() == expected.losses.tolist() and found.norms is not None
        assert found.norms.tolist() == expected.norms.tolist()
        assert all(torch.equal(a, b) for a, b in zip(step.gradient_views, plain.gradient_views))
    assert all(torch.equal(a, b) for a, b in zip(step.statistics._running, plain.statistics._running))
    assert shape in graphs.shapes and graphs.begun == packed.STEPS


def mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank of two sends what this one sends."""

    def gather(out: Tensor, piece: Tensor) -> None:
        out.view(2, -1).copy_(piece.expand(2, -1))

    def begin_gather(out: Tensor, piece: Tensor, tag: int = 0) -> list[Any]:
        gather(out, piece)
        return []

    monkeypatch.setattr(exchange, "all_gather_flat", gather)
    monkeypatch.setattr(early_exchange, "begin_gather", begin_gather)


@pytest.mark.usefixtures("early_packs")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("size", [0, 2, 4])
def test_what_is_sent_under_the_last_backward_is_what_is_sent_after_it(
    monkeypatch: pytest.MonkeyPatch, size: int, graphs: bool
) -> None:
    """Buckets leave early only in the last part of a block; a trial of packs sends none."""
    mirrored(monkeypatch)
    torch.manual_seed(3)
    model, x = Drops(), packed.floats(3)
    options: dict[str, Any] = {"ranks": Ranks(0, 2)}
    early, batches = packed.made(copy.deepcopy(model), x, size, bucket_bytes=4, **options)
    whole, others = packed.made(model, x, 0, **options)
    early.block.graphs = Graphs() if graphs else None  # type: ignore[assignment]
    sent: list[int] = []
    finish = EarlyExchange.__call__

    def noted(self: EarlyExchange, leaves: int) -> Any:
        sent.append(self.sent)
        return finish(self, leaves)

    monkeypatch.setattr(EarlyExchange, "__call__", noted)
    for batch, other in zip(batches.starting_at(0), others.starting_at(0)):
        found, expected = early(batch), whole(other)
        assert found.losses.tolist() == expected.losses.tolist()
        assert found.norms is not None and found.norms.tolist() == expected.norms.tolist()
        assert all(torch.equal(a, b) for a, b in zip(early.gradient_views, whole.gradient_views))
    buckets = len(early._early.buckets)  # type: ignore[union-attr]
    # The last bucket has what is known only at the end.
    assert sent[-2:] == [buckets - 1] * 2
    assert (sent[0] == 0) == (size > 0), "the first step tries packs"
