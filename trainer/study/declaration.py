"""The declaration of a study, and the runs that follow from it, all known before the first run."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config.keys import SCHEMA_KEY, Config, parse
from ..config.schema import build, lay_over, near, option, read_json
from ..errors import UserError
from ..exact.plan import steps_per_epoch
from ..record.console import table
from .arms import (
    NAMES,
    SEQUENTIAL,
    SEQUENTIAL_TUNED,
    STRONG,
    WEAK,
    Budget,
    ImpossibleError,
    Place,
    check_base,
    check_strong,
    run_id,
    values_of,
)
from .inference import Rules, seeds_needed
from .tuning import FIRST_SEED, Tuning

# Settings of every run of a study: it is short, and its files are not kept. Inexact runs are refused, because only an
# exact run on one rank equals the run on W ranks.
OPERATION = {
    "tensorboard.enabled": False,
    "trainer.guard_every_steps": 0,
    "trainer.checkpoint.every_steps": 0,
    "trainer.exactness": "bitwise",
}
_SYNCHRONISED = "synchronised_batch_norm"


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
    arms: list[str] = option(list(NAMES), "the arms to compare; sequential is always one of them")
    world_sizes: list[int] = option([2, 4, 8, 16, 32], "W of the other arms")
    seeds: list[int] = option([], "seeds of every arm; a count n in the file stands for 0 to n - 1")
    budgets: list[str] = option(["epochs"], "what a weak run shares with the sequential run: epochs, updates")
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
    target: float | None = option(
        None, "the metric that a converged run must reach; null derives it from the sequential runs"
    )
    target_deviations: float = option(
        3.0, "a derived target lies this many standard deviations from the sequential mean", above=0
    )
    deviation_floor: float = option(0.005, "the smallest standard deviation to use for that", above=0)
    alpha: float = option(0.05, "family-wise error rate; intervals have level 1 - alpha", above=0, below=1)
    max_parallel: int | None = option(None, "runs at a time; null for one a GPU, or one a core", minimum=1)

    @property
    def rules(self) -> Rules:
        """The rules for `inference.judge`."""
        return Rules(
            self.direction == "max", self.alpha, self.margin, self.target, self.target_deviations, self.deviation_floor
        )

    @property
    def tuning_metric(self) -> str:
        """<split>/<metric> that decides a search."""
        return self.tuning.metric or f"validation/{self.metric.split('/')[1]}"

    @property
    def timed_apart(self) -> tuple[str, ...]:
        """Keys of this block that change no result: a study may continue with other values of them."""
        return ("output_dir", "max_parallel", "timing")


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


@dataclass(frozen=True)
class Cell:
    """One arm, budget, W, seed and variant; cells with the same id are the same run.

    Attributes:
        id: None for a run whose learning rate is to be found first.
    """

    arm: str
    budget: Budget
    world_size: int
    seed: int
    variant: str
    id: str | None

    @property
    def place(self) -> Place:
        """Its place in the study, without the seed."""
        return Place(self.variant, self.arm, self.budget, self.world_size)


@dataclass(frozen=True)
class SearchPlan:
    """A search for a learning rate. Attributes: the config of a rate and seed follows from `place`; its centre."""

    name: str
    place: Place
    centre: float


@dataclass
class Plan:
    """What a study consists of.

    Attributes:
        variants: by name, the base first.
        cells: one for each variant, arm, budget, W and seed; sequential first, and seed by seed, so that a study that
            is interrupted has whole pairs.
        configs: run id -> config, of the runs whose learning rate is given.
        searches: by name.
        tuned: place -> name of the search that gives its learning rate.
        impossible: (place, why).
        strong: (W, M) or (W, why not).
    """

    study: Study
    variants: dict[str, Variant]
    cells: list[Cell] = field(default_factory=list)
    configs: dict[str, Config] = field(default_factory=dict)
    searches: dict[str, SearchPlan] = field(default_factory=dict)
    tuned: dict[Place, str] = field(default_factory=dict)
    impossible: list[tuple[Place, str]] = field(default_factory=list)
    strong: list[tuple[int, int | str]] = field(default_factory=list)

    def comparisons(self) -> int:
        """The places that are compared with sequential runs."""
        return len({cell.place for cell in self.cells if cell.arm in WEAK})

    def runs(self) -> int:
        """How many runs there are, trials among them; those of tuned arms counted as if no two were the same."""
        trials = len(self.searches) * self.study.tuning.trials * self.study.tuning.seeds
        return len(self.configs) + trials + sum(cell.id is None for cell in self.cells)

    def config(self, place: Place, seed: int, lr: float | None = None) -> Config:
        """The config of one run. Raises ImpossibleError."""
        variant = self.variants[place.variant]
        values = values_of(
            variant.values, place.arm, place.world_size, place.budget, seed, variant.samples, self.study.max_epochs, lr
        )
        if variant.synchronised:
            values["train_micro_batch_size_per_gpu"] *= place.world_size
        # Measured where it costs nothing that is compared: it changes no bit.
        if place.arm == SEQUENTIAL and not place.variant and variant.config.plan(1).micro_batches > 1:
            values["trainer"]["gradient_noise"] = True
        return parse(values)


def load_study(path: str, overrides: Mapping[str, Any] | None = None) -> tuple[Study, list[Variant]]:
    """The study in a file, and its base configs, checked: the first is the base itself.

    Args:
        path: the JSON file.
        overrides: dotted key -> value, of the base config or of the study ("study.seeds" -> 5); they override the file.

    Raises:
        UserError: anything in it is wrong.
    """
    values = read_json(Path(path))
    for key, value in (overrides or {}).items():
        lay_over(values, key, value)
    block = values.pop("study", None)
    values.pop(SCHEMA_KEY, None)  # so that it is no part of the declaration
    if not isinstance(block, dict):
        raise UserError(f'{path}: a study needs a "study" block {{...}} beside the config that it varies.')
    try:
        study = _checked(block)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    base = check_base(values, path)
    if study.max_epochs is not None and study.max_epochs < base.trainer.epochs:
        raise UserError(f'{path}: "study.max_epochs" ({study.max_epochs}) is less than trainer.epochs.')
    if "weak_tuned" in study.arms and "lr" not in base.optimizer.params:
        raise UserError(f'{path}: the arm weak_tuned searches around "optimizer.params.lr", which is not given.')
    for world_size in study.timing.world_sizes if study.timing is not None else []:
        try:
            base.plan(world_size)
        except UserError as error:
            raise UserError(f'{path}: "study.timing.world_sizes" holds {world_size}: {error}') from None
    changes: dict[str, dict[str, Any]] = {"": {}}
    changes |= {f"{n:,} samples": {"trainer.train_samples": n} for n in study.dataset_sizes}
    changes |= study.variants
    variants = []
    for name, change in changes.items():
        own, source = copy.deepcopy(values), f'{path}: study.variants "{name}"' if name else path
        for key, value in change.items():
            if key != _SYNCHRONISED:
                lay_over(own, key, value)
        config = check_base(own, source)
        for key, value in OPERATION.items():
            lay_over(own, key, value)
        variants.append(Variant(name, own, config, bool(change.get(_SYNCHRONISED, False))))
    return study, variants


def _checked(block: Mapping[str, Any]) -> Study:
    count = block.get("seeds")
    if isinstance(count, int) and not isinstance(count, bool):
        block = {**block, "seeds": list(range(min(count, 10_000)))}
    study: Study = build(Study, dict(block), "study.")
    if len(study.seeds) < 2:
        raise UserError('"study.seeds" must be at least 2: one seed tells nothing about the variation over seeds.')
    for name, given, known in (("arms", study.arms, NAMES), ("budgets", study.budgets, ("epochs", "updates"))):
        for value in given:
            if value not in known:
                raise UserError(f'"study.{name}" holds {value!r}. {near(str(value), known)}')
    lists = [
        ("seeds", study.seeds, 0),
        ("world_sizes", study.world_sizes, 1),
        ("dataset_sizes", study.dataset_sizes, 1),
    ]
    lists += [("timing.world_sizes", study.timing.world_sizes, 1)] if study.timing is not None else []
    for name, numbers, least in lists:
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number < 1 << 63:
                raise UserError(f'"study.{name}" holds {number!r}. It must hold whole numbers of at least {least}.')
        if len(set(numbers)) < len(numbers):
            raise UserError(f'"study.{name}" is {numbers}. It must name each of them once.')
    for name in ("arms", "budgets", "seeds", "world_sizes"):
        values = getattr(study, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f'"study.{name}" is {values}. It must name at least one, and each of them once.')
    for name, change in study.variants.items():
        if not name or not isinstance(change, dict) or not change:
            raise UserError(
                f'"study.variants" holds {name!r}: {change!r}. It must be a name and a block of dotted config keys, '
                f'such as {{"trainer.task_options.model": "cnn"}}, or "{_SYNCHRONISED}": true.'
            )
        if not isinstance(change.get(_SYNCHRONISED, False), bool):
            raise UserError(f'"study.variants.{name}.{_SYNCHRONISED}" must be true or false.')
    trials = range(FIRST_SEED, FIRST_SEED + study.tuning.seeds)
    if set(trials) & set(study.seeds):
        raise UserError(f'"study.seeds" holds {trials[0]}, which belongs to the searches for learning rates.')
    if study.max_epochs is not None and "updates" not in study.budgets:
        raise UserError('"study.max_epochs" has no effect without the budget "updates".')
    for name, metric in (("metric", study.metric), ("tuning.metric", study.tuning.metric)):
        if metric.count("/") != 1 and (metric or name == "metric"):
            raise UserError(f'"study.{name}" is "{metric}". It must be <split>/<metric>, such as test/accuracy.')
    if study.tuning.metric.startswith("test/"):
        raise UserError(
            f'"study.tuning.metric" is "{study.tuning.metric}". A rate that was chosen on the test set would make the '
            "test meaningless. Use validation."
        )
    if not study.output_dir:
        raise UserError(
            '"study.output_dir" is missing: the folder for the results, in which a stopped study continues.'
        )
    return study


def expand(study: Study, variants: Sequence[Variant]) -> Plan:
    """All runs of a study; its variants know their samples. Raises UserError where an arm makes no sense."""
    plan = Plan(study, {variant.name: variant for variant in variants})
    base = variants[0]
    if STRONG in study.arms:
        # Also on as many ranks as there are micro-batches: a base with few of them says how far it goes.
        for world_size in sorted({*study.world_sizes, base.config.plan(1).micro_batches} - {1}):
            try:
                plan.strong.append((world_size, check_strong(base.config, world_size, base.samples)))
            except ImpossibleError as reason:
                plan.strong.append((world_size, str(reason)))
    budgets: list[Budget] = ["updates" if budget == "updates" else "epochs" for budget in study.budgets]
    places: list[Place] = []
    for variant in variants:
        places.append(Place(variant.name, SEQUENTIAL, "epochs", 1))
        if "weak_tuned" in study.arms:
            places.append(Place(variant.name, SEQUENTIAL_TUNED, "epochs", 1))
        for budget in budgets:
            for arm in [arm for arm in WEAK if arm in study.arms]:
                for world_size in [W for W in study.world_sizes if W > 1]:
                    place = Place(variant.name, arm, budget, world_size)
                    try:
                        plan.config(place, 0)
                        places.append(place)
                    except ImpossibleError as reason:
                        plan.impossible.append((place, str(reason)))
    for place in places:
        search = _search_of(place, base.config)
        if search is not None:
            plan.searches.setdefault(search.name, search)
            plan.tuned[place] = search.name
    for seed in study.seeds:
        for place in places:
            this = None
            if place not in plan.tuned:
                config = plan.config(place, seed)
                this = run_id(config)
                plan.configs[this] = config
            plan.cells.append(Cell(place.arm, place.budget, place.world_size, seed, place.variant, this))
    return plan


def _search_of(place: Place, base: Config) -> SearchPlan | None:
    arm = WEAK.get(place.arm)
    tuned = "own" if place.arm == SEQUENTIAL_TUNED else arm.tuned if arm is not None else ""
    if not tuned:
        return None
    at = place if tuned == "own" else Place(place.variant, place.arm, "epochs", 1)
    centre = arm.centre if arm is not None and arm.centre else float(base.optimizer.params["lr"])
    # A variant's name is free text. Only characters that suit a file name are kept; a hash tells similar names apart.
    variant = re.sub(r"[^a-zA-Z0-9_]+", "-", at.variant) if at.variant else "base"
    if at.variant:
        variant += f"-{hashlib.sha256(at.variant.encode()).hexdigest()[:6]}"
    name = f"{variant}-{at.arm}-{at.budget}-W{at.world_size}"
    return SearchPlan(name, at, centre)


def work(config: Config, samples: int) -> int:
    """The samples that a run processes. All runs have the same micro-batches, so its time is proportional to them."""
    trainer = config.trainer
    whole = trainer.epochs * samples
    return whole if trainer.max_steps is None else min(whole, trainer.max_steps * config.plan(1).global_batch_size)


def plan_text(plan: Plan) -> str:
    """The plan as a table, with what cannot be run and why."""
    study = plan.study
    rows: list[Sequence[str]] = []
    seeds = str(len(study.seeds))
    for cell in [c for c in plan.cells if c.seed == study.seeds[0]]:
        samples = plan.variants[cell.variant].samples
        config = plan.config(cell.place, cell.seed) if cell.id is None else plan.configs[cell.id]
        trainer, B = config.trainer, config.plan(1).global_batch_size
        updates = trainer.epochs * steps_per_epoch(samples, B, trainer.drop_last)
        updates = min(updates, trainer.max_steps or updates)
        adaptive = trainer.learning_rate.adascale_steps is not None
        rows.append(
            (
                cell.arm,
                *([cell.variant or "-"] if len(plan.variants) > 1 else []),
                "-" if cell.arm not in WEAK else cell.budget,
                str(cell.world_size),
                f"{B:,}",
                f"{'at most ' if adaptive else ''}{trainer.epochs}",
                f"{'at most ' if adaptive else ''}{updates:,}",
                seeds,
            )
        )
    variant = ["variant"] if len(plan.variants) > 1 else []
    header = ("arm", *variant, "equal", "W", "global batch", "epochs", "updates", "seeds")
    lines = [table(rows, header)]
    for W, answer in plan.strong:
        if isinstance(answer, int):
            lines.append(f"strong, W = {W}: the sequential run; its {answer} micro-batches are split over {W} ranks")
        else:
            lines.append(f"strong, W = {W}: impossible, {answer}")
    lines += [f"{place}: impossible, {why}" for place, why in plan.impossible]
    if plan.searches:
        trials = study.tuning.trials * study.tuning.seeds
        lines.append(
            f"{len(plan.searches)} searches for a learning rate, of {trials} runs each, by {study.tuning_metric}"
        )
    tests, n = plan.comparisons(), len(study.seeds)
    if tests and 2.0**-n * tests > study.alpha:
        lines.append(
            f"note: with {n} seeds no verdict is possible on {tests} comparisons at alpha {study.alpha:g}; "
            f"at least {seeds_needed(tests, study.alpha)} are needed"
        )
    return "\n".join(lines)
