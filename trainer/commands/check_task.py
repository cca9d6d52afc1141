"""`python -m trainer check-task FILE.py:NAME`: says in plain words what in a task isn't exact, and why.

First the task is rehearsed as a run would rehearse it, with the config's own micro-batch sizes. Then it is checked for
two mistakes that a comparison of bits cannot find: a forward that averages, and data that changes. At last two steps
are run at one, two and three ranks, and every bit is compared. One of the steps is an epoch's last, smaller batch.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import loggers
from ..config.keys import Config, load_config, parse
from ..config.schema import lay_over
from ..errors import RanksDifferError, UserError
from ..ranks.place import Ranks
from ..ranks.workers import WorkerError, run_ranks
from ..record.console import say
from ..tasks.first_look import look

if TYPE_CHECKING:
    from ..exact.splits import Batch
    from ..run.build import Pieces

_SAMPLES = 8
_SEED = 20_180_724  # any number would do


def check_task(name: str, overrides: dict[str, Any], ds_config: str | None = None) -> int:
    """Examines a task and prints what it finds.

    Args:
        name: path/to/file.py:ClassName, or a built-in task.
        overrides: dotted config key -> value. They override the config.
        ds_config: a config file; without one, a config of three micro-batches of 8 samples a step.

    Returns:
        0 if the task is exact, else 1.

    Raises:
        UserError: the task cannot be built, or breaks the protocol.
    """
    look(name, {})
    changes = {
        "trainer.device": "cpu",
        "trainer.exactness": "auto",
        **loggers.OFF,
        **overrides,
        "trainer.task": name,
    }
    if ds_config is not None:
        config = load_config(ds_config, changes)
    else:
        values: dict[str, Any] = {
            "train_batch_size": 3 * _SAMPLES,
            "train_micro_batch_size_per_gpu": _SAMPLES,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True, "fused": True}},
        }
        for key, value in changes.items():
            lay_over(values, key, value)
        config = parse(values, "check-task")
    try:
        found = run_ranks(_examine, 1, config)[0]
    except WorkerError as error:
        raise UserError(f"{name} has raised an error in its own code: {str(error).strip()}") from error
    for problem in found["problems"]:
        say(f"NOT EXACT: {problem}")
    for note in found["notes"]:
        say(f"note: {note}")
    try:
        difference = _few_steps(config, found["samples"])
    except RanksDifferError as error:
        difference = str(error)
    except UserError:
        if not found["problems"]:
            raise
        difference = None  # refused for a problem that was just reported
    if difference is not None:
        say(f"NOT EXACT: {difference}")
    if difference is None and not found["problems"]:
        sizes = " or ".join(str(size) for size in found["sizes"])
        say(
            f"{name} is exact: rehearsed in micro-batches of {sizes} samples, and two steps at "
            f"{_listed(_world_sizes(config))} ranks gave the same bits."
        )
        return 0
    return 1


def _world_sizes(config: Config) -> list[int]:
    return [W for W in (1, 2, 3) if config.plan(1).scaling == "strong" and config.plan(1).micro_batches >= W] or [1]


def _listed(numbers: list[int]) -> str:
    return " and ".join(filter(None, [", ".join(map(str, numbers[:-1])), str(numbers[-1])]))


def _few_steps(config: Config, samples: int) -> str | None:
    """Runs two steps at one, two and three ranks. Returns a sentence about the first difference, or None."""
    from .verify import first_difference, run_traced

    unsaved = dataclasses.replace(config.trainer.checkpoint, every_steps=0)
    trainer = dataclasses.replace(config.trainer, max_steps=2, evaluate_every_epochs=0, checkpoint=unsaved)
    B = config.plan(1).global_batch_size
    if samples > B + samples % B and samples % B and not config.trainer.drop_last:
        # With this number of samples, the second step is an epoch's last, smaller batch.
        trainer = dataclasses.replace(trainer, train_samples=B + samples % B)
    with tempfile.TemporaryDirectory(prefix="check-task-") as scratch:
        for world_size in _world_sizes(config):
            folder = Path(scratch) / str(world_size)
            folder.mkdir()
            this = dataclasses.replace(config, trainer=dataclasses.replace(trainer, output_dir=str(folder / "run")))
            run_ranks(run_traced, world_size, this, str(folder))
            difference = first_difference(Path(scratch) / "1" / "trace.jsonl", folder / "trace.jsonl")
            if difference is not None:
                step, tensor = difference
                return f"{world_size} ranks differ from one, first at step {step}, in {tensor}."
    return None


def _examine(ranks: Ranks, config: Config) -> dict[str, Any]:
    """As `_rehearsed`, with a message of its own for arrays of the wrong type."""
    from ..run.failures import of_types

    try:
        return _rehearsed(ranks, config)
    except Exception as error:
        known = of_types(error)
        if known is None:
            raise
        raise known from error


def _rehearsed(ranks: Ranks, config: Config) -> dict[str, Any]:
    """Rehearses the task at one rank. Returns problems and notes, the micro-batch sizes, and the training samples."""
    from ..record.console import DeepSpeedLog
    from ..rehearsal.rehearse import refused_on_gpus, rehearse
    from ..rehearsal.stage import Stage, items_of
    from ..rehearsal.sums import refuse_means
    from ..run.build import build
    from ..run.course import make_step, subject_of

    log = DeepSpeedLog(keep=False)
    log.install()
    try:
        p = build(config, ranks, config.plan(1), log)
    finally:
        log.close()
    subject = subject_of(p, make_step(p))
    found = rehearse(subject, 0)
    stage = Stage(subject, 0)
    refuse_means(stage, None)  # a run's rehearsal does not see what a forward averages
    examination = _Examination(p)
    problems = examination.splits_that_change()
    problems += [f"{finding.what}.\n{finding.remedy}" for finding in found.findings]
    notes = [f"{note}." for note in found.notes]
    if p.device.type == "cpu":
        notes += [
            f"on GPUs torch refuses this model, because it has no exact kernel there: {text}"
            for text in refused_on_gpus(stage)
        ]
    if not problems:
        # Only now: random noise would look like statistics across the batch.
        notes += examination.statistics_across_the_batch()
        notes += [
            f"{counter} changes with micro-batches. No number depended on it here. If one does later, the run is not "
            "exact, and the audit may stop it. For annealing, use the keyword progress."
            for counter in found.counters
        ]
    sizes = [item.samples for item in items_of(p.batches, 0)]
    return {
        "problems": problems,
        "notes": notes,
        "sizes": list(dict.fromkeys(sizes)),
        "samples": len(p.host_splits["train"]),
    }


class _Examination:
    """Checks a task, with its model and a few samples, for mistakes that a rehearsal does not see."""

    def __init__(self, p: Pieces) -> None:
        from ..exact.progress import Progress, TaskCalls

        self._p, self._model, self._calls = p, p.engine.model, TaskCalls(p.task)
        self._name = type(p.task).__name__
        self._progress = Progress(0, 0, p.total_steps)

    def _batch(self, *samples: int) -> Batch:
        import torch

        split = self._p.splits["train"]
        return split.gather(torch.tensor(samples, device=self._p.device) % len(split))

    def _loss(self, batch: Batch, *, training: bool) -> float:
        """The summed loss. Torch's generators get the same seed each time, and the model's buffers are restored."""
        import torch

        from ..tasks.contract import check_loss

        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        self._model.train(training)
        torch.manual_seed(_SEED)
        try:
            with torch.no_grad(), self._p.engine.autocast():
                outputs = self._calls.forward(self._model, batch, self._progress)
                return float(check_loss(self._name, self._calls.loss(outputs, batch, self._progress))[0])
        finally:
            self._model.train()
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])

    def splits_that_change(self) -> list[str]:
        from ..exact.splits import as_splits
        from ..run.build import chosen_samples

        again = chosen_samples(
            as_splits(self._p.task.splits(), self._name)["train"], self._p.config.trainer.train_samples
        )
        if again.data_hash() == self._p.data_sha256()["train"]:
            return []
        return [
            "splits() gives other data at a second call. Every rank calls it, and all must get the same data. Use a "
            "seeded generator, for example torch.Generator().manual_seed(0)."
        ]

    def statistics_across_the_batch(self) -> list[str]:
        together = self._loss(self._batch(*range(_SAMPLES)), training=True)
        apart = math.fsum(self._loss(self._batch(i, i), training=False) / 2 for i in range(_SAMPLES))
        whole = self._loss(self._batch(*range(_SAMPLES)), training=False)
        if math.isclose(whole, apart, rel_tol=1e-3, abs_tol=1e-6) or not math.isfinite(together):
            return []
        return [
            "in evaluation, too, a sample's loss depends on the other samples of its micro-batch. It is the same at "
            "every number of ranks, but metrics depend on trainer.evaluate_micro_batch_size."
        ]
