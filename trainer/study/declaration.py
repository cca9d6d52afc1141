"""The declaration of a study, and the runs that follow from it, all known before the first run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config import loggers
from ..config.keys import Config, parse
from ..config.schema import lay_over, option
from ..errors import UserError
from .arms import (
    COMPARED,
    DEFAULTS,
    SEQUENTIAL,
    STRONG,
    WEAK,
    Budget,
    ImpossibleError,
    Place,
    Settings,
    centre_of,
    compared_arms,
    contrasted,
    run_id,
    values_of,
)
from .base import check_strong
from .cells import Cell, Repeat, SearchPlan
from .judgement import Rules
from .splits import KEY, Splits, more_seeds, split_of
from .tuning import Tuning, runs_of_search

# Settings of every run of a study. A run is short and its files are not kept, so it needs no loggers, guards and
# checkpoints. Inexact runs are refused, because only an exact run on one rank equals the run on W ranks.
OPERATION = {
    **loggers.OFF,
    "trainer.guard_every_steps": 0,
    "trainer.checkpoint.every_steps": 0,
    "trainer.exactness": "bitwise",
}
SYNCHRONISED = "synchronised_batch_norm"


@dataclass(frozen=True)
class Timing:
    """`study.timing`: runs on real ranks, to measure speed-up and compare bits; made last, one at a time."""

    world_sizes: list[int] = option([], "W to run; without any, powers of two up to the devices there are")
    max_steps: int | None = option(None, "optimizer steps of a timed run; null for whole runs", minimum=20)
    repeats: int = option(3, "runs at each W, in turn", minimum=1)
    latency_us: float | None = option(None, "latency of one message, for predictions; null to measure it", above=0)
    bandwidth_gb_per_s: float | None = option(None, "1e9 bytes a second, for predictions; null to measure it", above=0)


@dataclass(frozen=True)
class Study:
    """`study`: what is compared, and the rules of judgement. Declared before the runs, and then fixed."""

    output_dir: str = option("", "the folder of this study")
    arms: list[str] = option(
        list(DEFAULTS), "arms to compare; sequential is always one of them, sequential_equal_updates only if named"
    )
    world_sizes: list[int] = option([2, 4, 8, 16, 32], "numbers of ranks W of the other arms")
    seeds: list[int] = option([], "seeds of every arm; a count n in the file stands for 0 to n - 1")
    splits: Splits | None = option(
        None, "each judged run has its own split of the data; null for one split of all runs"
    )
    budgets: list[str] = option(["epochs"], "what a weak run shares with the sequential run: epochs, updates")
    epochs: list[int] = option([], "budgets in epochs; each is studied like the base's own")
    max_epochs: int | None = option(None, "the most epochs that equal updates may take", minimum=1)
    dataset_sizes: list[int] = option([], "training samples of nested subsets; each is studied like the whole")
    variants: dict[str, Any] = option(
        {}, "name -> dotted keys and values that change the base config; studied beside the base"
    )
    tuning: Tuning = option(Tuning, "how learning rates are searched for arms that are tuned")
    timing: Timing | None = option(Timing, "runs on real ranks, to measure speed-up; null for none")
    metric: str = option("test/accuracy", "<split>/<metric> of the model that a run keeps")
    direction: Literal["max", "min"] = option("max", "whether a high (max) or a low (min) value is better")
    margin: float = option(0.01, "the smallest loss of the metric that matters", above=0)
    collapse: float | None = option(
        None,
        "a run that loses this much against the sequential run of its seed has collapsed; null for 10 margins",
        above=0,
    )
    target: float | None = option(
        None, "the metric that a run should reach; null for a bound from the sequential runs of the other seeds"
    )
    perfect_within: float = option(
        1.25, "scaling is perfect up to this many times the samples that one rank's batch takes to the target", above=1
    )
    target_level: float = option(
        0.01, "the probability that a sequential run falls below the target's bound", above=0, below=0.5
    )
    deviation_floor: float = option(0.005, "the smallest standard deviation to use for the target's bound", above=0)
    converged_share: float = option(
        0.9,
        "a run has converged if its training loss falls by this share of its fall in sequential runs",
        above=0,
        below=1,
    )
    alpha: float = option(
        0.05, "the largest probability of any wrong verdict on one of a study's three questions", above=0, below=0.5
    )
    expected_deviation: float | None = option(
        None,
        "standard deviation of the sequential metric, from earlier runs: for the power that --dry_run prints",
        above=0,
    )
    max_parallel: int | None = option(None, "runs at a time; null for one per GPU, or per core without GPUs", minimum=1)

    @property
    def rules(self) -> Rules:
        """The rules for `judgement.judge`."""
        return Rules(
            higher_is_better=self.direction == "max",
            alpha=self.alpha,
            margin=self.margin,
            collapse=10 * self.margin if self.collapse is None else self.collapse,
            target=self.target,
            target_level=self.target_level,
            deviation_floor=self.deviation_floor,
            converged_share=self.converged_share,
        )

    @property
    def searched_seeds(self) -> list[int]:
        """Seeds of the arms whose settings are searched: one for each search."""
        return self.seeds[: self.tuning.searches]

    @property
    def tuning_metric(self) -> str:
        """<split>/<metric> that decides a search."""
        return self.tuning.metric or f"validation/{self.metric.split('/')[1]}"

    @property
    def timed_apart(self) -> tuple[str, ...]:
        """Keys of this block that change no result: a study may continue with other values of them."""
        return ("output_dir", "max_parallel", "timing", "expected_deviation")


@dataclass(frozen=True)
class Variant:
    """A base config, checked.

    Attributes:
        name: "" for the base itself.
        values, config: as in the file, and parsed.
        synchronised: normalise over all ranks' micro-batches (see `arms.values_of`).
        samples: of its training set; 0 before it is known.
    """

    name: str
    values: dict[str, Any]
    config: Config
    synchronised: bool = False
    samples: int = 0


@dataclass
class Plan:
    """What a study consists of.

    Attributes:
        variants: by name, the base first.
        cells: one for each variant, arm, budget, W and seed; sequential first, and seed by seed, so that a study that
            is interrupted has whole pairs.
        configs: run id -> config, of the runs whose settings are given.
        searches: by name.
        tuned: (place, seed) -> name of the search that gives its settings.
        repeats: the sequential runs of splits that have several seeds.
        impossible: (place, why).
        strong: (W, M) or (W, why not).
    """

    study: Study
    variants: dict[str, Variant]
    cells: list[Cell] = field(default_factory=list)
    configs: dict[str, Config] = field(default_factory=dict)
    searches: dict[str, SearchPlan] = field(default_factory=dict)
    tuned: dict[tuple[Place, int], str] = field(default_factory=dict)
    repeats: list[Repeat] = field(default_factory=list)
    impossible: list[tuple[Place, str]] = field(default_factory=list)
    strong: list[tuple[int, int | str]] = field(default_factory=list)

    def comparisons(self) -> int:
        """How many: the places that are compared with sequential runs, and those with their controls as well."""
        places = {cell.place for cell in self.cells if cell.arm in COMPARED}
        return len(places) + len(contrasted(places))

    def runs(self) -> int:
        """How many runs there are, trials among them; those of tuned arms counted as if no two were the same."""
        trials = len(self.searches) * runs_of_search(self.study.tuning)
        return len(self.configs) + trials + sum(cell.id is None for cell in self.cells)

    def config(self, place: Place, seed: int, settings: Settings | None = None, judged: int | None = None) -> Config:
        """The config of one run, on the split of the judged run with seed `judged`: by default this very run.

        Raises:
            ImpossibleError: there is no such run.
        """
        variant, most = self.variants[place.variant], self.study.max_epochs
        values = values_of(
            variant.values, place.arm, place.world_size, place.budget, seed, variant.samples, most, settings
        )
        # Synchronised statistics are those of all ranks' micro-batches together: of one W times larger micro-batch.
        if variant.synchronised and place.arm in WEAK:
            values["train_micro_batch_size_per_gpu"] *= place.world_size
        # The gradient noise scale is described for the base alone. Measuring it changes no bit.
        if place.arm == SEQUENTIAL and not place.variant and variant.config.plan(1).micro_batches > 1:
            values["trainer"]["gradient_noise"] = True
        split = split_of(self.study.splits, self.study.seeds, seed if judged is None else judged)
        if split is not None:
            lay_over(values, KEY, split)
        return parse(values)


def expand(study: Study, variants: Sequence[Variant]) -> Plan:
    """All runs of a study.

    Args:
        study: as declared.
        variants: the base first, each with the number of its training samples.

    Raises:
        UserError: an arm makes no sense for the base, or a size is all of its samples.
    """
    plan = Plan(study, {variant.name: variant for variant in variants})
    base = variants[0]
    if base.samples in study.dataset_sizes:
        raise UserError(
            f'"study.dataset_sizes" holds {base.samples:,}, which is all of the base\'s training samples. The base is '
            "studied anyway: leave this size out."
        )
    if STRONG in study.arms:
        # Also on as many ranks as there are micro-batches, so that the plan says how far strong scaling goes.
        for world_size in sorted({*study.world_sizes, base.config.plan(1).micro_batches} - {1}):
            try:
                plan.strong.append((world_size, check_strong(base.config, world_size, base.samples)))
            except ImpossibleError as reason:
                plan.strong.append((world_size, str(reason)))
    budgets: list[Budget] = ["updates" if budget == "updates" else "epochs" for budget in study.budgets]
    places: list[Place] = []
    for variant in variants:
        weak = [arm for arm in WEAK if arm in study.arms]
        sequential = dict.fromkeys([SEQUENTIAL, *(WEAK[arm].reference for arm in weak)])
        places += [Place(variant.name, arm, "epochs", 1) for arm in sequential]
        for budget in budgets:
            for arm in compared_arms(study.arms, budget):
                for world_size in [W for W in study.world_sizes if W > 1]:
                    place = Place(variant.name, arm, budget, world_size)
                    try:
                        plan.config(place, study.seeds[0])  # what is possible does not depend on the seed
                        places.append(place)
                    except ImpossibleError as reason:
                        plan.impossible.append((place, str(reason)))
    # Seed by seed, so that a study that is interrupted has whole pairs.
    for i, seed in enumerate(study.seeds):
        for place in places:
            if place.tuned_at is None:
                config = plan.config(place, seed)
                this = run_id(config)
                plan.configs[this] = config
                plan.cells.append(Cell(place.arm, place.budget, place.world_size, seed, place.variant, this))
            elif seed in study.searched_seeds:
                search = _search(place.tuned_at, base.config, i, seed)
                plan.searches.setdefault(search.name, search)
                plan.tuned[place, seed] = search.name
                plan.cells.append(Cell(place.arm, place.budget, place.world_size, seed, place.variant, None))
    for judged, seed in more_seeds(study.splits, study.seeds):
        config = plan.config(Place("", SEQUENTIAL, "epochs", 1), seed, judged=judged)
        plan.repeats.append(Repeat(config.trainer.task_options["split_seed"], seed, run_id(config)))
        plan.configs[plan.repeats[-1].id] = config
    return plan


def _search(at: Place, base: Config, number: int, seed: int) -> SearchPlan:
    # A variant's name is free text. Only characters that suit a file name are kept; a hash tells similar names apart.
    variant = re.sub(r"[^a-zA-Z0-9_]+", "-", at.variant) if at.variant else "base"
    if at.variant:
        variant += f"-{hashlib.sha256(at.variant.encode()).hexdigest()[:6]}"
    name = f"{variant}-{at.arm}-{at.budget}-W{at.world_size}-{number + 1}"
    return SearchPlan(name, at, centre_of(at, base), seed)
