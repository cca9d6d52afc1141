"""How packs are chosen, tried and given up."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact.packs.packed import SAMPLES, InOneCall, Task, dense, floats, made, trained
from tests.exact.packs.pieces import CPU
from trainer.exact.batch_norm import RunningStatistics
from trainer.exact.checks.hashes import hash64
from trainer.exact.micro_batches import GlobalBatch
from trainer.exact.packs import packs as packs_module
from trainer.exact.packs.findings import ALONE
from trainer.exact.packs.leaves import Kept, Leaves
from trainer.exact.packs.pack import Pack
from trainer.exact.packs.packs import Packs
from trainer.exact.packs.streams import Streams
from trainer.exact.packs.trace import Trace
from trainer.exact.packs.verdicts import Packed, RefusedError, Single, Verdict
from trainer.exact.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


def batch(step: int = 0, count: int = 8, longest: list[int] | None = None) -> GlobalBatch:
    """A global batch of micro-batches of two samples."""
    bounds = [(2 * j, 2 * j + 2) for j in range(count)]
    return GlobalBatch(Progress(step, 0, 99), torch.arange(2 * count), bounds, 2.0 * count, longest)


class Parts(nn.Module):
    """A model with modules in modules, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
        self.b = nn.Linear(1, 1, bias=False)
        self.own = nn.Parameter(torch.ones(1))


def packs_of(size: int | None = 4, model: nn.Module | None = None, in_one_call: bool = False, **options: Any) -> Packs:
    """Packs without a task: what would be computed is never asked for."""
    model = nn.Linear(1, 1) if model is None else model
    micro_batches: Any = SimpleNamespace(gives_sample_losses=in_one_call, watch=None)
    return Packs(micro_batches, list(model.parameters()), model, RunningStatistics(model), CPU, size, **options)


def key(size: int, longest: int = 0) -> tuple[int, int, int]:
    return (size, 2, longest)


# How many


def test_a_number_is_the_size() -> None:
    packs = packs_of(4)
    assert packs.begin(batch(), range(8)) == 4 and packs.size == 4
    packs.end()
    assert packs_of(None).size == 1


@pytest.mark.parametrize(("steps", "looks"), [(59, False), (60, True)])
def test_only_a_run_that_is_long_enough_looks_for_the_fastest_size(steps: int, looks: bool) -> None:
    assert (packs_of(None, steps=steps)._choice is not None) == looks
    assert packs_of(4, steps=steps)._choice is None


class Chosen:
    """Stands for a choice: always takes 3."""

    speed_up: float | None = None

    def __init__(self) -> None:
        self.begun: list[tuple[Any, ...]] = []
        self.ended: list[bool] = []

    def begin(self, *arguments: Any) -> int:
        self.begun.append(arguments)
        return 3

    def end(self, tried: bool) -> None:
        self.ended.append(tried)


def chosen(**options: Any) -> tuple[Packs, Chosen]:
    packs, choice = packs_of(None, **options), Chosen()
    packs._choice = choice  # type: ignore[assignment]
    return packs, choice


def test_the_choice_is_told_the_work_and_what_will_not_do() -> None:
    packs, choice = chosen()
    assert packs.begin(batch(), range(2, 5)) == 3
    packs._verdicts = {key(2): Verdict("no"), key(4): Verdict("no"), key(4, 5): Verdict(None), key(8): Verdict(None)}
    packs.shrink(8)
    packs.begin(batch(longest=[5, 1, 0, 7, 2, 1, 1, 1]), range(1, 4))
    assert choice.begun == [(3, 6, None, set()), (3, 2 * (1 + 1 + 7), 4, {2})]


def test_a_step_with_a_trial_is_not_timed() -> None:
    packs, choice = chosen()
    packs.begin(batch(), range(8))
    packs.end()
    packs.begin(batch(1), range(8))
    scripted(packs).try_out()
    packs.end()
    packs.begin(batch(2), range(8))
    packs.end()
    assert choice.ended == [False, True, False]


