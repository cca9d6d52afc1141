"""What was declared before the runs of a study, and what its words mean, as the page lists it."""

from __future__ import annotations

from collections.abc import Sequence

from .arms import EQUAL_UPDATES
from .declaration import SYNCHRONISED
from .interaction import interactions_in
from .results import Results, epochs_of
from .sentences import listed
from .to_target import metric_name
from .trend import trends_in


def definitions(results: Results) -> list[str]:
    """One line for each rule."""
    study, rules, tests = results.study, results.rules, results.judgement.tests
    more = "more" if rules.higher_is_better else "less"
    return [
        f"Metric: {study.metric} of the model that a run keeps; {more} is better.",
        f"Seeds: {_ranges(study.seeds)}, the same for every arm"
        + (f"; of searched arms the first {study.tuning.searches}." if results.searches else "."),
        *_splits(results),
        "Equal epochs: as many passes over the data as the sequential run. Equal updates: as many optimizer steps"
        + (f", but at most {study.max_epochs} epochs." if study.max_epochs else "."),
        "Nothing is decided before all declared seeds are there. A run that stopped being finite counts as the worst "
        "possible run, in every arm and in the sequential runs.",
        "The typical run: the median of the differences paired by seed. Its loss is material if it is above the margin "
        f"of {rules.margin:g}; small if it is above 0 and below the margin; ruled out if it is below the margin, as it "
        "is where weak runs gain; and otherwise undecided. An undecided loss may be shown to be above 0. Then only its "
        "size is open. The test is the sign test, which is exact for runs of any distribution. The interval of a "
        "difference comes from the same test, and the verdict is read from it.",
        f"Collapsed: not finite, or a loss of {rules.collapse:g} or more. The typical run says nothing about the few "
        "runs that collapse. So their number is given, with the rate that is not ruled out at level "
        f"{1 - rules.alpha:g} (Clopper and Pearson; for this comparison alone).",
        f"Target: {_target(results)}. A run that is worse misses it.",
        f"Not converged: the training loss at the end (over the last tenth of the logged windows) is above a bound, or "
        f"stopped being finite. The bound lies {100 * rules.converged_share:g} % of the way from the loss before the "
        "first update to that at the end of the typical sequential run. A run above it was trained less far. This "
        "does not say that it predicts worse.",
        "More often: McNemar's exact test. It counts the pairs of runs of one seed in which exactly one run failed.",
        f"Alpha is {rules.alpha:g} for each of three questions. The probability that any verdict on the typical run is "
        f"wrong is at most alpha, over all {tests} comparisons of the study. The same holds for the target and for "
        "convergence, by Holm's correction. Intervals of a metric and of a rate are not corrected, and have level "
        f"{1 - rules.alpha:g}.",
        *_questions(results),
        *_rules(results),
        *_tuning(results),
        *_budgets(results),
        *_variants(results),
    ]


def _rules(results: Results) -> list[str]:
    """The rules of the arms that the study has, and of no others."""
    arms, lines = results.study.arms, list[str]()
    if any(arm.startswith(("weak_linear", "weak_sqrt")) for arm in arms):
        lines.append(
            "The rules: linear (Goyal et al. 2017), square root (Hoffer et al. 2017) of the learning rate alone, and "
            "with Adam's betas and eps as well (Malladi et al. 2022); weight decay is never scaled. They start from "
            "the base config's rate, so a loss is that of the rule, not of the batch."
        )
    if "weak_adascale" in arms:
        lines.append(
            "AdaScale (Johnson et al. 2020) was made for SGD. With equal updates it makes as many scale-invariant "
            "steps as the sequential run makes steps. With equal epochs this stopping rule, a part of AdaScale, is off."
        )
    return lines


def _variants(results: Results) -> list[str]:
    if not any(SYNCHRONISED in changes for changes in results.study.variants.values()):
        return []
    return [
        "synchronised_batch_norm: one micro-batch is as large as those of all ranks together. Its statistics are what "
        "synchronised BatchNorm would compute, up to rounding."
    ]


def _splits(results: Results) -> list[str]:
    study = results.study
    if study.splits is None:
        return ["Split: one split of the data for all runs. So the verdicts are about this split."]
    first, n, repeats = study.splits.first, len(study.seeds), len(results.declared["repeats"])
    return [
        f"Split: each judged run has a split of its own (split_seed {first} to {first + n - 1}, in the order of the "
        "seeds). It is the same for every arm, and for the search of its settings. So the verdicts are about random "
        "splits of these data, and the two runs of a difference have the same test samples."
        + (
            f" {repeats} sequential runs of {repeats // study.splits.seeds} splits tell the split's variance from the "
            "seed's."
            if repeats
            else ""
        )
    ]


