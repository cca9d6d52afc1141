"""The declaration of a cross-validation: a block of the config, and the runs that follow from it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.keys import SCHEMA_KEY, Config, parse
from ..config.schema import build, flat, lay_over, option, read_json
from ..errors import UserError
from ..exact.order import key
from ..tasks.first_look import BUILT_IN


@dataclass(frozen=True)
class CrossValidation:
    """`cross_validation`: how the samples are cut into folds, and what is said about the runs."""

    output_dir: str = option("", "where results go; default: runs/<config>-folds")
    folds: int = option(5, "k: each sample is tested by one run, and learnt by the k - 1 others", minimum=2)
    repeats: int = option(1, "how often the samples are cut, each time in another way", minimum=1, maximum=1000)
    seed: int = option(0, "decides the cuts, whatever trainer.seed is", minimum=0)
    stratified: bool | None = option(
        None, "each fold has its share of every class; default: wherever there are classes"
    )
    group_column: str | None = option(
        None,
        "samples of one group (a patient, an author) stay in one fold: the column of the data, or the array of a task "
        "of your own. Nodules are always grouped by patient",
    )
    label_column: str | None = option(
        None, "of a task of your own: the array of classes; default: y, label, labels or target"
    )
    pool: list[str] = option(
        ["train", "validation", "test"], "the splits of the data that are put together, in this order, and then cut"
    )
    validation_fraction: float | None = option(
        None,
        "of what a run learns from, held out for validation; default: as much as in an ordinary run; 0 for none",
        minimum=0,
        below=1,
    )
    metric: str | None = option(
        None, "the metric that is named first; default: the task's own choice, accuracy, or loss"
    )
    alpha: float = option(0.05, "the interval is of level 1 - alpha", above=0, below=0.5)
    max_parallel: int | None = option(None, "runs at a time; null for one on each GPU, or on each core", minimum=1)

    @property
    def without_effect_on_runs(self) -> tuple[str, ...]:
        """Keys that change no run. A cross-validation may continue with other values of them."""
        return ("output_dir", "repeats", "metric", "alpha", "max_parallel")


@dataclass(frozen=True)
class Place:
    """One run: which fold of which repeat it tests."""

    repeat: int
    fold: int

    def __str__(self) -> str:
        return f"repeat-{self.repeat}-fold-{self.fold}"


@dataclass(frozen=True)
class Declared:
    """A cross-validation, checked.

    Attributes:
        options: the block.
        values: the config of every run, as JSON values, without what differs from run to run.
        config: the same, parsed.
    """

    options: CrossValidation
    values: dict[str, Any]
    config: Config

    @property
    def folder(self) -> Path:
        """The folder that holds everything."""
        return Path(self.options.output_dir)

    @property
    def places(self) -> list[Place]:
        """All runs, repeat by repeat."""
        o = self.options
        return [Place(repeat, fold) for repeat in range(o.repeats) for fold in range(o.folds)]

    def run_folder(self, place: Place) -> Path:
        """The output folder of a run."""
        return self.folder / "runs" / str(place)

    def run_config(self, place: Place, validation_fraction: float) -> Config:
        """The config of a run. Each run has its own seed, so the spread over runs includes that of weights and order.

        Args:
            place: of the run.
            validation_fraction: as settled by `work.examine`.
        """
        o, values = self.options, copy.deepcopy(self.values)
        own = self.config.trainer.task not in BUILT_IN
        trainer = values.setdefault("trainer", {})
        trainer["seed"] = self.config.trainer.seed + place.repeat * o.folds + place.fold
        trainer["output_dir"] = str(self.run_folder(place))
        trainer["fold"] = {
            "folds": o.folds,
            "number": place.fold,
            "seed": cut_seed(o.seed, place.repeat),
            "stratified": o.stratified,
            "validation_fraction": validation_fraction,
            "pool": o.pool,
            "group_column": o.group_column if own else None,
            "label_column": o.label_column if own else None,
        }
        return parse(values)

    def fixed(self) -> dict[str, Any]:
        """What may not change any more once there are runs: dotted key -> JSON value."""
        block = dataclasses.asdict(self.options)
        for name in self.options.without_effect_on_runs:
            del block[name]
        return flat({"cross_validation": block, **self.config.as_dict()})


def cut_seed(seed: int, repeat: int) -> int:
    """The seed of one repeat's cut. It does not depend on the number of repeats, so more can be added later."""
    return seed if repeat == 0 else key(seed, "repeat", repeat) % 2**31


def load(path: str, overrides: Mapping[str, Any] | None = None) -> Declared:
    """The cross-validation that a config file and overrides describe. The file need not have the block.

    Args:
        path: the JSON file.
        overrides: dotted key -> value, of the config or of the block ("cross_validation.folds" -> 10).

    Raises:
        UserError: anything in it is wrong.
    """
    values = read_json(Path(path))
    for name, value in (overrides or {}).items():
        lay_over(values, name, value)
    block = values.pop("cross_validation", {})
    values.pop("study", None)
    values.pop(SCHEMA_KEY, None)
    if not isinstance(block, dict):
        raise UserError(f'{path}: "cross_validation" must be a block {{...}}.')
    try:
        options: CrossValidation = build(CrossValidation, dict(block), "cross_validation.")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not options.output_dir:
        options = dataclasses.replace(options, output_dir=f"runs/{Path(path).stem}-folds")
    trainer = values.setdefault("trainer", {})
    if isinstance(trainer, dict):
        for name in ("fold", "output_dir"):
            if trainer.get(name) is not None:
                raise UserError(
                    f'{path}: "trainer.{name}" is set for every run by cross-validate. Leave it out, and set '
                    f'"cross_validation.{"output_dir" if name == "output_dir" else "folds"}".'
                )
    config = parse(values, path)
    _settle_columns(options, config, values, path)
    declared = Declared(options, values, parse(values, path))
    declared.run_config(Place(0, 0), 0.0)  # checks what only a run's config has, such as the pool: now, before any work
    return declared


def _settle_columns(options: CrossValidation, config: Config, values: dict[str, Any], path: str) -> None:
    """Gives the column of groups to a ready task, which reads it. Raises UserError if the task has no use for it."""
    task = config.trainer.task
    if task not in BUILT_IN:
        return
    if options.label_column is not None:
        raise UserError(
            f'{path}: "cross_validation.label_column" is for a task of your own. The task {task} knows its classes.'
        )
    if options.group_column is None:
        return
    if task == "digits" or task == "nodules":
        what = "always keeps a patient in one fold" if task == "nodules" else "knows no groups"
        raise UserError(f'{path}: "cross_validation.group_column" has no effect: the task {task} {what}.')
    named = config.trainer.task_options.get("group_column")
    if named not in (None, options.group_column):
        raise UserError(
            f'{path}: "cross_validation.group_column" is "{options.group_column}", but '
            f'"trainer.task_options.group_column" is "{named}". Name one of them.'
        )
    values["trainer"].setdefault("task_options", {})["group_column"] = options.group_column
