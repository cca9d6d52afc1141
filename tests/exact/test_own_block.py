"""A rank's own block: one micro-batch at a time, in packs or as graphs, every way gives the same bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.exact.packs import packed
from tests.exact.test_step import Partly, copies, made
from trainer.errors import RanksDifferError, TrainerError, UserError
from trainer.exact.checks.audit import Audit
from trainer.exact.optional import early_exchange
from trainer.exact.optional.graphs import Graphs
from trainer.exact.packs.packs import Packs
from trainer.exact.packs.verdicts import Packed, RefusedError
from trainer.ranks.place import Ranks

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one", "early_packs")


class Model(nn.Module):
    """Has statistics and dropout, and a weight that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class WithoutGraphs(Graphs):
    """Computes as `Graphs` does where a task cannot have a graph, and counts."""

    def __init__(self) -> None:
        super().__init__([], follows_progress=True)
        self.steps, self.shapes = 0, set()  # type: ignore[var-annotated]

    def begin(self) -> None:
        self.steps += 1

    def compute(self, work: Any, arrays: Any) -> Any:
        self.shapes.add(work.shape)
        return super().compute(work, arrays)


def model_and_samples() -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(), packed.floats(3)


def audit_of(model: nn.Module) -> Audit:
    names = [name for name, _ in model.named_parameters()]
    return Audit(Ranks(), ["here"], names, every_steps=1, total_steps=packed.STEPS, seed=0, alike=True)


def run(
    size: int | None, graphs: Graphs | None = None, audited: bool = False, task: Any = None
) -> tuple[list[Any], Any]:
    """Everything that a short run finds, and its step. Size 0: no packs; None: "auto"."""
    model, x = model_and_samples()
    marks: list[str] = []
    step, batches = packed.made(model, x, size, task=task)
    step.own_block.graphs, step.own_block._mark = graphs, marks.append
    step.audit = audit_of(model) if audited else None
    found: list[Any] = []
    for batch in batches.starting_at(0):
        result = step(batch)
        assert result.norms is not None
        found += [result.losses.tolist(), float(result.norm), result.norms.tolist()]
        found += [view.tolist() for view in step.gradient_views]
    return found + [tensor.tolist() for tensor in model.state_dict().values()], step


@pytest.mark.parametrize("audited", [False, True])
def test_packs_and_graphs_change_no_bit(audited: bool) -> None:
    """With an audit, each way also tells it what was added of the audited micro-batch."""
    expected, _ = run(0)
    assert run(0, audited=audited)[0] == expected
    found, step = run(4, audited=audited)
    assert found == expected
    assert step.own_block.packs.packed == 3 * 8, "three of the full steps; the first one and the small one are trials"
    for size, shapes in ((0, {("one",)}), (4, {("pack", 4)})):
        graphs = WithoutGraphs()
        found, _ = run(size, graphs, audited)
        assert found == expected
        assert graphs.steps == packed.STEPS
        assert shapes <= graphs.shapes


def test_a_pack_of_one_is_computed_alone() -> None:
    expected, _ = run(0)
    found, step = run(1)
    assert found == expected
    assert step.own_block.packs.packed == 0


@pytest.mark.parametrize("wrong", ["loss", "statistics", "gradients"])
def test_a_pack_with_other_bits_in_its_trial_is_not_used(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """The trial compares with hashes of what was computed singly."""
    expected, _ = run(0)
    compute = Packs.compute

    class Off:
        def __init__(self, sink: Any) -> None:
            self.sink = sink

        def take(self, place: int, rows: Tensor, present: Any) -> None:
            self.sink.take(place, rows + 1e-3, present)

    def other(self: Packs, batch: Any, part: Any, scale: Tensor, sink: Any, *rest: Any) -> Any:
        packs = compute(self, batch, part, scale, Off(sink) if wrong == "gradients" else sink, *rest)
        off = {"loss": {"losses": packs.losses + 1}, "statistics": {"statistics": packs.statistics + 1}}
        return packs._replace(**off.get(wrong, {}))

    monkeypatch.setattr(Packs, "compute", other)
    found, step = run(4)
    assert found == expected
    assert step.own_block.packs.packed == 0
    reasons = {why.partition(" in packs of ")[0] for why in step.own_block.packs.refusals().values()}
    assert reasons == {{"loss": "another loss"}.get(wrong, f"other {wrong}")}


@pytest.mark.parametrize(("size", "number"), [(0, 8), (4, 2)])
def test_each_micro_batch_and_each_pack_marks_its_end(size: int, number: int) -> None:
    step, batches = packed.made(*model_and_samples(), size)
    step(batches.at(0))  # a trial
    marks: list[str] = []
    step.own_block._mark = marks.append
    step(batches.at(1))
    assert marks == ["compute"] * number


def test_steps_are_timed_to_find_the_fastest_size() -> None:
    """With "auto": three of the full steps have been timed with single micro-batches."""
    expected, _ = run(0)
    found, step = run(None)
    assert found == expected
    assert len(step.own_block.packs._choice._times[1]) == 3


class FailsLater(packed.Task):
    """Its forward raises in a pack, from the third step on."""

    def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Any) -> Tensor:
        if progress.step >= 2 and len(batch["x"]) > packed.m:
            raise ValueError("too many samples")
        return model(batch["x"])


