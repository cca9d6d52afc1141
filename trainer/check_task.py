"""`python -m trainer check-task FILE.py:NAME`: says in plain words what of a task isn't exact, and why.

First the task is examined in one process, for the usual causes one by one; then two steps of it are run
at one, two and three ranks, and every bit is compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random as python_random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config, parse
from .console import say
from .distributed import Ranks
from .errors import RanksDifferError, UserError
from .schema import lay_over
from .workers import WorkerError, run_ranks

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .splits import Batch, Split
    from .tasks import Task

_SAMPLES = 8
_SEED = 20_180_724  # any


def check_task(name: str, overrides: dict[str, Any]) -> int:
    """Examines a task and prints what it finds.

    Args:
        name: path/to/file.py:ClassName, or a built-in task.
        overrides: dotted config key -> value, over a config of three micro-batches a step.

    Returns:
        0 if the task is exact, else 1.

    Raises:
        UserError: the task cannot be built, or its loss cannot be right.
    """
    values: dict[str, Any] = {
        "train_batch_size": 3 * _SAMPLES,
        "train_micro_batch_size_per_gpu": _SAMPLES,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True, "fused": True}},
        "tensorboard": {"enabled": False},
    }
    for key, value in {"trainer.device": "cpu", **overrides, "trainer.task": name}.items():
        lay_over(values, key, value)
    config = parse(values, "check-task")
    try:
        found = run_ranks(_examine, 1, config)[0]
    except WorkerError as error:
        raise UserError(f"{name} fails in its own code: {str(error).strip()}") from error
    for problem in found["problems"]:
        say(f"NOT EXACT: {problem}")
    for note in found["notes"]:
        say(f"note: {note}")
    try:
        difference = _two_steps(config)
    except RanksDifferError as error:
        difference = str(error)
    except UserError:
        if not found["problems"]:
            raise
        difference = None  # refused for what was just said
    if difference is not None:
        say(f"NOT EXACT: {difference}")
    if difference is None and not found["problems"]:
        say(f"{name} is exact: two steps at 1, 2 and 3 ranks gave the same bits, and no usual cause was found.")
        return 0
    return 1


def _two_steps(config: Config) -> str | None:
    """Runs two steps at 1, 2 and 3 ranks. A sentence on the first difference, or None."""
    from .verify import first_difference, run_traced

    trainer = dataclasses.replace(config.trainer, max_steps=2, evaluate_every_epochs=0)
    with tempfile.TemporaryDirectory(prefix="check-task-") as scratch:
        for world_size in (1, 2, 3):
            folder = Path(scratch) / str(world_size)
            folder.mkdir()
            this = dataclasses.replace(config, trainer=dataclasses.replace(trainer, output_dir=str(folder / "run")))
            run_ranks(run_traced, world_size, this, str(folder))
            difference = first_difference(Path(scratch) / "1" / "trace.jsonl", folder / "trace.jsonl")
            if difference is not None:
                step, tensor = difference
                return f"{world_size} ranks differ from one, first at step {step}, in {tensor}."
    return None


def _examine(ranks: Ranks, config: Config) -> dict[str, list[str]]:
    """Looks for the usual causes, one by one. Returns {"problems": [...], "notes": [...]}."""
    import torch

    from . import distributed, tasks
    from .splits import as_splits

    distributed.start(ranks, "gloo", 60.0)  # a task may ask for its rank
    torch.set_num_threads(1)
    task = tasks.load(config.trainer.task, config.trainer.task_options)
    train = as_splits(task.splits(), type(task).__name__)["train"]
    torch.manual_seed(_SEED)
    model = task.model()
    examination = _Examination(task, model, train)
    problems = [
        *examination.splits_that_change(),
        *examination.loss_that_averages(),
        *examination.randomness_of_its_own(),
        *examination.state_between_micro_batches(),
        *examination.augmentation(),
    ]
    # A loss that averages, or noise, would look like statistics: a note only where nothing else was found.
    return {"problems": problems, "notes": [] if problems else examination.statistics_across_the_batch()}


class _Examination:
    """One task, one model and a few samples, looked at from all sides."""

    def __init__(self, task: Task, model: nn.Module, train: Split) -> None:
        self._task, self._model, self._train = task, model, train
        self._name = type(task).__name__

    def _batch(self, *samples: int) -> Batch:
        import torch

        return self._train.gather(torch.tensor(samples) % len(self._train))

    def _loss(self, batch: Batch, *, training: bool) -> float:
        """The summed loss, from one seeding of torch's generators and with the model's buffers left as they were."""
        import torch

        self._model.train(training)
        torch.manual_seed(_SEED)
        with _buffers_kept(self._model), torch.no_grad():
            result = self._task.loss(self._task.forward(self._model, batch), batch)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], torch.Tensor):
            raise UserError(f"{self._name}.loss() must return two things, (summed loss, count).")
        if result[0].ndim != 0:
            raise UserError(
                f"{self._name}.loss() returned a loss of shape {tuple(result[0].shape)}. It must be one number, the "
                'sum over the micro-batch, for example F.cross_entropy(..., reduction="sum").'
            )
        return float(result[0])

    def splits_that_change(self) -> list[str]:
        from .splits import as_splits

        again = as_splits(self._task.splits(), self._name)["train"]
        if again.data_hash() == self._train.data_hash():
            return []
        return [
            "splits() gives other data at a second call: every rank calls it, and all must get the same. Seed what it "
            "draws, for example torch.Generator().manual_seed(0)."
        ]

    def loss_that_averages(self) -> list[str]:
        samples = range(_SAMPLES)
        once = self._loss(self._batch(*samples), training=False)
        twice = self._loss(self._batch(*samples, *samples), training=False)
        if not math.isfinite(once) or abs(once) < 1e-12 or not math.isclose(twice, once, rel_tol=1e-3):
            return []
        return [
            "loss() averages over its micro-batch: the same samples twice give the same loss, not double. "
            'Sum instead (reduction="sum"), and return the number of samples as the count: the trainer divides by the '
            "global batch's."
        ]

    def randomness_of_its_own(self) -> list[str]:
        import numpy as np

        batch = self._batch(*range(_SAMPLES))
        first = self._loss(batch, training=True)
        if self._loss(batch, training=True) == first:
            return []
        # From which source? Fix the two usual ones and see whether that helps.
        for source, fix in (
            ("Python's random module", python_random.seed),
            ("numpy's global generator", np.random.seed),
        ):
            values = []
            for _ in range(2):
                fix(_SEED)
                values.append(self._loss(batch, training=True))
            if values[0] == values[1]:
                return [
                    f"forward() or loss() draws from {source}, which the trainer doesn't seed. Draw from torch's "
                    "default generator instead (torch.rand and the like): it is seeded for each micro-batch."
                ]
        return [
            "forward() or loss() gives another result at every call, from the same samples and the same seed of "
            "torch's default generator: it draws from a generator of its own, or keeps state. Draw from the "
            "default generator, "
            "which is seeded for each micro-batch."
        ]

    def state_between_micro_batches(self) -> list[str]:
        import torch
        from torch.nn.modules.batchnorm import _NormBase

        handled = {id(b) for m in self._model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
        before = {n: b.clone() for n, b in self._model.named_buffers() if id(b) not in handled}
        self._model.train()
        torch.manual_seed(_SEED)
        batch = self._batch(*range(_SAMPLES))
        with torch.no_grad():
            self._task.forward(self._model, batch)
        changed = [n for n, b in self._model.named_buffers() if n in before and not torch.equal(b, before[n])]
        return [
            f"the model's buffer {name} changes in forward(): it carries state from one micro-batch to the next, and "
            "each rank sees only its own. BatchNorm's running statistics are taken care of; this is not one of them."
            for name in changed
        ]

    def augmentation(self) -> list[str]:
        import torch

        from .order import SampleRandom

        augment = getattr(self._task, "augment", None)
        if augment is None:
            return []

        def augmented(samples: torch.Tensor) -> Batch:
            random = SampleRandom(_SEED, len(self._train), torch.device("cpu"))
            return augment(self._train.gather(samples), random.of(samples))

        samples = torch.arange(min(_SAMPLES, len(self._train)))
        one, again, alone = augmented(samples), augmented(samples), augmented(samples[:1])
        for name, array in one.items():
            if not torch.equal(array, again[name]):
                return [
                    f"augment() gives other values for {name!r} at a second call: it draws from somewhere else than "
                    "its `random` argument, whose numbers belong to a sample and an epoch."
                ]
            if not torch.equal(array[:1], alone[name]):
                return [
                    f"augment() gives other values for {name!r} when a sample comes without the others. It must treat "
                    "each sample on its own; mixing samples belongs into forward()."
                ]
        return []

    def statistics_across_the_batch(self) -> list[str]:
        together = self._loss(self._batch(*range(_SAMPLES)), training=True)
        apart = math.fsum(self._loss(self._batch(i, i), training=False) / 2 for i in range(_SAMPLES))
        whole = self._loss(self._batch(*range(_SAMPLES)), training=False)
        if math.isclose(whole, apart, rel_tol=1e-3, abs_tol=1e-6) or not math.isfinite(together):
            return []
        return [
            "in evaluation, too, a sample's loss depends on the samples beside it. That is the same at every number of "
            "ranks, but metrics then depend on trainer.evaluate_micro_batch_size."
        ]


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    saved: dict[str, Any] = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in model.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])
