"""The block "search" of a config: what is searched, how, and for how long. It is checked before anything starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import loggers
from ..config.keys import OTHERS, SCHEMA_KEY, Config, parse
from ..config.schema import build, lay_over, option, read_json
from ..errors import UserError
from .space import Space, read_space

# Settings of every trial. Its files are not kept, so it writes no logs and no checkpoints. It runs on one machine, so
# it needs no guard. It ends when its epochs are over, so it has no time limit. No setting changes a bit of the model.
OPERATION = {
    **loggers.OFF,
    "trainer.guard_every_steps": 0,
    "trainer.checkpoint.every_steps": 0,
    "trainer.max_wall_time_s": None,
    "trainer.output_dir": None,
}


@dataclass(frozen=True)
class Pruner:
    """`search.pruner`: ends trials early that do worse than others at the same epoch."""

    type: Literal["none", "median", "successive_halving"] = option(
        "median", "median ends a trial that is worse than the median of those before it; successive_halving lets only "
        "the best go on from the epochs first_epoch, first_epoch x reduction, ..."
    )  # fmt: skip
    first_epoch: int = option(1, "no trial is ended before this epoch", minimum=1)
    first_trials: int = option(5, "median: this many trials come to their end before one is ended early", minimum=1)
    reduction: int = option(3, "successive_halving: of this many trials at an epoch, one goes on", minimum=2)


@dataclass(frozen=True)
class Search:
    """`search`: which keys are searched, and how."""

    parameters: dict[str, Any] = option(
        {}, "dotted key -> what to try: a list, or a range with low, high and, as it suits, log or step"
    )
    output_dir: str | None = option(None, "the folder of this search; default: runs/search-<config>")
    metric: str = option("auto", "the metric on validation that decides; auto takes that of trainer.best")
    mode: Literal["auto", "min", "max"] = option(
        "auto", "whether a lower (min) or a higher (max) metric is better; auto knows usual names, such as accuracy"
    )
    trials: int | None = option(None, "how many configurations are tried", minimum=1)
    max_wall_time_s: float | None = option(
        None, "no trial begins after this many seconds; the seconds of earlier calls count, too", above=0
    )
    sampler: Literal["tpe", "random", "qmc", "gp", "grid"] = option(
        "tpe", "how Optuna chooses; grid tries every combination of lists and steps"
    )
    seed: int = option(0, "determines what the sampler draws", minimum=0)
    pruner: Pruner = option(Pruner, "ends trials early")
    test_seeds: int = option(5, "the best configuration is trained and tested with this many fresh seeds", minimum=1)
    devices_per_trial: Literal["auto", "one", "all"] = option(
        "auto", "a trial on each device, or all devices for one trial; auto measures which finishes sooner"
    )
    timed_steps: int = option(60, "steps of the runs that auto measures", minimum=12)
    max_parallel: int | None = option(None, "devices to use; null for every GPU, or every core", minimum=1)

    @property
    def free(self) -> tuple[str, ...]:
        """Keys of this block that may differ when a search is continued, because they change no trial."""
        return ("output_dir", "trials", "max_wall_time_s", "devices_per_trial", "timed_steps", "max_parallel")


@dataclass(frozen=True)
class Plan:
    """A search that has been checked.

    Attributes:
        search: the block.
        space: what is searched.
        values: the config without the block, as in the file.
        base: the same, checked.
        folder: where everything goes.
        trials: how many at most; None for as many as the time allows.
    """

    search: Search
    space: Space
    values: dict[str, Any]
    base: Config
    folder: Path
    trials: int | None

    def values_of(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The file's values, with the values of a trial in place of its own."""
        return self.space.laid_over(self.values, point)

    def config_of(self, point: Mapping[str, Any], seed: int | None = None) -> Config:
        """The config that makes a trial. Raises UserError where its values contradict one another."""
        values = self.values_of(point)
        for key, value in OPERATION.items():
            lay_over(values, key, value)
        if seed is not None:
            lay_over(values, "trainer.seed", seed)
        return parse(values, "the configuration")

    def seeds(self) -> list[int]:
        """The fresh seeds of the test runs. No trial uses one of them."""
        first = self.base.trainer.seed + 1
        return list(range(first, first + self.search.test_seeds))


def load_search(path: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The search in a file, checked as strictly as a config.

    Args:
        path: the JSON file.
        overrides: dotted key -> value, of the config or of the block ("search.trials" -> 5); they override the file.

    Raises:
        UserError: anything in it is wrong.
    """
    values = read_json(Path(path))
    for key, value in (overrides or {}).items():
        lay_over(values, key, value)
    block = values.pop("search", None)
    for other in (*OTHERS, SCHEMA_KEY):
        values.pop(other, None)
    if not isinstance(block, dict):
        raise UserError(
            f'{path}: a search needs a "search" block {{...}} beside the config, such as\n'
            '"search": {"parameters": {"optimizer.params.lr": {"low": 1e-4, "high": 1e-1, "log": true}}, "trials": 20}'
        )
    base = parse(copy.deepcopy(values), path)
    try:
        search: Search = build(Search, block, "search.")
        _check_base(base, search)
        space = read_space(search.parameters, values)
        trials = _check_budget(search, space)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    folder = Path(search.output_dir or f"runs/search-{Path(path).stem}").expanduser()
    return Plan(search, space, values, base, folder, trials)


def _check_base(base: Config, search: Search) -> None:
    if base.train_batch_size is None:
        raise UserError(
            'a search needs "train_batch_size": without it the global batch grows with the ranks, so a trial would '
            "depend on where it runs."
        )
    if not base.trainer.evaluate_every_epochs and search.pruner.type != "none":
        raise UserError(
            f'"search.pruner.type" is "{search.pruner.type}", but trainer.evaluate_every_epochs is 0, so there are no '
            'validations to look at. Set search.pruner.type to "none", or trainer.evaluate_every_epochs to 1.'
        )
    if "/" in search.metric:
        split, _, name = search.metric.rpartition("/")
        raise UserError(
            f'"search.metric" is "{search.metric}". '
            + (
                f'Trials are measured on validation: name the metric alone, "{name}".'
                if split == "validation"
                else f'A search that looks at {split} would make the {split} metric meaningless: trials see validation '
                f'only. Name the metric alone: "{name}".'
            )
        )  # fmt: skip
    if search.mode != "auto" and search.metric == "auto":
        raise UserError(
            f'"search.mode" is "{search.mode}", but search.metric names no metric. Name one, or leave it out.'
        )


def _check_budget(search: Search, space: Space) -> int | None:
    """The largest number of trials; None if only the time limits it. Raises UserError if nothing limits it."""
    if search.sampler == "grid":
        combinations = space.grid_size()
        return min(combinations, search.trials or combinations)
    if search.trials is None and search.max_wall_time_s is None:
        raise UserError('a search needs a budget: "search.trials" (how many), "search.max_wall_time_s", or both.')
    return search.trials
