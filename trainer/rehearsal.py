"""The rehearsal: before its first step a run shows that its micro-batches do not depend on who computes them, or when.

The same bits at every number of ranks need one thing of a task: a micro-batch's loss, gradient and statistics follow
from its samples, its seed and the parameters, and from nothing else. So a few micro-batches of this very run, one of
each size, are computed twice, in another order the second time (where there are several ranks: once on each, each
beginning with another one), and every bit is compared. What changes in between, or with the order or the rank, is
looked for and named. Afterwards everything is as it was: parameters, buffers, random numbers and Python's state.

What a rehearsal cannot see: what begins later (a penalty that sets in at step 1,000), and with one rank what depends
on the rank through anything but torch.distributed. The audit looks for that while the run goes on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .batch_norm import RunningStatistics
from .build import Pieces
from .causes import Calls, Finding, Hashes, another_rank, changed_tensor, differs, explain, source_of, watched
from .chunks import objection
from .distributed import gather_objects, raise_together
from .errors import TrainerError, UserError
from .guard import hash_each
from .micro_batches import Computed, GlobalBatch, MicroBatches, global_batches
from .model_state import ModelState
from .python_state import Key, PythonState, changes
from .task_contract import check_micro_batch


@dataclass
class Found:
    """What a rehearsal found, the same on every rank.

    Attributes:
        findings: why the run is not bitwise; empty if nothing differed.
        notes: for the person who starts the run.
        changing: parameters and buffers that the task's forward changes by itself.
        counters: numbers in Python that micro-batches change, whether or not anything depends on them.
        micro_batches: how many this rank computed.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)
    micro_batches: int = 0


class _Item(NamedTuple):
    """A micro-batch to rehearse, and whether it belongs to the run's first step (whose loss has to be finite)."""

    batch: GlobalBatch
    j: int
    first: bool

    @property
    def samples(self) -> int:
        """How many samples it has."""
        start, stop = self.batch.bounds[self.j]
        return stop - start


def rehearse(p: Pieces, micro_batches: MicroBatches, statistics: RunningStatistics, first_step: int) -> Found:
    """Rehearses a run. Collective: every rank.

    Args:
        p: of the run; its state is that of `first_step` steps.
        micro_batches, statistics: of its step. A task that wrongly claims `augment_in_chunks` is augmented one
            micro-batch at a time from now on.
        first_step: steps made so far.

    Raises:
        UserError: on every rank: the task does not keep the protocol (see `task_contract`).
    """
    found, error = Found(), None
    hashes: dict[int, list[Hashes]] = {}
    rehearsal = _Rehearsal(p, micro_batches, statistics, first_step)
    # First, as it decides how the micro-batches are computed, here and later.
    objections = [reason for reason in gather_objects(rehearsal.objection_to_chunks()) if reason is not None]
    if objections:
        micro_batches.augments_in_chunks = False
    try:
        hashes, found = rehearsal.perform()
    except TrainerError as own:
        error = own
    raise_together(error)
    if objections:
        found.notes.append(
            "the task says augment_in_chunks, but its augment() is called for one micro-batch at a time, because "
            f"{objections[0]}"
        )
    everyone = gather_objects((hashes, found))
    _unite(found, [other for _, other in everyone])
    if not found.findings and p.engine.zero_stage == 0:
        views = [hashes for hashes, _ in everyone] if p.alike else [hashes]
        difference = _first_difference(views)
        if any(gather_objects(difference is not None)):
            # Only now is time spent on causes: on every rank by itself, then together.
            own_finding = rehearsal.explain_difference()
            found.findings = _agreed(gather_objects((own_finding, difference)))
    return found


def _unite(found: Found, everyone: list[Found]) -> None:
    findings = {finding: None for other in everyone for finding in other.findings}
    found.findings = list(findings)
    found.changing = sorted({name for other in everyone for name in other.changing})


def _first_difference(views: list[dict[int, list[Hashes]]]) -> str | None:
    """The first part, as in `Hashes`, in which two results of one micro-batch differ; None if none does."""
    results: dict[int, list[Hashes]] = {}
    for view in views:
        for item, hashes in view.items():
            results.setdefault(item, []).extend(hashes)
    for alternatives in results.values():
        one = alternatives[0]
        for other in alternatives[1:]:
            part = differs(one, other)
            if part is not None:
                return part
    return None


def _agreed(everyone: list[tuple[Finding | None, str | None]]) -> list[Finding]:
    """The findings of all ranks: those with a cause, else that ranks differ from one another."""
    causes = {finding: None for finding, _ in everyone if finding is not None}
    if causes:
        return list(causes)
    part = next(part for _, part in everyone if part is not None)
    return [
        Finding(
            f"{source_of(part)} depends on the rank: each rank agrees with itself, but for the same micro-batch ranks "
            "find different numbers",
            "Look for torch.distributed.get_rank(), variables of the environment, files, names of hosts and the clock. "
            "If there are none, the ranks' devices compute differently.",
        )
    ]