def test_a_pack_that_fails_is_computed_one_micro_batch_at_a_time() -> None:
    """The shape has no packs from then on."""
    expected, _ = run(0, task=FailsLater())
    found, step = run(4, task=FailsLater())
    assert found == expected
    assert step.own_block.packs.packed == 8
    (reason,) = set(step.own_block.packs.refusals().values())
    assert "too many samples" in reason


@pytest.mark.parametrize("once", [False, True])
def test_a_pack_that_refuses_later_is_computed_one_micro_batch_at_a_time(
    monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    """For good, or only in the step whose values do not allow it."""
    expected, _ = run(0)
    compute = Packs.compute

    def refuses(self: Packs, batch: Any, *rest: Any) -> Any:
        if batch.step == 3:
            raise RefusedError("not these values", once=once)
        return compute(self, batch, *rest)

    monkeypatch.setattr(Packs, "compute", refuses)
    found, step = run(4)
    assert found == expected
    assert step.own_block.packs.packed == (2 if once else 1) * 8
    assert bool(step.own_block.packs.refusals()) != once


# The second of two ranks, whose block does not begin with micro-batch 0


class Part:
    """Rank 1 of 2: what it adds in one step, without any exchange. What is sent is noted by the latest `Part`."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, size: int = 0, bucket_bytes: int | None = None, task: Any = None
    ) -> None:
        self.model, x = model_and_samples()
        self.sent: list[int] = []
        self.pieces: list[list[float]] = []

        def begin_gather(out: Tensor, piece: Tensor, tag: int = 0) -> list[Any]:
            self.sent.append(self.step._sum.left)  # how many of its micro-batches were not complete then
            self.pieces.append(piece.tolist())
            return []

        made_step = packed.ExactStep

        def on_rank_1(*arguments: Any, **options: Any) -> Any:
            return made_step(*arguments, **options | {"ranks": Ranks(1, 2), "bucket_bytes": bucket_bytes})

        with monkeypatch.context() as patch:
            patch.setattr(packed, "ExactStep", on_rank_1)
            self.step, self.batches = packed.made(self.model, x, size, task=task)
        monkeypatch.setattr(early_exchange, "begin_gather", begin_gather)

    def add(self, number: int) -> list[list[float]]:
        """The nodes and the records of the rank after its block of a full step."""
        batch, step = self.batches.at(number), self.step
        block = step._sum.start(8)
        assert block == range(4, 8)
        step._scale.fill_(1 / batch.count)
        if step._early is not None:
            step._early.begin(8)
        step.statistics.begin()
        try:
            step.own_block.add(batch, block, None)
        finally:
            step.statistics.settle()
        nodes = [node[: step._sum.numel].tolist() for node in step._sum.whole_nodes()]
        return [*nodes, step._sum.head.tolist()]


@pytest.mark.parametrize("size", [0, 2, 4])
def test_records_of_a_later_block_begin_with_its_own_first_micro_batch(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    plain, other = Part(monkeypatch), Part(monkeypatch, size)
    one_rank, batches = packed.made(*model_and_samples(), 0)
    record = 1 + one_rank.statistics.size + 1 + 1  # loss, statistics, norm, flag
    losses = one_rank(batches.at(0)).losses[4:].tolist()
    assert plain.add(0)[-1][: 4 * record : record] == losses
    assert other.add(0)[-1][: 4 * record : record] == losses
    assert other.add(1) == plain.add(1)


@pytest.mark.parametrize("size", [0, 2, 4])
@pytest.mark.parametrize("graphs", [False, True])
def test_buckets_are_sent_under_the_last_backward_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, size: int, graphs: bool
) -> None:
    plain, early = Part(monkeypatch), Part(monkeypatch, size, bucket_bytes=64)
    early.step.own_block.graphs = WithoutGraphs() if graphs else None
    for number in (0, 1):
        early.sent.clear()
        assert early.add(number) == plain.add(number)
        # In a trial nothing is sent before the end.
        last = max(1, size)
        assert early.sent == [last] * len(early.sent)
        assert bool(early.sent) == (size == 0 or number > 0)


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ValueError("mine"), True),
        (RefusedError("mine"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), False),
    ],
)
def test_a_pack_that_fails_after_something_was_sent(
    monkeypatch: pytest.MonkeyPatch, error: Exception, ends: bool
) -> None:
    """What was sent may be wrong, so the run ends. Where only memory ran out it is right, and is not sent again."""
    compute = Packs.compute
    plain = Part(monkeypatch, 4, bucket_bytes=64)
    plain.add(0)  # a trial: nothing is sent
    *_, records = plain.add(1)
    early = Part(monkeypatch, 4, bucket_bytes=64)
    early.add(0)

    def fails(self: Packs, *arguments: Any) -> Any:
        compute(self, *arguments)
        assert early.sent
        raise error

    monkeypatch.setattr(Packs, "compute", fails)
    if ends:
        with pytest.raises(TrainerError, match=r"could not be computed .*parts of its gradient had been sent"):
            early.add(1)
    else:
        *_, found = early.add(1)
        assert found == records
        assert early.pieces == plain.pieces
        assert early.step.own_block.packs is not None
        assert early.step.own_block.packs.summary()["limited_by_memory_to"] == 2


class InnerBackward(torch.autograd.Function):
    """Its backward computes the gradient of a parameter that the loss does not use."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, model: Model) -> Tensor:
        ctx.model = model
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            torch.autograd.grad(ctx.model.spare.sum(), ctx.model.spare)
        return grad, None


class UsesInnerBackward(packed.Task):
    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return InnerBackward.apply(super().forward(model, batch), model)  # type: ignore[no-any-return]


def test_a_gradient_from_a_backward_of_the_tasks_own_is_not_sent_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    early = Part(monkeypatch, bucket_bytes=64, task=UsesInnerBackward())
    with pytest.raises(TrainerError, match=r"inside of a backward of the task's own[\s\S]*exchange_bucket_mib=null"):
        early.add(0)


def test_draws_of_another_thread_are_noticed_if_the_task_draws() -> None:
    """In its first micro-batch the block finds out that the model has dropout."""
    step, batches = packed.made(*model_and_samples(), 0)
    exchange: Any = step._exchange

    def disturbed(leaves: int) -> Any:
        torch.rand(1)  # as another thread would
        return exchange(leaves)

    step._exchange = disturbed  # type: ignore[assignment]
    with pytest.raises(RanksDifferError, match="Another thread of this process draws"):
        step(batches.at(0))


# What is computed again for the audit


@pytest.mark.parametrize("number", [0, 2])  # a full step, and an epoch's last
def test_losses_and_norms_are_those_of_the_micro_batches_in_order(number: int) -> None:
    step, parts = made(measures_norms=True)
    batch = parts["batches"].at(number)
    losses, norms = [], []
    for start, stop in batch.bounds:
        chosen = {name: array[batch.indices[start:stop]] for name, array in parts["split"].arrays.items()}
        loss, _ = parts["task"].loss(parts["task"].forward(parts["model"], chosen), chosen)
        gradients = torch.autograd.grad(loss / batch.count, list(parts["model"].parameters()))
        losses.append(float(loss))
        norms.append(math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients)))
    result = step(batch)
    assert result.losses.tolist() == pytest.approx(losses, rel=1e-6)
    assert result.norms is not None
    assert result.norms.tolist() == pytest.approx(norms, rel=1e-5)