@pytest.mark.parametrize("part_of_the_model", [True, False])
def test_where_anything_is_compiled_there_are_no_packs(
    part_of_the_model: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = [True, False]
    monkeypatch.setattr(packs_module, "has_compiled_part", lambda model: part_of_the_model)
    monkeypatch.setattr(
        packs_module, "compiler_was_at_work", lambda: at_work.pop(0) if not part_of_the_model else False
    )
    packs, choice = chosen()
    for _ in range(2):
        assert packs.begin(batch(), range(8)) == 1 and packs.size == 1
        packs.end()
    assert choice.begun == choice.ended == []
    assert packs.summary()["refused"] == {"all": "a part of the model is compiled"}


@pytest.mark.parametrize(("size", "limit"), [(8, 4), (3, 1), (2, 1), (1, 1)])
def test_too_little_memory_halves_packs(size: int, limit: int) -> None:
    packs = packs_of(size)
    packs.shrink(size)
    assert packs.begin(batch(), range(8)) == limit
    assert packs.summary()["limited_by_memory_to"] == limit
    assert packs.notes == [
        f"memory ran out in a pack of {size} micro-batches. From now on packs have {limit} at most: this changes the "
        "speed, and no bit."
    ]
    small = packs_of(2)
    small.shrink(8)
    assert small.begin(batch(), range(8)) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpus_memory_is_given_back(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was reserved for a large pack is of no use to smaller ones."""
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    packs = packs_of(4)
    packs._device = torch.device(device)
    packs.shrink(4)
    assert freed == [True] * (device == "cuda")


# Which micro-batches share one


@pytest.mark.parametrize("more", [0, 1])
def test_gradients_wait_for_their_neighbours_up_to_256_mib(more: int) -> None:
    packs, texts = packs_of(2), batch(count=4, longest=[5, 6, 5, 6])
    packs.begin(texts, range(4))
    packs._bytes = (64 << 20) + more
    expected = [[0], [1], [2], [3]] if more else [[0, 2], [1, 3]]
    assert [list(part) for part in packs.parts(texts, range(4))] == expected


@pytest.mark.parametrize("more", [0, 1])
def test_all_numbers_of_a_gradient_take_four_bytes(more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs_module, "WAITING_BYTES", 4 * 4 * 5 - more)
    packs, texts = packs_of(2, Parts()), batch(count=4, longest=[5, 6, 5, 6])
    packs.begin(texts, range(4))
    assert len(list(packs.parts(texts, range(4)))) == (4 if more else 2)


# What is known of a shape


@pytest.mark.parametrize(
    ("verdict", "known"),
    [
        (None, None),
        (Verdict(None, True, {1: 2}, 3), None),
        (Verdict(None, True, {1: 3}, 3), True),
        (Verdict(None, True, {1: 3, 2: 1}, 3), True),
        (Verdict(None, True, {1: 3}, 5), None),  # in this very step
        (Verdict("no", True, {1: 3}, 3), False),
        (Verdict("no", True, {1: 1}, 5), False),
    ],
)
def test_a_shape_may_be_a_pack_after_trials_in_three_steps(verdict: Verdict | None, known: bool | None) -> None:
    packs = packs_of(4)
    if verdict is not None:
        packs._verdicts[key(4)] = verdict
    assert packs.known(batch(5), range(4)) is known
    assert packs.known(batch(5), range(2)) is None, "a size that has not been met"


def test_a_verdict_without_a_trial_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs_module, "TRIALS", 1)
    packs = packs_of(4)
    packs._verdicts[key(4)] = Verdict(None)
    assert packs.known(batch(5), range(4)) is None


class Clock:
    """Stands for the clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(packs_module.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize(
    ("shapes", "trial_s", "after_s", "more"),
    [
        (7, 100.0, 100.0, True),
        (8, 100.0, 100.0, False),
        (8, 0.0, 0.0, True),
        (8, 5.0, 100.0, True),
        (8, 5.1, 100.0, False),
        (8, 20.0, 100.0, False),
    ],
)
def test_with_auto_more_than_eight_shapes_are_tried_while_there_is_time(
    shapes: int, trial_s: float, after_s: float, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    packs, _ = chosen()
    packs._verdicts = {key(2, longest): Verdict(None) for longest in range(shapes)}

    def compare(*arguments: Any) -> None:
        clock.now += trial_s

    packs._compare = compare  # type: ignore[method-assign]
    packs.try_out(batch(), range(2), torch.ones(()), lambda part: [])
    clock.now = 1000.0 + after_s
    assert packs.may_try_more() == more
    assert packs.known(batch(), range(4)) is (None if more else False)
    packs._choice = None
    assert packs.may_try_more(), "where the size is given, all shapes are tried"


def test_only_the_comparison_counts_as_time_of_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single micro-batches have to be computed in any case."""
    clock = Clock(monkeypatch)
    packs, _ = chosen()
    packs._verdicts = {key(2, longest): Verdict(None) for longest in range(8)}
    packs._compare = lambda *arguments: None  # type: ignore[method-assign]

    def singly(part: Sequence[int]) -> list[Single]:
        clock.now += 100.0
        return []

    packs.try_out(batch(), range(2), torch.ones(()), singly)
    assert packs.may_try_more()


# What is refused, and what is told of it


def test_a_pack_that_could_not_be_computed_is_not_tried_again_unless_that_was_chance() -> None:
    packs = packs_of(4)
    packs._verdicts = {key(size): Verdict(None, True, {1: 3}) for size in (2, 4)}
    packs.refuse(batch(), range(4), RefusedError("by chance", once=True))
    assert packs.refusals() == {}
    packs.refuse(batch(), range(4), RefusedError("never"))
    packs.refuse(batch(), range(2), ValueError("odd"))
    assert packs.refusals() == {4: "never", 2: "ValueError: odd"}
    assert packs.summary()["refused"] == {"2": "ValueError: odd", "4": "never"}


def test_the_summary_of_a_run() -> None:
    packs = packs_of(4)
    assert packs.summary() == {"size": 4, "share": 0.0}
    for _ in range(2):
        packs.begin(batch(count=7), range(7))
    packs.packed += 2
    assert packs.summary() == {"size": 4, "share": 0.143}
    packs.packed += 12
    assert packs.summary()["share"] == 1.0


def test_the_summary_of_a_run_that_looks_for_the_fastest_size() -> None:
    packs, choice = chosen()
    assert packs.summary() == {"size": 1, "share": 0.0}
    choice.speed_up = 1.23456
    assert packs.summary()["speed_up"] == 1.235


def test_a_single_micro_batch_has_a_share() -> None:
    packs = packs_of(4)
    packs.begin(batch(count=1), range(1))
    packs.packed += 1
    assert packs.summary()["share"] == 1.0


@pytest.mark.parametrize(
    ("verdicts", "told"),
    [
        ([], True),
        ([Verdict(None, True, {1: 1})], False),
        ([Verdict(None)], True),
        ([Verdict(None, True, {1: 1}), Verdict(None)], False),
    ],
)
def test_trials_that_never_come_to_an_end_are_told(verdicts: list[Verdict], told: bool) -> None:
    packs = packs_of(4)
    packs._verdicts = {key(2, longest): verdict for longest, verdict in enumerate(verdicts)}
    assert "refused" not in packs.summary()
    packs._postponed = {key(4): 1, key(2): 3}
    found = packs.summary().get("refused")
    assert found == ({"2": "no trial came to its end", "4": "no trial came to its end"} if told else None)


def test_what_is_computed_one_at_a_time_is_told() -> None:
    packs = packs_of(4, nn.Sequential(nn.GRU(1, 1), nn.Linear(1, 1)), in_one_call=True)
    assert packs.summary()["one_at_a_time"] == ["0"], "a recurrent layer"
    packs._findings.sites = {("linear", 4): ALONE, ("conv1d", 4): 0}
    packs._losses_apart = True
    assert packs.summary()["one_at_a_time"] == ["0", "linear", "loss()"]
    assert "one_at_a_time" not in packs_of(4).summary(), "the task has nothing but loss()"


# Trials, with what a pack finds written down


Outcome = Callable[[], Packed]


class Scripted:
    """Makes trials of packs of micro-batches 0 to g - 1.

    Args:
        packs: whose `compute` it takes the place of.
        outcomes: one for each time that a pack is computed; the last one again and again.
        calls: what each micro-batch alone calls.
        random: whether each of them draws.
    """

    def __init__(
        self, packs: Packs, outcomes: Sequence[Outcome], calls: Sequence[Any] | None, random: Sequence[bool], g: int
    ) -> None:
        self.packs, self.g, self.random = packs, g, random
        self.outcomes = itertools.chain(outcomes, itertools.repeat(outcomes[-1]))
        self.calls = [torch.tanh] * g if calls is None else calls
        self.traces: list[Sequence[Trace | None]] = []
        packs.compute = self._compute  # type: ignore[method-assign, assignment]

    def _compute(self, batch: Any, part: Any, scale: Tensor, sink: Any, traces: Any = ()) -> Packed:
        self.traces.append(list(traces))
        return next(self.outcomes)()

    def _singly(self, part: Sequence[int]) -> list[Single]:
        watch = self.packs._micro_batches.watch
        assert watch is not None
        for k in part:
            x = torch.ones(2, 3)
            with watch({"x": x}) as trace:
                if self.calls[k] is not None:
                    self.calls[k](x)
                trace.end_of_forward()
        hashed = hash64([torch.ones(())])
        return [Single(hashed, None, [None] * len(self.packs._trained), drew) for drew in self.random]

    def try_out(self, step: int = 0) -> int:
        """Makes a trial. Returns how often the pack was computed."""
        before = len(self.traces)
        self.packs.try_out(batch(step), range(self.g), torch.ones(()), self._singly)
        assert self.packs._micro_batches.watch is None
        return len(self.traces) - before

    @property
    def verdict(self) -> Verdict | None:
        return self.packs._verdicts.get(key(self.g))


def same(form: int = 7, g: int = 2) -> Outcome:
    """The pack has the bits of single micro-batches."""
    return lambda: Packed(torch.ones(g), torch.empty(g, 0), form)


def differs() -> Packed:
    """Its losses are others."""
    return Packed(torch.zeros(2), torch.empty(2, 0), 7)


def raises(error: Exception) -> Outcome:
    def fails() -> Packed:
        raise error

    return fails


def scripted(
    packs: Packs | None = None,
    *outcomes: Outcome,
    calls: Sequence[Any] | None = None,
    random: Sequence[bool] | None = None,
    g: int = 2,
) -> Scripted:
    packs = packs_of(4) if packs is None else packs
    return Scripted(packs, outcomes or (same(g=g),), calls, [False] * g if random is None else random, g)


def finding(packs: Packs, then: Outcome) -> Outcome:
    """Finds a layer that has to be computed one micro-batch at a time."""

    def finds() -> Packed:
        packs._findings.sites["layer", len(packs._findings.sites)] = ALONE
        return then()

    return finds


def test_a_trial_in_each_of_three_steps_is_enough() -> None:
    script = scripted()
    for step in range(3):
        assert script.packs.known(batch(step), range(2)) is None
        for _ in range(2):  # two parts of a step have this shape
            assert script.try_out(step) == 1
    assert script.verdict == Verdict(None, False, {7: 3}, 2)
    assert script.packs.known(batch(3), range(2)) is True


def test_each_sequence_of_functions_is_counted_by_itself() -> None:
    script = scripted(None, same(7), same(8), same(7), same(8))
    for step in (0, 0, 1, 2):
        script.try_out(step)
    assert script.verdict == Verdict(None, False, {7: 2, 8: 2}, 2)


@pytest.mark.parametrize("forms", [16, 17])
def test_a_task_may_call_sixteen_sequences_of_functions(forms: int) -> None:
    script = scripted(None, *[same(form) for form in range(forms)])
    for step in range(forms):
        script.try_out(step)
    refusal = "other functions are called in nearly every step" if forms > 16 else None
    assert script.verdict is not None and script.verdict.refusal == refusal


@pytest.mark.parametrize(("random", "expected"), [((False, False), False), ((False, True), True), ((True, True), True)])
def test_whether_micro_batches_draw_is_remembered(random: tuple[bool, bool], expected: bool) -> None:
    script = scripted(random=random)
    script.try_out(0)
    assert script.verdict is not None and script.verdict.random == expected
    script.random = [False, False]
    script.try_out(1)
    assert script.verdict.random == expected


def test_a_difference_refuses() -> None:
    script = scripted(None, differs)
    assert script.try_out(3) == 1
    assert script.verdict == Verdict("another loss in packs of 2", False, {}, 3)
    assert script.packs.known(batch(4), range(2)) is False


def test_a_difference_of_a_layer_is_tried_again_without_its_rule() -> None:
    packs = packs_of(4)
    script = scripted(packs, finding(packs, differs), same())
    assert script.try_out() == 2 and script.verdict == Verdict(None, False, {7: 1}, 0)


def test_a_refusal_of_a_layer_is_tried_again_without_its_rule() -> None:
    packs = packs_of(4)
    script = scripted(packs, finding(packs, raises(RefusedError("no"))), same())
    assert script.try_out() == 2 and script.verdict == Verdict(None, False, {7: 1}, 0)


@pytest.mark.parametrize("then", [differs, raises(RefusedError("no"))])
def test_a_trial_comes_to_an_end(then: Outcome) -> None:
    """After four tries more than the model has trained parameters."""
    packs = packs_of(4)
    script = scripted(packs, finding(packs, then))
    assert script.try_out() == len(packs._trained) + 4
    assert script.verdict is not None and script.verdict.refusal is not None


@pytest.mark.parametrize("first", [differs, raises(RefusedError("no")), raises(ValueError("odd"))])
def test_losses_in_one_call_are_given_up_first(first: Outcome) -> None:
    packs = packs_of(4, in_one_call=True)
    script = scripted(packs, first, same())
    assert script.try_out() == 2 and script.verdict == Verdict(None, False, {7: 1}, 0)
    assert packs.summary()["one_at_a_time"] == ["loss()"]
    again = scripted(packs, first, same())
    assert again.try_out(1) == 1 and again.verdict is not None and again.verdict.refusal is not None


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (differs, "another loss in packs of 2"),
        (raises(RefusedError("no")), "no"),
        (raises(ValueError("odd")), "ValueError: odd"),
    ],
)
@pytest.mark.parametrize("in_one_call", [True, False])
def test_what_does_not_go_away_refuses(outcome: Outcome, why: str, in_one_call: bool) -> None:
    script = scripted(packs_of(4, in_one_call=in_one_call), outcome)
    assert script.try_out() == 1 + in_one_call
    assert script.packs.refusals() == {2: why}


def test_too_little_memory_refuses_and_makes_packs_smaller() -> None:
    script = scripted(packs_of(4, in_one_call=True), raises(torch.OutOfMemoryError("CUDA")), g=4)
    assert script.try_out() == 1
    assert script.packs.refusals() == {4: "there is not enough memory"}
    assert script.packs.begin(batch(), range(8)) == 2


@pytest.mark.parametrize("outcome", [same(), differs])
def test_other_ends_of_a_trial_leave_the_size_alone(outcome: Outcome) -> None:
    script = scripted(packs_of(4), outcome)
    script.try_out()
    assert script.packs.notes == [] and script.packs.begin(batch(), range(8)) == 4


# Refusals by chance


def test_a_refusal_by_chance_leaves_the_verdict_open() -> None:
    script = scripted(packs_of(4, in_one_call=True), raises(RefusedError("by chance", once=True)), same())
    assert script.try_out() == 1 and script.verdict is None
    assert script.packs.summary()["refused"] == {"2": "no trial came to its end"}
    script.try_out(1)
    known = script.verdict
    assert known == Verdict(None, False, {7: 1}, 1)
    script.outcomes = iter([raises(RefusedError("by chance", once=True))])
    script.try_out(2)
    assert script.verdict is known
    assert "one_at_a_time" not in script.packs.summary(), "the losses have nothing to do with it"


def test_twenty_trials_may_end_by_chance() -> None:
    script = scripted(packs_of(4, in_one_call=True), raises(RefusedError("by chance", once=True)))
    for step in range(20):
        assert script.try_out(step) == 1 and script.verdict is None
    assert script.try_out(20) == 1
    assert script.packs.refusals() == {2: "by chance"}


# What micro-batches call


def test_the_calls_of_each_micro_batch_are_given_to_the_pack() -> None:
    script = scripted(calls=[torch.tanh, torch.tanh])
    script.try_out()
    assert [[call.func for call in trace.calls] for trace in script.traces[0] if trace] == [[torch.tanh]] * 2


@pytest.mark.parametrize("odd", [0, 1, 2, 3])
def test_the_first_micro_batch_may_call_something_else(odd: int) -> None:
    """It makes what later ones find at hand."""
    script = scripted(calls=[torch.sin if k == odd else torch.tanh for k in range(4)], g=4)
    assert script.try_out() == (odd == 0)
    if odd == 0:
        assert [trace is None for trace in script.traces[0]] == [True, False, False, False]
        assert script.verdict == Verdict(None, False, {7: 1}, 0)
    else:
        assert script.verdict is None, "by chance"


def test_of_three_the_first_may_call_something_else() -> None:
    script = scripted(calls=[torch.sin, torch.tanh, torch.tanh], g=3)
    assert script.try_out() == 1 and script.verdict is not None


def test_of_two_the_first_may_not() -> None:
    script = scripted(calls=[torch.sin, torch.tanh])
    assert script.try_out() == 0 and script.verdict is None
    for step in range(20):
        script.try_out(step)
    assert script.packs.refusals() == {2: "micro-batches call different functions"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_calls_that_cannot_be_noted_refuse() -> None:
    """A nested tensor has no shape."""

    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]) + 1.0

    script = scripted(calls=[nested, nested])
    assert script.try_out() == 0
    assert script.packs.refusals()[2].startswith("add: ")


def test_parameters_and_the_models_other_tensors_are_known() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("shift", torch.ones(3))
    micro_batches: Any = SimpleNamespace(gives_sample_losses=False, watch=None)
    packs = Packs(micro_batches, [model.weight], model, RunningStatistics(model), CPU, 4)  # its bias is frozen
    outside = torch.ones(3)

    def calls(x: Tensor) -> Tensor:
        return torch.add(torch.sub(torch.mul(x, model.weight[:2]), model.bias), model.shift) + outside

    script = scripted(packs, calls=[calls] * 2)
    script.try_out()
    given = [g for trace in script.traces[0] if trace for call in trace.calls for g in call.given]
    unknown = [g.outside for g in given if getattr(g, "outside", None) is not None]
    assert len(unknown) == 2 and all(tensor is outside for tensor in unknown)
    assert packs._constants == {id(model.bias), id(model.shift)}


# The module behind a refusal


@pytest.mark.parametrize(
    ("parameters", "apart"),
    [
        ((0,), "a.0"),
        ((0, 1), "a.0"),
        ((0, 1, 2), "a"),
        ((2, 2, -1), "a.1"),
        ((3,), "b"),
        ((0, 3), None),  # only the whole model has both
        ((0, 1, 2, 3), None),
        ((4,), None),
        ((-1,), None),
        ((), None),
    ],
)
def test_the_module_with_a_refusals_parameters_is_set_apart(parameters: tuple[int, ...], apart: str | None) -> None:
    model = Parts()
    order = [model.a[0].weight, model.a[0].bias, model.a[1].weight, model.b.weight, model.own]
    micro_batches: Any = SimpleNamespace(gives_sample_losses=False, watch=None)
    packs = Packs(micro_batches, order, model, RunningStatistics(model), CPU, 4)
    script = scripted(packs, raises(RefusedError("no", parameters)))
    assert script.try_out() == 1
    if apart is None:
        assert packs.refusals() == {2: "no"} and "one_at_a_time" not in packs.summary()
        return
    assert script.verdict is None, "single micro-batches are noted without it first"
    assert packs.summary()["one_at_a_time"] == [apart]
    assert [type(module) for module in packs._modules_apart()] == [type(model.get_submodule(apart))]
    script.try_out(1)
    assert packs.refusals() == {2: "no"}, "that was no help"


def test_a_refusal_by_chance_sets_nothing_apart() -> None:
    packs = packs_of(4, Parts())
    scripted(packs, raises(RefusedError("by chance", (0,), once=True))).try_out()
    assert "one_at_a_time" not in packs.summary()


# Whole runs

runs = pytest.mark.usefixtures("group_of_one", "early_packs")


@runs
def test_memory_that_runs_out_makes_packs_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = dense(), floats(3)
    expected, _ = trained(model, x, 0)
    compute, sizes = Packs.compute, []

    def limited(self: Packs, batch: Any, part: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append(len(part))
        if len(part) > 2 and batch.step > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return compute(self, batch, part, *arguments, **named)

    monkeypatch.setattr(Packs, "compute", limited)
    found, packs = trained(model, x, 8)
    assert found == expected
    assert packs is not None and packs.summary()["limited_by_memory_to"] == 2
    assert 8 in sizes
    assert len(packs.notes) == 2 and "memory ran out in a pack of 8 micro-batches" in packs.notes[0]


@runs
def test_memory_that_runs_out_in_a_trial_makes_packs_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = dense(), floats(3)
    expected, _ = trained(model, x, 0)
    compute = Packs.compute

    def limited(self: Packs, batch: Any, part: Any, *arguments: Any, **named: Any) -> Any:
        if len(part) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return compute(self, batch, part, *arguments, **named)

    monkeypatch.setattr(Packs, "compute", limited)
    found, packs = trained(model, x, 8)
    assert found == expected
    assert packs is not None and packs.summary()["limited_by_memory_to"] == 4
    assert packs.refusals() == {8: "there is not enough memory"}
    assert packs.size == 4


@runs
def test_the_fastest_size_is_looked_for_from_the_largest_down(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = dense(), floats(3)
    expected, _ = trained(model, x, 0)
    compute, sizes = Packs.compute, []

    def noted(self: Packs, batch: Any, part: Any, *arguments: Any, **named: Any) -> Any:
        sizes.append((batch.step, tuple(part)))
        return compute(self, batch, part, *arguments, **named)

    monkeypatch.setattr(Packs, "compute", noted)
    found, packs = trained(model, x, None)
    assert found == expected
    assert packs is not None and packs.refusals() == {}
    assert sizes[0] == (4, tuple(range(8))), "after three whole steps without packs"


class Words(nn.Module):
    """The mean of a text's words; word 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        there = (x > 0).float()[..., None]
        return self.out((self.table(x) * there).sum(1) / there.sum(1))


@runs
@pytest.mark.parametrize(("size", "anywhere"), [(2, True), (4, True), (8, True), (None, True), (8, False)])
def test_texts_of_equal_length_share_a_pack_wherever_they_lie(
    size: int | None, anywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 7, (SAMPLES,), generator=draw)
    x = torch.randint(1, 50, (SAMPLES, 6), generator=draw)
    x[torch.arange(6) >= lengths[:, None]] = 0
    model, parts, compute = Words(), [], Packs.compute

    def noted(self: Packs, batch: Any, part: Any, *arguments: Any, **named: Any) -> Any:
        assert len({batch.longest[j] for j in part}) == 1
        parts.append(tuple(part))
        return compute(self, batch, part, *arguments, **named)

    expected, _ = trained(model, x, 0, lengths=lengths)
    monkeypatch.setattr(Packs, "compute", noted)
    if not anywhere:
        monkeypatch.setattr(packs_module, "WAITING_BYTES", 8 * 4 * sum(p.numel() for p in model.parameters()) - 1)
    found, packs = trained(model, x, size, lengths=lengths)
    assert found == expected
    assert packs is not None and packs.refusals() == {}
    apart = [part for part in parts if part[-1] - part[0] >= len(part)]
    assert bool(apart) == anywhere, parts
    assert all(len(part) in (2, 4, 8) for part in apart)


@runs
def test_texts_of_many_lengths_are_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs_module, "FREE_SHAPES", 2)
    monkeypatch.setattr(packs_module, "TRIAL_SHARE", 0.0)
    draw = torch.Generator().manual_seed(4)
    lengths = torch.randint(2, 7, (SAMPLES,), generator=draw)
    model, x = Words(), torch.randint(1, 50, (SAMPLES, 6), generator=draw)
    expected, _ = trained(model, x, 0, lengths=lengths)
    found, packs = trained(model, x, None, lengths=lengths)
    assert found == expected
    assert packs is not None and len(packs._verdicts) == 2


@runs
def test_a_short_run_does_not_look_for_the_fastest_size() -> None:
    step, batches = made(dense(), floats(3), None)
    assert step.own_block.packs is not None
    old = step.own_block.packs
    packs = Packs(old._micro_batches, old._trained, old._model, old._statistics, old._device, None, steps=59)
    assert packs.begin(batches.at(0), range(8)) == 1


@runs
def test_losses_of_a_pack_are_computed_in_one_call() -> None:
    torch.manual_seed(0)
    model, x, calls = dense(), floats(3), []

    class Noted(InOneCall):
        def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            calls.append(len(outputs))
            return super().sample_losses(outputs, batch)

    expected, _ = trained(model, x, 0, task=Noted())
    assert set(calls) == {4}, "training takes it for single micro-batches, too"
    calls.clear()
    found, packs = trained(model, x, 8, task=Noted())
    assert found == expected
    assert packs is not None and packs.refusals() == {} and "one_at_a_time" not in packs.summary()
    assert calls.count(32) == 4 and calls.count(4) == 8 + 2, "the first step and the small one singly: they are trials"


@runs
def test_losses_that_cannot_be_computed_in_one_call_are_computed_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = dense(), floats(3)

    class OneAtATime(InOneCall):
        def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            if len(outputs) > 4:
                raise ValueError("not so many")
            return super().sample_losses(outputs, batch)

    expected, _ = trained(model, x, 0, task=OneAtATime())
    found, packs = trained(model, x, 8, task=OneAtATime())
    assert found == expected
    assert packs is not None and packs.refusals() == {} and packs.summary()["one_at_a_time"] == ["loss()"]


@runs
def test_trials_are_counted_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first step, weights may be 0 by design, and every part of it says the same."""
    monkeypatch.setattr(packs_module, "TRIALS", 3)
    torch.manual_seed(0)
    tried, try_out = [], Packs.try_out

    def noted(self: Packs, batch: Any, part: Any, *arguments: Any) -> None:
        tried.append((batch.step, part))
        try_out(self, batch, part, *arguments)

    monkeypatch.setattr(Packs, "try_out", noted)
    trained(dense(), floats(3), 4)
    assert tried[:5] == [
        (0, [0, 1, 2, 3]),
        (0, [4, 5, 6, 7]),
        (1, [0, 1, 2, 3]),
        (1, [4, 5, 6, 7]),
        (2, [0, 1]),
    ]


def _in_little_memory(answer: Any) -> None:
    """A short run with packs of 8, in a process that may take 150 MiB more than it has."""
    import resource

    torch.manual_seed(0)
    # 0.5 MiB a sample and layer, so that a micro-batch of 4 needs some 30 MiB and a pack of 8 some 240.
    model, x = nn.Sequential(nn.Conv1d(1, 1, 1), *(nn.Tanh() for _ in range(13))), floats(1, 1 << 17)
    expected, _ = trained(model, x, 0)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (has, hard))
    # What earlier tests left free in the heap is taken first, or the pack would fit into it.
    hoard = []
    with contextlib.suppress(RuntimeError):
        while True:
            hoard.append(torch.empty(1 << 17))
    resource.setrlimit(resource.RLIMIT_AS, (has + (150 << 20), hard))
    found, packs = trained(model, x, 8)
    assert packs is not None
    answer.send((found == expected, packs.summary(), packs.notes))


@runs
def test_a_process_with_little_memory_ends_with_the_same_bits() -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_in_little_memory, args=(there,))
    child.start()
    there.close()
    same, summary, notes = here.recv()
    child.join()
    assert same
    assert summary["limited_by_memory_to"] < 8
    assert "memory ran out in a pack of 8 micro-batches" in notes[0]


class Changes(Task):
    """From a step on, it calls another function: one that mixes samples, or does not."""

    def __init__(self, mixes: bool, first: int = 4, every: int = 1) -> None:
        self.mixes, self.first, self.every = mixes, first, every

    def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Any) -> Tensor:
        hidden = torch.tanh(model(batch["x"]) * (1 + progress.step))  # a number that changes is nothing new
        if progress.step >= self.first and progress.step % self.every == 0:
            hidden = hidden - hidden.mean(0) if self.mixes else hidden - hidden.mean(1, keepdim=True)
        return hidden


@runs
@pytest.mark.parametrize("mixes", [True, False])
def test_a_task_that_calls_another_function_from_some_step_on(mixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks new is compared anew, and samples may see one another within a micro-batch."""
    monkeypatch.setattr(packs_module, "TRIALS", 2)
    torch.manual_seed(0)
    tried: list[int] = []
    try_out = Packs.try_out
    monkeypatch.setattr(Packs, "try_out", lambda self, batch, *a: (tried.append(batch.step), try_out(self, batch, *a)))
    model, x = nn.Linear(3, 8), floats(3)
    expected, _ = trained(model, x, 0, task=Changes(mixes))
    found, packs = trained(model, x, 4, task=Changes(mixes))
    assert found == expected
    assert packs is not None
    assert packs.refusals() == {}
    assert {0, 1} <= set(tried) and 3 not in tried, "packs are used"


@runs
@pytest.mark.parametrize("features", [8, 16])
@pytest.mark.parametrize(
    "limits",
    [
        lambda h: h * (100 / h.norm()).clamp(max=1),
        lambda h: torch.where(h.amax(0) > 100, h / 2, h),
        lambda h: h - 1e-30 * h.mean(0, keepdim=True),
        lambda h: h + 1e-30 * (h @ h.t()) @ h,
        lambda h: h + 1e-30 * torch.einsum("if,jf->ij", h, h) @ h,
    ],
)
def test_samples_that_see_one_another_without_effect_so_far(limits: Any, features: int) -> None:
    """A trial would not show it, so such functions are called for one micro-batch at a time.

    Sixteen is also a pack's number of samples.
    """

    class Limited(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return limits(model(batch["x"]))

    torch.manual_seed(0)
    model, x = nn.Linear(3, features), floats(3)
    expected, _ = trained(model, x, 0, task=Limited())
    found, packs = trained(model, x, 4, task=Limited())
    assert found == expected
    assert packs is not None
    several = "einsum uses a tensor several times that others use as well"
    assert set(packs.refusals().values()) <= {several}


@runs
def test_a_task_that_calls_others_in_every_step_has_no_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs_module, "TRIALS", 1)
    monkeypatch.setattr(packs_module, "MOST_FORMS", 2)

    class Rolls(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Any) -> Tensor:
            return torch.roll(model(batch["x"]), progress.step % 7, 1)

    torch.manual_seed(0)
    model, x = nn.Linear(3, 8), floats(3)
    expected, _ = trained(model, x, 0, task=Rolls())
    found, packs = trained(model, x, 4, task=Rolls())
    assert found == expected
    assert packs is not None and packs.refusals() == {4: "other functions are called in nearly every step"}


@runs
def test_a_layer_that_is_used_twice_in_bfloat16() -> None:
    """Autocast casts its weight once, so the gradients of both uses are added in bfloat16, and then cast."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    torch.manual_seed(0)
    model, x = Twice(), floats(3)
    options = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}
    expected, _ = trained(model, x, 0, **options)
    found, packs = trained(model, x, 4, **options)
    assert found == expected
    assert packs is not None and packs.refusals() == {} and "one_at_a_time" not in packs.summary()


# A pack that is computed


def after_trials(model: nn.Module, task: Any = None) -> tuple[Packs, GlobalBatch]:
    """Packs of four that have been tried, and a batch of which they may be used."""
    step, batches = made(model, floats(3), 4, task=task)
    for number in range(2):
        step(batches.at(number))
    assert step.own_block.packs is not None
    return step.own_block.packs, batches.at(3)


def computed(packs: Packs, own: GlobalBatch) -> Kept:
    kept = Kept()
    packs._statistics.begin()
    try:
        packs.compute(own, range(4), torch.ones(()), kept)
    finally:
        packs._statistics.settle()
    return kept


class Layers(nn.Module):
    """A layer, what follows from a parameter, and a layer without packs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.memory = nn.Linear(3, 4), nn.GRU(4, 4, batch_first=True)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.first(x), 0.5)
        return torch.maximum(self.memory(h[:, None])[0][:, 0], self.scale.exp())


@runs
def test_a_pack_gives_each_parameter_its_gradients_and_lets_go_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    packs, own = after_trials(model := Layers())
    made_: dict[str, Any] = {}
    for name, kind in (("Pack", Pack), ("Leaves", Leaves), ("Streams", Streams)):

        def noted(*args: Any, name: str = name, kind: Any = kind, **kwargs: Any) -> Any:
            made_[name] = kind(*args, **kwargs)
            return made_[name]

        monkeypatch.setattr(packs_module, name, noted)
    ended: list[Any] = []
    monkeypatch.setattr(Streams, "end", lambda self: ended.append(self))
    taken = computed(packs, own).taken
    assert sorted(place for place, _, _ in taken) == list(range(len(list(model.parameters()))))
    pack, leaves = made_["Pack"], made_["Leaves"]
    assert pack.derived.inputs == [] and pack.shares.ends == {} and pack.shares._cuts == {}
    assert leaves._rows == {} and ended == [made_["Streams"]]
    with monkeypatch.context() as patched:
        patched.setattr(Leaves, "finish", lambda self: raises(RefusedError("no"))())
        with pytest.raises(RefusedError):
            computed(packs, own)
    assert made_["Pack"].derived.inputs == [] and made_["Leaves"]._rows == {} and len(ended) == 2


@runs
@pytest.mark.parametrize("number", [0, 1])
def test_a_hook_on_any_parameter_refuses(number: int) -> None:
    packs, own = after_trials(nn.Linear(3, 2))
    packs._trained[number].register_hook(lambda grad: grad)
    with pytest.raises(RefusedError, match=r"^a parameter's gradient has a hook, which would not be called$"):
        computed(packs, own)


@runs
@pytest.mark.parametrize("drew", [True, False, None])
def test_losses_have_random_numbers_only_where_a_trial_has_seen_some(
    drew: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs, own = after_trials(nn.Linear(3, 2))
    told: list[bool] = []
    pack_losses = packs._micro_batches.pack_losses

    def noted(*args: Any, random: bool, apart: bool) -> Tensor:
        told.append(random)
        return pack_losses(*args, random=random, apart=apart)

    monkeypatch.setattr(packs._micro_batches, "pack_losses", noted)
    (shape,) = (k for k in packs._verdicts if k[0] == 4)
    if drew is None:
        del packs._verdicts[shape]
    else:
        packs._verdicts[shape].random = drew
    with contextlib.suppress(RefusedError):  # without a verdict
        computed(packs, own)
    assert told == [drew is not False]


class Unseen(Task):
    """Does something that torch tells nobody of."""

    def __init__(self, what: str) -> None:
        self.what = what

    def forward(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        h = model(batch["x"])
        with torch._C.DisableTorchFunction():
            h.add_(model.bias if self.what == "a parameter" else torch.rand(len(h), 2))
        return h


@runs
@pytest.mark.parametrize("what", ["a parameter", "random numbers"])
def test_what_packs_do_not_see_is_refused(what: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), floats(3)
    found, packs = trained(model, x, 4, task=Unseen(what))
    assert found == trained(model, x, 0, task=Unseen(what))[0]
    is_used = "is used" if what == "a parameter" else "are drawn"
    assert packs is not None and packs.refusals()[4] == f"{what} {is_used} where packs do not see it"


@runs
def test_a_function_that_uses_a_tensor_several_times_beside_others_is_refused() -> None:
    class Several(Task):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            h = model(batch["x"])
            return h + torch.einsum("nd,nd->d", h, h)

    _, packs = trained(nn.Linear(3, 2), floats(3), 4, task=Several())
    assert packs is not None
    assert packs.refusals()[4] == "einsum uses a tensor several times that others use as well"


@runs
def test_a_recurrent_layer_is_computed_one_at_a_time_in_packs() -> None:
    torch.manual_seed(0)
    model, x = Layers(), floats(3)
    found, packs = trained(model, x, 4)
    assert found == trained(model, x, 0)[0]
    assert packs is not None and packs.refusals() == {} and packs.summary()["one_at_a_time"] == ["memory"]
    assert packs.summary()["share"] > 0.5


@runs
def test_a_task_that_leaves_a_function_out_from_some_step_on_is_compared_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that it calls was called in trials, too, but never without the last."""

    class Shorter(InOneCall):
        def forward(self, model: nn.Module, batch: dict[str, Tensor], progress: Any) -> Tensor:  # type: ignore[override]
            return model(batch["x"])

        def sample_losses(self, outputs: Tensor, batch: dict[str, Tensor], progress: Any) -> Tensor:  # type: ignore[override]
            losses = outputs.flatten(1).sum(1)
            return losses if progress.step == 3 else losses * 2.0

    tried: list[int] = []
    try_out = Packs.try_out
    monkeypatch.setattr(Packs, "try_out", lambda self, batch, *a: (tried.append(batch.step), try_out(self, batch, *a)))
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), floats(3)
    found, packs = trained(model, x, 4, task=Shorter())
    assert found == trained(model, x, 0, task=Shorter())[0]
    assert packs is not None and packs.refusals() == {}
    assert 3 in tried and 1 not in tried