def items_of(p: Pieces, first_step: int) -> list[_Item]:
    """The micro-batches that are rehearsed: two of the next step, and one of each smaller size that the run has.

    With samples in the order of their lengths, the first two are the shortest and the longest.
    """
    batch = next(global_batches(p, first_step))
    items = [_Item(batch, j, first_step == 0) for j in range(min(2, len(batch.bounds)))]
    if len(batch.bounds) == 1 and first_step + 1 < p.total_steps:
        items.append(_Item(next(global_batches(p, first_step + 1)), 0, False))
    last_of_epoch = (first_step // p.steps_per_epoch + 1) * p.steps_per_epoch - 1
    tail = next(global_batches(p, last_of_epoch)) if last_of_epoch < p.total_steps else batch
    for other in (batch, tail):
        for j in (0, len(other.bounds) - 1):  # the smallest and the largest of a batch
            new = _Item(other, j, False)
            if new.samples not in {item.samples for item in items}:
                items.append(new)
    return items


class _Rehearsal:
    """One rank's part; for `causes.explain`, what computes micro-batches from a state of its choice."""

    def __init__(self, p: Pieces, micro_batches: MicroBatches, statistics: RunningStatistics, first_step: int) -> None:
        self._p, self._engine, self._micro_batches, self._statistics = p, p.engine, micro_batches, statistics
        self._items = items_of(p, first_step)
        self._exact = p.engine.zero_stage == 0
        self._scale = torch.zeros((), device=p.device)
        self.python = PythonState(p.task, p.engine.model)
        self.before = self.python.take()
        self._model_state = ModelState(p.engine, whole=self._exact)
        self._versions = self._data_versions()

    def _data_versions(self) -> list[int]:
        splits = (self._p.host_splits["train"], self._p.splits["train"])
        return [array._version for split in splits for array in split.arrays.values()]

    # ---- the performance ------------------------------------------------------------------------------------

    def perform(self) -> tuple[dict[int, list[Hashes]], Found]:
        """Computes the micro-batches. Returns number of the item -> its results, and what changed meanwhile."""
        ranks, found = self._p.ranks, Found()
        results: dict[int, list[Hashes]] = {}
        count = len(self._items)
        if not self._exact:
            turns = [0]
        elif ranks.world_size > 1 and self._p.alike:
            turns = [ranks.rank]  # the other orders are on the other ranks
        else:
            turns = [0, 1]
        with _generators_kept(self._p.device):
            if self._exact and any(True for _ in self._engine.model.buffers()):
                self._look_at_buffers_under_moved_weights(found)
            for turn in turns:
                order = [(k + turn) % count for k in range(count)]
                # Of the first two sizes are alike. What only another size counts or draws shows when it comes again.
                order += [number for number in order if self._items[number].samples != self._items[0].samples]
                self.python.stir(turn)
                elsewhere = turn > 0 and ranks.world_size == 1
                for number, hashes in zip(order, self._in_turn(order, elsewhere)):
                    results.setdefault(number, []).append(hashes)
                    found.micro_batches += 1
                if turn == turns[0]:
                    found.counters = self._counters()
                self._put_back(found)
        self._check_what_is_not_the_tasks()
        return results, found

    def _counters(self) -> list[str]:
        now = self.python.take()
        numbers = [key for key in changes(self.before, now) if key in now and _is_number(now[key].value)]
        return [self.python.name_of(key) for key in numbers]

    def _in_turn(self, order: list[int], elsewhere: bool) -> list[Hashes]:
        if elsewhere:
            try:
                with another_rank():
                    return [self._visit(self._items[number]) for number in order]
            except Exception:  # it may need the rank for a collective, which is its own affair
                self._put_back(Found())
        return [self._visit(self._items[number]) for number in order]

    def _visit(self, item: _Item, calls: Calls | None = None) -> Hashes:
        """Computes one micro-batch and hashes what comes of it."""
        self._scale.fill_(1.0 / item.batch.count)
        row = torch.empty(self._statistics.size, device=self._p.device)
        gradients: tuple[Tensor | None, ...] = ()
        self._statistics.begin()
        try:
            with watched(self._engine.model, calls), contextlib.nullcontext() if self._exact else torch.no_grad():
                computed = self._compute(item)
            start, stop = item.batch.bounds[item.j]
            named = check_micro_batch(
                type(self._p.task).__name__,
                computed.outputs,
                computed.result,
                samples=stop - start,
                count=self._p.host_splits["train"].count_of(item.batch.indices[start:stop].cpu()),
                micro_batch=item.j,
                finite=item.first,
                graph=self._exact,
            )
            loss = computed.result[0]
            if self._exact:
                gradients = torch.autograd.grad(loss, self._engine.parameters, self._scale, allow_unused=True)
            if self._statistics.size:
                self._statistics.collect(row)
        finally:
            self._statistics.settle()
        parts = {f"data {name}": array for name, array in computed.arrays.items()}
        parts |= {f"output {name}": output for name, output in named.items()}
        parts["loss"] = loss
        parts |= {
            f"gradient {name}": gradient
            for name, gradient in zip(self._engine.names.values(), gradients)
            if gradient is not None
        }
        parts["statistics"] = row
        return hash_each(parts)

    def _compute(self, item: _Item) -> Computed:
        try:
            return self._micro_batches.compute(item.batch, item.j)
        except ValueError as error:
            norms = [type(m).__name__ for m in self._engine.model.modules() if isinstance(m, _NormBase)]
            if item.samples > 1 or not norms or isinstance(error, UserError):
                raise
            plan, samples = self._p.plan, len(self._p.host_splits["train"])
            raise UserError(
                f"A micro-batch of one sample has no variance for {norms[0]}, and this plan has one: training set "
                f"{samples}, train_batch_size {plan.global_batch_size}, train_micro_batch_size_per_gpu "
                f"{plan.micro_batch_size}.\nUse a larger micro-batch, or trainer.drop_last=true if the rest of the "
                f"training set ({samples % plan.global_batch_size}) is the cause. ({error})"
            ) from error

    def _look_at_buffers_under_moved_weights(self, found: Found) -> None:
        """A buffer may change only when weights do: a power iteration that has converged stands still until then."""
        parameters = self._engine.parameters
        with torch.no_grad(), contextlib.suppress(Exception):
            for parameter in parameters:
                parameter.add_(torch.randn_like(parameter) * (0.01 * (parameter.abs().mean() + 0.01)))
            self._statistics.begin()
            try:
                self._micro_batches.compute(self._items[0].batch, self._items[0].j)
            finally:
                self._statistics.settle()
        self._model_state.put_back_parameters()
        self._put_back(found)

    def _put_back(self, found: Found) -> None:
        """Restores everything, and adds to what is found the parameters and buffers that the visits changed."""
        self.python.put_back(self.before)
        for kind, name in self._model_state.put_back():
            if kind == "optimizer":
                raise UserError(
                    f"{self._name} changes the optimizer's {name} in its forward or loss. Leave it to the trainer."
                )
            found.changing.append(name)
            found.findings.append(changed_tensor(self._engine.model, kind, name))

    @property
    def _name(self) -> str:
        return type(self._p.task).__name__

    def _check_what_is_not_the_tasks(self) -> None:
        if self._data_versions() != self._versions:
            raise UserError(
                f"{self._name} changes its training data while it trains. Copy what augment(), forward() or loss() "
                "writes to, for example with clone()."
            )
        gradients = [p.grad.any() for p in self._engine.parameters if p.grad is not None]
        if self._exact and gradients and bool(torch.stack(gradients).any()):  # device to host
            raise UserError(
                f"{self._name} calls backward() in its forward or loss, which adds to the gradients that the trainer "
                "sums. Return the loss, and take gradients of your own with torch.autograd.grad()."
            )

    def objection_to_chunks(self) -> str | None:
        """Why the task's augment() may not see several micro-batches at once, though it says so; None if it may."""
        if not self._micro_batches.augments_in_chunks:
            return None
        batch = self._items[0].batch
        with _generators_kept(self._p.device):
            reason = objection(functools.partial(self._micro_batches.load, batch), range(min(5, len(batch.bounds))))
        self.python.put_back(self.before)
        return reason

    # ---- for the cause, if something differed ------------------------------------------------------------------

    def explain_difference(self) -> Finding | None:
        """The cause of a difference that this rank sees by itself; None if it agrees with itself."""
        with _generators_kept(self._p.device):
            try:
                return explain(self, alone=self._p.ranks.world_size == 1)
            finally:
                self.python.put_back(self.before)

    @property
    def items(self) -> range:
        """The numbers of the micro-batches."""
        return range(len(self._items))

    @property
    def model(self) -> nn.Module:
        """Whose modules may be the cause."""
        return self._engine.model

    def from_the_start(self, *numbers: int, leave: Key | None = None, stirred: bool = False) -> tuple[Hashes, Calls]:
        """The last of some micro-batches, computed in turn from the state before the rehearsal, but for `leave`.

        With `stirred`, generators are advanced before the last one.
        """
        self.python.put_back(self.before, leave=leave)
        hashes: Hashes = {}
        calls: Calls = []
        for place, number in enumerate(numbers, start=1):
            calls.clear()
            if stirred and place == len(numbers):
                self.python.stir(1)
            hashes = self._visit(self._items[number], calls)
        return hashes, calls


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextlib.contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Torch's generators are afterwards as they were."""
    state = torch.get_rng_state()
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, device)