def _questions(results: Results) -> list[str]:
    """The questions of variants and of sizes, where a study asks them; each is a family with its own alpha."""
    lines, alpha = [], f"{results.rules.alpha:g}"
    if count := len(interactions_in(results)):
        lines.append(
            "Interaction: whether the loss with a variant is larger or smaller than the loss with the base, by the "
            "sign test of the difference of the two losses, paired by seed. This question has an alpha of its own, "
            f"{alpha}: the probability of any wrong verdict is at most this, over all {count} interactions, the "
            "direction included (Holm's correction). A seed in which both losses are infinite counts against both."
        )
    if count := len(trends_in(results)):
        lines.append(
            "Trend: whether the loss falls with the number of training samples. For each seed: does it fall in more "
            "pairs of sizes than it rises in? The sign test asks whether this is so in more than half of the seeds, "
            f"with an alpha of {alpha} of its own over all {count} trends (Holm's correction)."
        )
    return lines


def _target(results: Results) -> str:
    study = results.study
    if study.target is not None:
        return f"{study.target:g}, as given"
    return (
        f"what a sequential run would miss with a probability of {study.target_level:g}, by the sequential runs of the "
        f"other seeds, if they are normal (their standard deviation taken as {study.deviation_floor:g} at least)"
    )


def _budgets(results: Results) -> list[str]:
    study, lines = results.study, list[str]()
    if study.epochs:
        lines.append(
            f"Budgets of {listed(sorted(epochs_of(results).values()))} epochs: each has its own sequential runs of as "
            "many epochs, its own schedule of the learning rate, which ends with the budget, and its own searches for "
            "tuned arms. A warm-up keeps its epochs."
        )
    if EQUAL_UPDATES in study.arms:
        lines.append(
            "Sequential, as few updates: the batch of one rank, and as many optimizer steps as the weak run at W makes "
            "in its epochs; schedule, warm-up and the time between validations take the same share of the run. It is "
            "compared with sequential runs (what fewer updates lose), and weak runs with it (what the batch itself "
            "loses). Both count among the comparisons. It sees W times fewer samples than the weak run. It may have "
            "fewer models to choose from, because a run validates once an epoch at most. Tuned arms have a control "
            "that is tuned at each W; LARS and LAMB have none. A cause is read from these verdicts alone."
        )
    if study.target is not None:
        lines.append(
            f"Updates and epochs to the target (Shallue et al. 2019): the first validation at which "
            f"{metric_name(results)} is {study.target:g} or better. A run that never is so counts as infinite. "
            "This describes runs, and judges none."
        )
    return lines


def _tuning(results: Results) -> list[str]:
    """How settings are searched, if any arm's are."""
    tuning = results.study.tuning
    if not results.declared["searches"]:
        return []
    extra = [f"warm-ups of {_numbers(tuning.warmup_epochs)} epochs"] if tuning.warmup_epochs else []
    extra += [f"momenta of {_numbers(tuning.momentum)}"] if tuning.momentum else []
    lines = [
        f"Tuned arms (Shallue et al. 2019): {tuning.searches} independent searches for each W and for the sequential "
        "runs, each for one judged run. A search tries rates within a factor of "
        f"{tuning.spread:g} around a centre, at most a factor of {tuning.spacing:g} apart and moved at random"
        + (f", with {' and '.join(extra)}" if extra else "")
        + f"; one of {tuning.reduction} settings gets the next seed, up to {tuning.seeds} seeds. "
        f"{results.study.tuning_metric} decides. If a rule with the base's rate beats a tuned arm, its search has "
        f"failed, and its loss is no verdict (beats: by the sign test at {results.rules.alpha:g})."
    ]
    if {"weak_lars", "weak_lamb"} & set(results.study.arms):
        lines.append(
            "LARS (You et al. 2017) with the linear rule and LAMB (You et al. 2020) with the square-root rule, both "
            "with warm-up over 5 epochs, are compared with sequential runs of their own. Their settings are searched "
            "with the batch of one rank, like those of these sequential runs."
        )
    return lines


def _numbers(numbers: list[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> 0 to 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]:,}" if len(run) == 1 else f"{run[0]:,} to {run[-1]:,}" for run in runs)
