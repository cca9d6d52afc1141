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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import TrainerError, UserError
from ..exact.batch_norm import RunningStatistics
from ..exact.hashes import hash_each
from ..exact.micro_batches import Computed, GlobalBatch, GlobalBatches, MicroBatches
from ..exact.plan import BatchPlan
from ..exact.splits import Split
from ..ranks.collectives import gather_objects, raise_together
from ..ranks.place import Ranks
from ..tasks.contract import check_micro_batch
from ..tasks.protocol import Task
from .causes import (
    Calls,
    Finding,
    Hashes,
    another_rank,
    changed_tensor,
    differs,
    explain,
    finding_of,
    source_of,
    watched,
)
from .chunks import objection
from .model_state import ModelState
from .probes import moved_values, refuse_collectives, refuse_use_of_running_statistics, under_moved_weights
from .python_state import Key, PythonState, State, changes, is_number

if TYPE_CHECKING:
    from ..engine.deepspeed_engine import Engine


@dataclass
class Found:
    """What a rehearsal found, the same on every rank.

    Attributes:
        findings: why the run is not bitwise; empty if nothing differed.
        notes: for the person who starts the run.
        changing: parameters and buffers that the task's forward changes by itself.
        kept: what micro-batches change of Python's state, whether or not anything depends on it.
        counters: the numbers among it.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)


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


@dataclass(frozen=True)
class Subject:
    """What is rehearsed.

    Attributes:
        task: as in `tasks.protocol`.
        engine: holds the model.
        batches: of the run.
        micro_batches, statistics: of its step. A task that wrongly claims `augment_in_chunks` is augmented one
            micro-batch at a time from then on.
        host_split, split: the training data on the CPU and on the device.
        plan: of the run.
        device: of the model.
        ranks: this rank, and how many.
        alike: whether all ranks have the same device model.
    """

    task: Task
    engine: Engine
    batches: GlobalBatches
    micro_batches: MicroBatches
    statistics: RunningStatistics
    host_split: Split
    split: Split
    plan: BatchPlan
    device: torch.device
    ranks: Ranks
    alike: bool = True


def rehearse(subject: Subject, first_step: int) -> Found:
    """Rehearses a run. Collective: every rank.

    Args:
        subject: the run; its state is that of `first_step` steps.
        first_step: steps made so far.

    Raises:
        UserError: on every rank: the task does not keep the protocol (see `task_contract`).
    """
    found, error = Found(), None
    hashes: dict[int, list[Hashes]] = {}
    rehearsal = _Rehearsal(subject, first_step)
    # First, as it decides how the micro-batches are computed, here and later.
    objections = [reason for reason in gather_objects(rehearsal.objection_to_chunks()) if reason is not None]
    if objections:
        subject.micro_batches.augments_in_chunks = False
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
    if not found.findings and subject.engine.zero_stage == 0:
        views = [hashes for hashes, _ in everyone] if subject.alike else [hashes]
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
    if len(everyone) == 1:
        return [
            Finding(
                f"{source_of(part)} gave another result the second time, though not each time that it was tried",
                "It draws from a source that no seed reaches, or keeps state out of sight. Draw from torch's default "
                "generator, which is seeded for each micro-batch, and keep no state.",
            )
        ]
    return [
        Finding(
            f"{source_of(part)} depends on the rank: each rank agrees with itself, but for the same micro-batch ranks "
            "find different numbers",
            "Look for torch.distributed.get_rank(), variables of the environment, files, names of hosts and the clock. "
            "If there are none, the ranks' devices compute differently.",
        )
    ]


def items_of(batches: GlobalBatches, first_step: int) -> list[_Item]:
    """The micro-batches that are rehearsed: two of full size, and one of each smaller size that the run has.

    The second is one of the run's last steps, for what sets in with the progress of the run. With samples in the order
    of their lengths, the first is the shortest of its step and the second the longest.
    """
    every, total = batches.steps_per_epoch, batches.total_steps
    batch = batches.at(first_step)
    items = [_Item(batch, 0, first_step == 0)]
    last = total - 1
    if (last + 1) % every == 0 and last > first_step + 1:
        last -= 1  # an epoch's last batch may be smaller
    late = batch if last == first_step else batches.at(last)
    if late is not batch or len(late.bounds) > 1:
        items.append(_Item(late, min(1, len(late.bounds) - 1), late is batch and first_step == 0))
    last_of_epoch = (first_step // every + 1) * every - 1
    tail = batches.at(last_of_epoch) if last_of_epoch < total else batch
    for other in (batch, tail):
        for j in (0, len(other.bounds) - 1):  # the smallest and the largest of a batch
            new = _Item(other, j, False)
            if new.samples not in {item.samples for item in items}:
                items.append(new)
    return items


class _Rehearsal:
    """One rank's part; for `causes.explain`, what computes micro-batches from a state of its choice."""

    def __init__(self, subject: Subject, first_step: int) -> None:
        self._subject, self._engine = subject, subject.engine
        self._micro_batches, self._statistics = subject.micro_batches, subject.statistics
        self._items = items_of(subject.batches, first_step)
        self._exact = subject.engine.zero_stage == 0
        self._scale = torch.zeros((), device=subject.device)
        self.python = PythonState(subject.task, subject.engine.model)
        self.before = self.python.take()
        self._model_state = ModelState(subject.engine, whole=self._exact)
        self._versions = self._data_versions()

    def _data_versions(self) -> list[int]:
        splits = (self._subject.host_split, self._subject.split)
        return [array._version for split in splits for array in split.arrays.values()]

    # ---- the performance ------------------------------------------------------------------------------------

    def perform(self) -> tuple[dict[int, list[Hashes]], Found]:
        """Computes the micro-batches. Returns number of the item -> its results, and what changed meanwhile."""
        ranks, found = self._subject.ranks, Found()
        results: dict[int, list[Hashes]] = {}
        count = len(self._items)
        if not self._exact:
            turns = [0]
        elif ranks.world_size > 1 and self._subject.alike:
            turns = [ranks.rank]  # the other orders are on the other ranks
        else:
            turns = [0, 1]
        with _generators_kept(self._subject.device):
            if self._exact:
                self._probe(found)
            for turn in turns:
                order = [(k + turn) % count for k in range(count)]
                # Of the first two sizes are alike. What only another size counts or draws shows when it comes again.
                order += [number for number in order if self._items[number].samples != self._items[0].samples]
                self.python.stir(turn)
                began = self.python.take() if turn else self.before
                elsewhere = turn > 0 and ranks.world_size == 1
                for number, hashes in zip(order, self._in_turn(order, elsewhere)):
                    results.setdefault(number, []).append(hashes)
                after = self.python.take()
                self._put_back(found)
                if self._exact and ranks.world_size > 1:
                    # Each rank sees itself as the next one of one more, besides.
                    results[order[0]] += self._in_turn(order[:1], elsewhere=True, instead=False)
                    self._put_back(found)
                if turn == turns[0]:
                    moved = changes(began, after)
                    found.kept = [self.python.name_of(key) for key in moved]
                    found.counters = [self.python.name_of(key) for key in moved if is_number(key, began, after)]
                    if self._exact and not found.findings:
                        finding = moved_values(self, moved, after, self._of_moved)
                        found.findings += [finding] if finding is not None else []
                    self._put_back(found)
        self._check_what_is_not_the_tasks()
        return results, found

    def _of_moved(self, key: Key, part: str, after: State) -> Finding:
        return finding_of(self, key, source_of(part), after)

    def _in_turn(self, order: list[int], elsewhere: bool, instead: bool = True) -> list[Hashes]:
        """Computes some micro-batches; `elsewhere`, as on another rank, or as on this one `instead` if that fails."""
        if elsewhere:
            try:
                with another_rank():
                    return [self._visit(self._items[number]) for number in order]
            except Exception:  # it may need the rank for something else
                self._put_back(Found())
            if not instead:
                return []
        return [self._visit(self._items[number]) for number in order]

    def _visit(self, item: _Item, calls: Calls | None = None) -> Hashes:
        """Computes one micro-batch and hashes what comes of it."""
        self._scale.fill_(1.0 / item.batch.count)
        row = torch.empty(self._statistics.size, device=self._subject.device)
        gradients: tuple[Tensor | None, ...] = ()
        self._statistics.begin()
        try:
            with watched(self._engine.model, calls), contextlib.nullcontext() if self._exact else torch.no_grad():
                computed = self._compute(item)
            start, stop = item.batch.bounds[item.j]
            named = check_micro_batch(
                type(self._subject.task).__name__,
                computed.outputs,
                computed.result,
                samples=stop - start,
                count=self._subject.host_split.count_of(item.batch.indices[start:stop].cpu()),
                micro_batch=item.j,
                finite=item.first,
                graph=self._exact,
            )
            loss = computed.result[0]
            if self._exact:
                self._check_trained()
                gradients = torch.autograd.grad(loss, self._engine.parameters, self._scale, allow_unused=True)
                self._check_dense(gradients)
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

    def _check_trained(self) -> None:
        frozen = [name for parameter, name in self._engine.names.items() if not parameter.requires_grad]
        if frozen:
            raise UserError(
                f"{self._name} freezes the parameter {frozen[0]} in its forward or loss. Which parameters are trained "
                "is settled at the start: use trainer.freeze, or multiply what they do by 0 or 1, as progress says."
            )

    def _check_dense(self, gradients: tuple[Tensor | None, ...]) -> None:
        for name, gradient in zip(self._engine.names.values(), gradients):
            if gradient is not None and gradient.layout != torch.strided:
                raise UserError(
                    f"The gradient of {name} is sparse, and the ranks add dense ones. Leave out its sparse=True."
                )

    def _compute(self, item: _Item) -> Computed:
        try:
            return self._micro_batches.compute(item.batch, item.j)
        except ValueError as error:
            norms = [type(m).__name__ for m in self._engine.model.modules() if isinstance(m, _NormBase)]
            if item.samples > 1 or not norms or isinstance(error, UserError):
                raise
            plan, samples = self._subject.plan, len(self._subject.host_split)
            raise UserError(
                f"A micro-batch of one sample has no variance for {norms[0]}, and this plan has one: training set "
                f"{samples}, train_batch_size {plan.global_batch_size}, train_micro_batch_size_per_gpu "
                f"{plan.micro_batch_size}.\nUse a larger micro-batch, or trainer.drop_last=true if the rest of the "
                f"training set ({samples % plan.global_batch_size}) is the cause. ({error})"
            ) from error

    def forward(self, number: int, content: float | None = None) -> Hashes:
        """A micro-batch's samples, outputs and loss, as hashes; `content` fills what statistics are collected in."""
        item = self._items[number]
        self._statistics.begin() if content is None else self._statistics.begin(content)
        try:
            computed = self._compute(item)
            if self._statistics.momentum_assigned():
                raise UserError(
                    f"{self._name} sets the momentum of a normalisation layer in its forward, where its statistics are "
                    "being collected: they would be lost. Set it in model()."
                )
        finally:
            self._statistics.settle()
        parts = {f"data {name}": array for name, array in computed.arrays.items()}
        outputs = computed.outputs if isinstance(computed.outputs, Mapping) else {"": computed.outputs}
        parts |= {f"output {name}": value for name, value in outputs.items() if isinstance(value, Tensor)}
        loss = computed.result[0] if isinstance(computed.result, tuple) and computed.result else None
        return hash_each(parts | ({"loss": loss} if isinstance(loss, Tensor) else {}))

    def _probe(self, found: Found) -> None:
        refuse_collectives(self, self._name)
        if self._statistics.size:
            self.python.put_back(self.before)
            refuse_use_of_running_statistics(self, self._name)
        self._put_back(found)
        written = under_moved_weights(self, self.items[:2], {n: q for q, n in self._engine.names.items()})
        self._model_state.put_back_parameters()
        found.changing += written
        found.findings += [changed_tensor(self._engine.model, "parameter", name) for name in written]
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
        return type(self._subject.task).__name__

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
        first = self._items[0].batch
        middle = self._subject.batches.at((first.step + self._subject.batches.total_steps - 1) // 2)
        reason = None
        with _generators_kept(self._subject.device):
            for batch in (first, middle, self._items[-1].batch, self._items[min(1, len(self._items) - 1)].batch):
                load = functools.partial(self._micro_batches.samples, batch)
                reason = reason or objection(load, range(min(5, len(batch.bounds))))
        self.python.put_back(self.before)
        return reason

    # ---- for the cause, if something differed ------------------------------------------------------------------

    def explain_difference(self) -> Finding | None:
        """The cause of a difference that this rank sees by itself; None if it agrees with itself."""
        with _generators_kept(self._subject.device):
            try:
                return explain(self)
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
