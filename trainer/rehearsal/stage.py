"""The stage of a rehearsal: computes single micro-batches of a run, and restores what they change."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import UserError
from ..exact.batch_norm import RunningStatistics
from ..exact.checks.hashes import hash_each
from ..exact.micro_batches import Computed, GlobalBatch, GlobalBatches, MicroBatches
from ..exact.plan import BatchPlan
from ..exact.splits import Batch, Split
from ..ranks.place import Ranks
from ..tasks.contract import check_augmented, check_micro_batch, sample_losses_problem
from ..tasks.protocol import Task
from .chunks import objection
from .model_state import ModelState
from .python_state import Key, PythonState
from .results import Calls, Finding, Hashes, changed_tensor

if TYPE_CHECKING:
    from ..engine.deepspeed_engine import Engine


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


class Item(NamedTuple):
    """A micro-batch to rehearse, and whether it belongs to the run's first step (its loss must be finite)."""

    batch: GlobalBatch
    j: int
    first: bool

    @property
    def samples(self) -> int:
        """The number of its samples."""
        start, stop = self.batch.bounds[self.j]
        return stop - start


def items_of(batches: GlobalBatches, first_step: int) -> list[Item]:
    """The micro-batches that are rehearsed: two of full size, and one of each smaller size that the run has.

    The second is from one of the run's last steps, because some code depends on the progress of the run. If samples
    are sorted by length, the first is the shortest of its step and the second the longest.
    """
    every, total = batches.steps_per_epoch, batches.total_steps
    batch = batches.at(first_step)
    items = [Item(batch, 0, first_step == 0)]
    last = total - 1
    if (last + 1) % every == 0 and last > first_step + 1:
        last -= 1  # an epoch's last batch may be smaller
    late = batch if last == first_step else batches.at(last)
    if late is not batch or len(late.bounds) > 1:
        items.append(Item(late, min(1, len(late.bounds) - 1), late is batch and first_step == 0))
    last_of_epoch = (first_step // every + 1) * every - 1
    tail = batches.at(last_of_epoch) if last_of_epoch < total else batch
    for other in (batch, tail):
        for j in (0, len(other.bounds) - 1):  # the smallest and the largest of a batch
            new = Item(other, j, False)
            if new.samples not in {item.samples for item in items}:
                items.append(new)
    return items


class Stage:
    """One rank's stage.

    Attributes:
        subject: what is rehearsed.
        python: the state that the task's Python code keeps.
        before: that state before the rehearsal.
        items: the micro-batches that are rehearsed.
        exact: whether gradients are compared. With ZeRO they are not: no rank holds a whole gradient.

    Args:
        subject: what is rehearsed; its state is that of `first_step` steps.
        first_step: steps made so far.
    """

    def __init__(self, subject: Subject, first_step: int) -> None:
        self.subject, self.engine = subject, subject.engine
        self.micro_batches, self.statistics = subject.micro_batches, subject.statistics
        self.items = items_of(subject.batches, first_step)
        self.exact = subject.engine.zero_stage == 0
        self._scale = torch.zeros((), device=subject.device)
        self.python = PythonState(subject.task, subject.engine.model)
        self.before = self.python.take()
        self.model_state = ModelState(subject.engine, whole=self.exact)
        self._versions = self._data_versions()

    def _data_versions(self) -> list[int]:
        splits = (self.subject.host_split, self.subject.split)
        return [array._version for split in splits for array in split.arrays.values()]

    def visit(self, item: Item, calls: Calls | None = None) -> Hashes:
        """Computes one micro-batch and hashes its results."""
        self._scale.fill_(1.0 / item.batch.count)
        row = torch.empty(self.statistics.size, device=self.subject.device)
        gradients: tuple[Tensor | None, ...] = ()
        self.statistics.begin()
        try:
            with watched(self.engine.model, calls), contextlib.nullcontext() if self.exact else torch.no_grad():
                computed = self._compute(item)
            start, stop = item.batch.bounds[item.j]
            named = check_micro_batch(
                type(self.subject.task).__name__,
                computed.outputs,
                self._result_of(item, computed),
                samples=stop - start,
                count=self.subject.host_split.count_of(item.batch.indices[start:stop].cpu()),
                micro_batch=item.j,
                finite=item.first,
                graph=self.exact,
            )
            loss = computed.result[0]
            if self.exact:
                self._check_trained()
                gradients = torch.autograd.grad(loss, self.engine.parameters, self._scale, allow_unused=True)
                self._check_dense(gradients)
            if self.statistics.size:
                self.statistics.collect(row)
        finally:
            self.statistics.settle()
        parts = {f"data {name}": array for name, array in computed.arrays.items()}
        parts |= {f"output {name}": output for name, output in named.items()}
        parts["loss"] = loss
        parts |= {
            f"gradient {name}": gradient
            for name, gradient in zip(self.engine.names.values(), gradients)
            if gradient is not None
        }
        parts["statistics"] = row
        return hash_each(parts)

    def _result_of(self, item: Item, computed: Computed) -> object:
        """What loss() returned. If the task has sample_losses(), their sum, which must be the same."""
        if not self.micro_batches.gives_sample_losses:
            return computed.result
        of = (item.batch, item.j, computed.outputs, computed.arrays)
        result, summed = self.micro_batches.loss(*of), self.micro_batches.trained_loss(*of)[0]
        problem = sample_losses_problem(self.name, summed, result)
        if problem is not None:
            # Computed again with the same seeds. If a value changes now, the task keeps state: then another finding
            # says so.
            again, summed_again = self.micro_batches.loss(*of), self.micro_batches.trained_loss(*of)[0]
            if torch.equal(again[0], result[0]) and torch.equal(summed_again, summed):
                raise UserError(problem)
        return computed.result[0], result[1]

    def check_augmented(self) -> None:
        """Raises UserError if augment() does not return a batch. Later the error would be less clear."""
        item = self.items[0]
        check_augmented(self.name, self.micro_batches.augmented(item.batch, item.j), item.samples)

    def _check_trained(self) -> None:
        frozen = [name for parameter, name in self.engine.names.items() if not parameter.requires_grad]
        if frozen:
            raise UserError(
                f"{self.name} freezes the parameter {frozen[0]} in its forward or loss. The trained parameters are "
                "chosen at the start: use trainer.freeze, or multiply their effect by 0 or 1, depending on progress."
            )

    def _check_dense(self, gradients: tuple[Tensor | None, ...]) -> None:
        for name, gradient in zip(self.engine.names.values(), gradients):
            if gradient is not None and gradient.layout != torch.strided:
                raise UserError(
                    f"The gradient of {name} is sparse, but the ranks add dense gradients. Leave out its sparse=True."
                )

    def _compute(self, item: Item) -> Computed:
        try:
            return self.micro_batches.compute(item.batch, item.j)
        except ValueError as error:
            norms = [type(m).__name__ for m in self.engine.model.modules() if isinstance(m, _NormBase)]
            if item.samples > 1 or not norms or isinstance(error, UserError):
                raise
            plan, samples = self.subject.plan, len(self.subject.host_split)
            raise UserError(
                f"A micro-batch of one sample has no variance for {norms[0]}, and this plan has one: training set "
                f"{samples}, train_batch_size {plan.global_batch_size}, train_micro_batch_size_per_gpu "
                f"{plan.micro_batch_size}.\nUse a larger micro-batch, or trainer.drop_last=true if the rest of the "
                f"training set ({samples % plan.global_batch_size}) is the cause. ({error})"
            ) from error

    def samples(self, number: int) -> Batch:
        """A micro-batch's samples, augmented, as fresh tensors."""
        item = self.items[number]
        chunk = range(item.j, item.j + 1)
        return self.micro_batches.samples(item.batch, chunk, self.micro_batches.augments_in_chunks)[0]

    def compute(self, number: int, content: float | None = None) -> Computed:
        """A micro-batch's samples, outputs and loss; `content` fills what statistics are collected in."""
        item = self.items[number]
        self.statistics.begin() if content is None else self.statistics.begin(content)
        try:
            computed = self._compute(item)
            lost = self.statistics.lost() if content is None else None
            if (objection := self.statistics.objection() or lost) is not None:
                raise UserError(f"{self.name} {objection}")
        finally:
            self.statistics.settle()
        return computed

    def forward(self, number: int, content: float | None = None) -> Hashes:
        """The same, as hashes."""
        computed = self.compute(number, content)
        parts = {f"data {name}": array for name, array in computed.arrays.items()}
        outputs = computed.outputs if isinstance(computed.outputs, Mapping) else {"": computed.outputs}
        parts |= {f"output {name}": value for name, value in outputs.items() if isinstance(value, Tensor)}
        loss = computed.result[0] if isinstance(computed.result, tuple) and computed.result else None
        return hash_each(parts | ({"loss": loss} if isinstance(loss, Tensor) else {}))

    def put_back(self) -> dict[str, Finding]:
        """Restores everything.

        Returns:
            Name -> finding, for the parameters and buffers that the task's code has changed since.

        Raises:
            UserError: the task has changed the optimizer's state.
        """
        self.python.put_back(self.before)
        changed: dict[str, Finding] = {}
        for kind, name in self.model_state.put_back():
            if kind == "optimizer":
                raise UserError(
                    f"{self.name} changes the optimizer's {name} in its forward or loss. Leave it to the trainer."
                )
            changed[name] = changed_tensor(self.engine.model, kind, name)
        return changed

    @property
    def name(self) -> str:
        """The task's class, for messages."""
        return type(self.subject.task).__name__

    def check_what_is_not_the_tasks(self) -> None:
        """Raises UserError if the task has changed its data, or the gradients that the trainer sums."""
        if self._data_versions() != self._versions:
            raise UserError(
                f"{self.name} changes its training data during training. Copy what augment(), forward() or loss() "
                "writes to, for example with clone()."
            )
        gradients = [p.grad.any() for p in self.engine.parameters if p.grad is not None]
        if self.exact and gradients and bool(torch.stack(gradients).any()):  # device to host
            raise UserError(
                f"{self.name} calls backward() in its forward or loss, which adds to the gradients that the trainer "
                "sums. Return the loss. For other gradients, use torch.autograd.grad()."
            )

    def objection_to_chunks(self) -> str | None:
        """Why the task's augment() may not see several micro-batches at once, as it claims; None if it may."""
        if not self.micro_batches.augments_in_chunks:
            return None
        first = self.items[0].batch
        middle = self.subject.batches.at((first.step + self.subject.batches.total_steps - 1) // 2)
        reason = None
        with generators_kept(self.subject.device):
            for batch in (first, middle, self.items[-1].batch, self.items[min(1, len(self.items) - 1)].batch):
                load = functools.partial(self.micro_batches.samples, batch)
                reason = reason or objection(load, range(min(2, len(batch.bounds))))
        self.python.put_back(self.before)
        return reason

    @property
    def numbers(self) -> range:
        """The numbers of the micro-batches: their positions in `items`."""
        return range(len(self.items))

    @property
    def model(self) -> nn.Module:
        """The model, whose modules may be the cause."""
        return self.engine.model

    def from_the_start(self, *numbers: int, leave: Key | None = None, stirred: bool = False) -> tuple[Hashes, Calls]:
        """Computes micro-batches in turn, from the state before the rehearsal except `leave`. Returns the last result.

        With `stirred`, generators are advanced before the last one.
        """
        self.python.put_back(self.before, leave=leave)
        hashes: Hashes = {}
        calls: Calls = []
        for place, number in enumerate(numbers, start=1):
            calls.clear()
            if stirred and place == len(numbers):
                self.python.stir(1)
            hashes = self.visit(self.items[number], calls)
        return hashes, calls


@contextlib.contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """A context after which torch's generators have the state from before it."""
    state = torch.get_rng_state()
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if of_device is not None:
            torch.cuda.set_rng_state(of_device, device)


@contextlib.contextmanager
def another_rank() -> Iterator[None]:
    """A context in which torch.distributed and the environment report the next rank, in a world larger by one."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank, dist.get_world_size
    next_rank, more = rank() + 1, world_size() + 1
    variables = {"RANK": str(next_rank), "LOCAL_RANK": str(next_rank), "WORLD_SIZE": str(more)}
    before = {name: os.environ.get(name) for name in variables}
    dist.get_rank, dist.get_world_size = lambda group=None: next_rank, lambda group=None: more
    os.environ.update(variables)
    try:
        yield
    finally:
        dist.get_rank, dist.get_world_size = rank, world_size
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def watched(model: nn.Module, calls: Calls | None) -> Iterator[None]:
    """Notes every call of the model's modules in `calls`, unless that is None."""
    if calls is None:
        yield
        return

    def hashed(value: object) -> int:
        return hash(tuple(sorted(hash_each(dict(_tensors_in(value))).items())))

    handles = [
        module.register_forward_hook(
            lambda _, inputs, named, outputs, name=name: calls.append((name, hashed([inputs, named]), hashed(outputs))),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors_in(item, f"{path}.{number}")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _tensors_in(item, f"{path}.{name}")