def test_a_step_that_computes_alike_passes_its_audit() -> None:
    """With statistics, and whichever micro-batch is chosen."""
    torch.manual_seed(5)
    model = Partly()
    step, parts = made(copy.deepcopy(model))
    step.audit = Audit(Ranks(), ["here"], ["w"] * 7, every_steps=1, total_steps=9, seed=0, alike=True)
    plain, others = made(model)
    chosen = set()
    for number in range(9):
        step(parts["batches"].at(number))
        plain(others["batches"].at(number))
        chosen.add(step.audit.own)
        assert all(torch.equal(a, b) for a, b in zip(parts["model"].buffers(), others["model"].buffers()))
    assert all(torch.equal(a, b) for a, b in zip(copies(parts["model"]), copies(others["model"])))
    assert chosen == {0, 1, 2}


def test_what_cannot_be_computed_again_is_no_traceback() -> None:
    """A list in a model that grows with each forward, say, and in a pack gets something of another shape."""
    step, parts = made()
    step.audit = Audit(Ranks(), ["here"], ["w"] * 7, every_steps=2, total_steps=9, seed=0, alike=True)
    step(parts["batches"].at(0))
    before = copies(parts["model"])

    def fail(*_: Any) -> Any:
        raise ValueError("4 things instead of 3")

    step.micro_batches.compute = fail  # type: ignore[method-assign]
    with pytest.raises(
        RanksDifferError, match=r"could not compute micro-batch \d again \(ValueError: 4 things instead"
    ):
        step(parts["batches"].at(1))
    assert all(torch.equal(a, b) for a, b in zip(before, copies(parts["model"])))


