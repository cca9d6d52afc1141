"""What a slot (a process for runs) does for a cross-validation: it looks at data and model, then it makes runs."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import TYPE_CHECKING, Any

from ..config.keys import Config
from ..errors import NonFiniteError, UserError
from ..ranks.place import Ranks
from .declaration import Declared, Place, cut_seed

if TYPE_CHECKING:
    from ..exact.splits import Split
    from ..tasks.protocol import Task


def examine(ranks: Ranks, declared: Declared, ask: object = None) -> dict[str, Any]:
    """Looks at data and model before the first run, so a mistake costs no work.

    Args:
        ranks: the slot's place.
        declared: the cross-validation.
        ask: how a job of a slot asks a question; not used here.

    Returns:
        `samples`, `validation_fraction` (settled), `fold_of` (a list of (samples,) folds, one a repeat), `groups` and
        `classes` (how many; None if the cut takes no account of them), `metrics` (their names on test), `best_metric`,
        `data_sha256`, `task_code_sha256`, `facts` of the machine, and `lines` and `notes` for people.

    Raises:
        UserError: something must change first.
    """
    from ..api.evaluation import untrained_metrics
    from ..data.cut import fold_of_rows
    from ..engine import deepspeed_engine as engine
    from ..engine import device as devices
    from ..engine.optimizers import check_optimizer
    from ..run.build import splits_of
    from ..tasks.own_code import task_code_sha256

    config = declared.config
    device, _ = devices.choose(config, ranks)
    devices.settle(config)
    check_optimizer(config)
    fraction = _validation_fraction(declared)
    first = declared.run_config(Place(0, 0), fraction)
    task, cut = _task(first), _cut(first)
    splits = splits_of(task, first, cut)
    o, count = declared.options, len(cut.fold_of)
    fold_of = [
        fold_of_rows(count, o.folds, cut_seed(o.seed, repeat), cut.labels, cut.groups).tolist()
        for repeat in range(o.repeats)
    ]
    _check_batch(config, splits["train"], fold_of)
    metrics = untrained_metrics(task, first, splits["test"], device)
    own = getattr(task, "best_metric", None)
    return {
        "samples": count,
        "validation_fraction": fraction,
        "fold_of": fold_of,
        "groups": None if cut.groups is None else len(set(cut.groups)),
        "classes": None if cut.labels is None else len(set(cut.labels.tolist())),
        "metrics": list(metrics),
        "best_metric": None if own is None else own[0],
        "data_sha256": {name: split.data_hash() for name, split in splits.items()},
        "task_code_sha256": task_code_sha256(task, config.trainer.task),
        "facts": devices.facts(device, engine.VERSION),
        "lines": list(getattr(task, "data_lines", ())),
        "notes": list(getattr(task, "notes", ())) + _own_note(task, declared),
    }


def _task(config: Config) -> Task:
    from ..exact.order import key, seed_python
    from ..tasks.protocol import load_task

    seed_python(key(config.trainer.seed, "task"))
    return load_task(config.trainer.task, config.trainer.task_options)


def _cut(config: Config) -> Any:
    from ..data.cut import Cut

    assert config.trainer.fold is not None
    return Cut(config.trainer.fold)


def _validation_fraction(declared: Declared) -> float:
    """The share that a run holds out of the samples that it learns from: as declared, or as in an ordinary run."""
    if declared.options.validation_fraction is not None:
        return declared.options.validation_fraction
    from ..exact.splits import as_splits

    task = _task(declared.config)
    # `Place` stands for a task without Options: it has no field of this name.
    named = {field.name: field.default for field in dataclasses.fields(getattr(type(task), "Options", Place))}
    if "validation_fraction" in named:
        given = declared.config.trainer.task_options.get("validation_fraction", named["validation_fraction"])
        return float(given)
    splits = as_splits(task.splits(), type(task).__name__)
    if "validation" not in splits:
        return 0.0
    return round(len(splits["validation"]) / (len(splits["validation"]) + len(splits["train"])), 4)


def _check_batch(config: Config, train: Split, fold_of: list[list[int]]) -> None:
    """Raises UserError if the training set of a run is smaller than the global batch."""
    batch = config.plan(1).global_batch_size
    # `train` is the training split of the first fold. A fold that tests more samples leaves fewer to train on.
    tested = [fold.count(number) for fold in fold_of for number in set(fold)]
    most, first = max(tested), tested[0]
    least = len(train) - (most - first)
    if least < batch:
        raise UserError(
            f"A run of {len(set(fold_of[0]))} folds has {least:,} samples to train on, which is less than the global "
            f"batch of {batch:,}. Choose a smaller train_batch_size, or more folds."
        )


def _own_note(task: Task, declared: Declared) -> list[str]:
    from ..tasks.folds import takes_cut

    if takes_cut(task):
        return []
    return [
        f"{type(task).__name__}.splits() gives its samples before they are cut. If it computes anything from its "
        "training samples (a mean, a vocabulary, a choice of features), what is tested has leaked into it. In that "
        "case let splits take the keyword cut (trainer/folds/README.md)"
    ]


def make(ranks: Ranks, config: Config, ask: object = None) -> dict[str, Any]:
    """Makes a run, or continues it from the last checkpoint in its output folder.

    Returns:
        Its summary; {"status": "not finite", "reason": ...} if its loss stopped being finite.
    """
    from ..run.claim import Resume
    from ..run.run import run

    try:
        resume = Resume("auto")
        return run(config, ranks, config_name="fold", started_at_s=time.time(), resume=resume)
    except NonFiniteError as error:
        return {"status": "not finite", "reason": str(error), "steps": error.good_steps}
    finally:
        gc.collect()  # an engine refers to itself, so only the collector frees its memory before the next run
