"""The plan of a study as text: its runs, what cannot be run, and what its seeds can decide."""

from __future__ import annotations

from collections.abc import Sequence

from ..exact.plan import steps_per_epoch
from ..record.console import table
from .arms import COMPARED, WEAK, Place, contrasted
from .declaration import Plan, Study
from .inference import least_agreeing, seeds_needed, smallest_p
from .interaction import pairs_of
from .power import paired, power, seeds_for
from .trend import families_of
from .tuning import runs_of_search

# The power that a study should have at least: with less, the plan says how many seeds would give it.
_WANTED = 0.8


def plan_text(plan: Plan) -> str:
    """The plan as a table, with what cannot be run and why, the numbers of runs, and the power of its verdicts."""
    lines = [_table(plan)]
    for W, answer in plan.strong:
        if isinstance(answer, int):
            lines.append(f"strong, W = {W}: the sequential run; its {answer} micro-batches are split over {W} ranks")
        else:
            lines.append(f"strong, W = {W}: impossible, {answer}")
    lines += [f"{place}: impossible, {why}" for place, why in plan.impossible]
    lines += [_judged(plan.study), *_timing(plan.study)]
    return "\n".join([*lines, *_runs(plan), *_repeats(plan), *power_lines(plan), *question_lines(plan)])


def _judged(study: Study) -> str:
    """How runs are judged, in one line, so that a wrong direction or unit is seen before the runs."""
    better = "more" if study.direction == "max" else "less"
    target = "a bound from the sequential runs" if study.target is None else f"{study.target:g}"
    return f"judged by {study.metric} ({better} is better); a loss of {study.margin:g} matters; target: {target}"


def _timing(study: Study) -> list[str]:
    if study.timing is None:
        return []
    sizes = study.timing.world_sizes
    at = f"W = {', '.join(map(str, sizes))}" if sizes else "W = 1, 2, 4 and so on, as far as there are devices"
    return [f"timed at the end on real ranks, {at}: strong scaling, {study.timing.repeats} runs each"]


def _table(plan: Plan) -> str:
    rows: list[Sequence[str]] = []
    seeds: dict[object, int] = {}
    for cell in plan.cells:
        seeds[cell.place] = seeds.get(cell.place, 0) + 1
    for cell in [c for c in plan.cells if c.seed == plan.study.seeds[0]]:
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
                str(seeds[cell.place]),
            )
        )
    variant = ["variant"] if len(plan.variants) > 1 else []
    return table(rows, ("arm", *variant, "equal", "W", "global batch", "epochs", "updates", "seeds"))


def _runs(plan: Plan) -> list[str]:
    """The numbers of runs, those of searches apart."""
    if not plan.searches:
        return []
    each, study = runs_of_search(plan.study.tuning), plan.study
    tuned = sum(cell.id is None for cell in plan.cells)
    return [
        f"{len(plan.searches):,} searches of {each} runs each, by {study.tuning_metric}: {len(plan.searches) * each:,} "
        f"runs, for {tuned:,} runs with what they find; {len(plan.configs):,} runs have given settings"
    ]


def _repeats(plan: Plan) -> list[str]:
    """The splits, and the runs that tell what a split does."""
    splits, seeds = plan.study.splits, plan.study.seeds
    if splits is None:
        return []
    line = f"each judged run has a split of its own: split_seed {splits.first} to {splits.first + len(seeds) - 1}"
    if not plan.repeats:
        return [line]
    more = len({repeat.id for repeat in plan.repeats} - {cell.id for cell in plan.cells})
    count = len(plan.repeats) // splits.seeds
    return [f"{line}; {more} more sequential runs give {count} of them {splits.seeds} seeds each"]


def power_lines(plan: Plan) -> list[str]:
    """What the declared seeds can decide, in words; and how likely they rule out a loss where there is none."""
    study, tests = plan.study, plan.comparisons()
    if not tests:
        return []
    level, lines = study.alpha / tests, []
    against = len(contrasted({cell.place for cell in plan.cells if cell.arm in COMPARED}))
    if against:
        lines.append(
            f"{tests} comparisons: {tests - against} with sequential runs, and {against} of weak runs with sequential "
            "runs of as few updates"
        )
    # Searched or not, the latter first. A dictionary, because a set has no order.
    ways = {cell.id is None: None for cell in plan.cells if cell.arm in COMPARED}
    for searched in ways:
        n = len(study.searched_seeds if searched else study.seeds)
        what, count = ("searched arms, ", f"{n} searches") if searched else ("", f"{n} seeds")
        if smallest_p(n) > level:
            lines.append(
                f"note: {what}{count}: no verdict is possible in {tests} comparisons at alpha {study.alpha:g}; at "
                f"least {seeds_needed(level)} are needed"
            )
        else:
            lines.append(f"power: {what}{count}, {tests} comparisons: {_power(plan, n, level)}")
    return lines


def _power(plan: Plan, n: int, level: float) -> str:
    study = plan.study
    begin = f"if nothing is lost, a loss of {study.margin:g} is ruled out with probability"
    if study.expected_deviation is None:
        shown = ", ".join(f"{power(n, level, 1.0, f):.2f} (of {f:g} margins)" for f in (0.5, 1.0, 2.0))
        return f"{begin} {shown}, by the standard deviation of differences; study.expected_deviation is not set"
    deviation = paired(study.expected_deviation)
    reached = power(n, level, study.margin, deviation)
    needed = seeds_for(_WANTED, level, study.margin, deviation)
    more = f"about {needed}" if needed else "more than 500 of them, or a larger margin,"
    end = "" if reached >= _WANTED else f"; {more} would make it {_WANTED:g}"
    return f"{begin} {reached:.2g} (normal runs, standard deviation {study.expected_deviation:g}){end}"


def question_lines(plan: Plan) -> list[str]:
    """What the seeds can decide of variants and of sizes, where a study asks."""
    study, lines = plan.study, []
    seeds: dict[Place, int] = {}
    for cell in plan.cells:
        seeds[cell.place] = seeds.get(cell.place, 0) + 1
    sizes = {name: variant.samples for name, variant in plan.variants.items() if name in _size_names(study)}
    pairs, families = pairs_of(seeds, study.variants), families_of(seeds, sizes) if study.dataset_sizes else {}
    asked = (
        ("interactions with variants", len(pairs), 2, pairs),
        ("trends over the number of samples", len(families), 1, [place for of in families.values() for place in of]),
    )
    for what, tests, sides, places in asked:
        for n in sorted({seeds[place] for place in places}, reverse=True):
            level = study.alpha / (sides * tests)
            agreeing = least_agreeing(n, level)
            if agreeing is None:
                lines.append(
                    f"note: {n} seeds: none of {tests} {what} can be shown at alpha {study.alpha:g}; at least "
                    f"{seeds_needed(level)} are needed"
                )
                continue
            line = f"power: {tests} {what}: {agreeing} of {n} seeds that agree are enough for each"
            if sides == 2 and study.expected_deviation is not None:
                # Of four runs, if what a seed gives all of them has no effect: sqrt(4) times the deviation of one.
                deviation, larger = 2 * study.expected_deviation, 2 * study.margin
                reached = power(n, level, larger, deviation)
                line += f"; a loss that is {larger:g} larger is shown with probability {reached:.2g} (normal runs)"
            lines.append(line)
    return lines


def _size_names(study: Study) -> list[str]:
    return ["", *(f"{n:,} samples" for n in study.dataset_sizes)]