@pytest.mark.parametrize("error", [UserError("a message of its own"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_an_error_that_explains_itself_is_not_taken_for_kept_state(error: Exception) -> None:
    step, parts = made()
    step.audit = Audit(Ranks(), ["here"], ["w"] * 4, every_steps=1, total_steps=9, seed=0, alike=True)

    def fail(*_: Any) -> Any:
        raise error

    step.micro_batches.compute = fail  # type: ignore[method-assign]
    with pytest.raises(type(error), match=str(error)):
        step(parts["batches"].at(0))


def test_an_audit_compares_statistics_too() -> None:
    class Drifts(nn.BatchNorm1d):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.calls += 1
            self.running_mean.data.mul_(1.0 + self.calls)
            return y

    model = nn.Sequential(nn.Linear(5, 4), Drifts(4), nn.Linear(4, 1))
    step, parts = made(model)
    step.audit = Audit(Ranks(), ["here"], ["w"] * 6, every_steps=1, total_steps=9, seed=0, alike=True)
    with pytest.raises(RanksDifferError, match="first in BatchNorm's statistics"):
        step(parts["batches"].at(0))


class NoPacks:
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
        (NoPacks(known=False), []),
        (NoPacks(known=None), [("try out", [0, 1], 2)]),
        (NoPacks(error=RefusedError("depends on values")), [("refuse", [0, 1], "depends on values")]),
        (NoPacks(error=RefusedError("new", untried=True), may_try=True), [("try out", [0, 1], 2)]),
        (NoPacks(error=RefusedError("new", untried=True)), [("refuse", [0, 1], "new")]),
        (NoPacks(error=RefusedError("values"), may_try=True), [("refuse", [0, 1], "values")]),
        (NoPacks(error=torch.OutOfMemoryError("CUDA out of memory")), [("shrink", 2)]),
        (NoPacks(error=IndexError("mine")), [("refuse", [0, 1], "mine")]),
    ],
    ids=["refused", "unknown", "values", "new", "new, too late", "no new ones", "memory", "an error of the task"],
)
def test_what_is_no_pack_is_computed_singly(packs: NoPacks, told: list[Any]) -> None:
    model = Partly()
    step, parts = made(copy.deepcopy(model))
    plain, others = made(model)
    step.own_block.packs = packs  # type: ignore[assignment]
    result, expected = step(parts["batches"].at(0)), plain(others["batches"].at(0))
    assert result.losses.tolist() == expected.losses.tolist()
    assert all(torch.equal(a, b) for a, b in zip(copies(parts["model"]), copies(others["model"])))
    assert packs.told == [*told, "end"]
    assert packs.packed == 0
