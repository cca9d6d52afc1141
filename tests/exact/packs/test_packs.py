"""How packs are chosen, tried and given up."""

from __future__ import annotations

import contextlib
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.exact.packs.packed import SAMPLES, InOneCall, Task, dense, floats, made, trained
from trainer.exact.packs import packs as packs_module
from trainer.exact.packs.packs import Packs

pytestmark = pytest.mark.usefixtures("one_thread", "group_of_one", "early_packs")


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


def test_a_short_run_does_not_look_for_the_fastest_size() -> None:
    step, batches = made(dense(), floats(3), None)
    assert step.block.packs is not None
    old = step.block.packs
    packs = Packs(old._micro_batches, old._trained, old._model, old._statistics, old._device, None, steps=59)
    assert packs.begin(batches.at(0), range(8)) == 1


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
