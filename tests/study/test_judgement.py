"""Verdicts of single comparisons. How often verdicts are wrong is in test_levels.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from trainer.study.arms import Place
from trainer.study.judgement import Comparison, Judgement, Outcome, Rules, judge

SEEDS = range(12)
BASE = Place("", "sequential", "epochs", 1)
WEAK_AT_8 = Place("", "weak", "epochs", 8)


def runs(values: Sequence[float | None]) -> dict[int, Outcome]:
    return {seed: Outcome(value) for seed, value in enumerate(values)}


def accuracies(mean: float, n: int = 12, seed: int = 0, sd: float = 0.003) -> list[float]:
    return np.random.default_rng(seed).normal(mean, sd, n).tolist()


def one(
    weak: Sequence[float | None], sequential: Sequence[float | None], tests: int = 1, **rules: Any
) -> tuple[Comparison, Judgement]:
    planned = {Place("", "weak", "epochs", 2**k): len(sequential) for k in range(3, 3 + tests)}
    judged = judge({BASE: runs(sequential)}, {WEAK_AT_8: runs(weak)}, Rules(**rules), planned)
    return judged.comparisons[0], judged


def verdict(weak: Sequence[float | None], sequential: Sequence[float | None], **more: Any) -> str:
    return one(weak, sequential, **more)[0].verdicts["loses"]


# The typical run


@pytest.mark.parametrize(
    ("loss", "wanted"), [(0.3, "material loss"), (0.02, "material loss"), (0.005, "small loss"), (-0.2, "ruled out")]
)
def test_four_verdicts(loss: float, wanted: str) -> None:
    sequential = accuracies(0.95, sd=0.0005)
    weak = [v - loss + 0.0001 * (-1) ** i for i, v in enumerate(sequential)]
    c, _ = one(weak, sequential)
    assert c.verdicts["loses"] == wanted
    low, high = sorted(-end for end in c.difference_interval)
    assert wanted == ("material loss" if low > 0.01 else "small loss" if low > 0 else "ruled out")
    assert (high < 0.01) == (wanted != "material loss")
    less = [2 - v for v in weak], [2 - v for v in sequential]
    assert one(*less, higher_is_better=False)[0].verdicts["loses"] == wanted


def test_what_lies_between_is_undecided_and_says_what_is_known() -> None:
    sequential = [0.95] * 12
    c, _ = one([0.94 - 0.005 * (-1) ** i for i in SEEDS], sequential)  # around the margin, and always a loss
    assert c.verdicts["loses"] == "undecided"
    assert "the typical run loses; whether it loses 0.01 is not shown" in c.sentences["loses"] and c.size_open
    c, _ = one([0.95 - 0.02 * (i % 2) for i in SEEDS], sequential)
    assert c.verdicts["loses"] == "undecided"
    assert "neither shown nor ruled out" in c.sentences["loses"] and not c.size_open


def test_a_loss_of_exactly_the_margin_is_nothing_but_that() -> None:
    """Ties count against both: 0.94 is neither more nor less than 0.01 below 0.95."""
    assert verdict([0.9375] * 12, [0.953125] * 12, margin=0.015625) == "undecided"
    assert verdict([0.95] * 12, [0.95] * 12) == "ruled out"
    # Three of 300 test samples: the difference of the two accuracies is 0.01 but for a rounding error, often above it.
    fewer = [(k - 3) / 300 for k in range(280, 292)], [k / 300 for k in range(280, 292)]
    assert verdict(*fewer) == "undecided"
    assert one(*fewer, collapse=0.01)[0].collapsed == 12


def test_both_halves_stand_in_the_sentence() -> None:
    """The typical run loses nothing; that up to 22 % of runs collapse is not ruled out."""
    c, _ = one(accuracies(0.97), accuracies(0.95, seed=1))
    assert c.verdicts["loses"] == "ruled out"
    assert "a loss of 0.01 is ruled out for the typical run. 0 of 12 collapsed" in c.sentences["loses"]
    assert c.sentences["loses"].endswith("up to 22 % is not ruled out")
    c, _ = one([*accuracies(0.97)[:10], 0.5, None], accuracies(0.95, seed=1), alpha=0.05)
    assert (c.collapsed, c.not_finite) == (2, 1)
    assert "2 of 12 collapsed (not finite, or a loss of 0.1 or more): up to 44 %" in c.sentences["loses"]
    assert one([0.94] * 12, [0.95] * 12, collapse=0.005)[0].collapsed == 12


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_no_difference_is_neither_higher_nor_minus_nothing(higher_is_better: bool) -> None:
    c, _ = one([0.95] * 12, [0.95] * 12, higher_is_better=higher_is_better)
    assert c.sentences["loses"].startswith("no difference in the typical run (interval +0.0000 to +0.0000, 12 seeds)")
    assert f"{c.difference:+.4f}" == "+0.0000"


def test_few_seeds_never_give_a_verdict() -> None:
    """However clear they look."""
    for n, tests in ((4, 1), (9, 40)):
        for mean in (0.1, 0.95, 1.5):
            c, _ = one(accuracies(mean, n, 1), accuracies(0.95, n), tests)
            assert c.verdicts == {"loses": "undecided", "below": "not shown", "unconverged": "not shown"}
            assert f"{n} seeds cannot decide one of {tests} comparisons; at least" in c.sentences["loses"]
    assert verdict(accuracies(0.7, 12, 1), accuracies(0.95), tests=60) == "material loss"
    assert verdict(accuracies(0.7, 10, 1), accuracies(0.95, 10), tests=60) == "undecided"  # 60 / 1024 > 0.05


def test_nothing_is_decided_before_all_declared_seeds_are_there() -> None:
    bad, good = accuracies(0.1), accuracies(0.95)
    for weak, sequential in ((bad[:11], good), (bad, good[:11])):
        planned = {WEAK_AT_8: 12}
        (c,) = judge({BASE: runs(sequential)}, {WEAK_AT_8: runs(weak)}, Rules(), planned).comparisons
        assert c.verdicts == {"loses": "undecided", "below": "not shown", "unconverged": "not shown"}
        assert "1 of the declared seeds is missing" in c.sentences["loses"]
        assert "1 of the declared seeds is missing" in c.sentences["below"]
    assert one(bad, good)[0].verdicts["below"] == "more often"


def test_every_place_is_compared_with_its_own_reference() -> None:
    """A tuned arm with tuned runs, LARS with LARS, a variant with its own: all lose by the same."""
    pairs = {
        Place("", "weak_tuned", "epochs", 8): Place("", "sequential_tuned", "epochs", 1),
        Place("", "weak_lars", "epochs", 8): Place("", "sequential_lars", "epochs", 1),
        Place("100 samples", "weak", "epochs", 8): Place("100 samples", "sequential", "epochs", 1),
    }
    sequential = {place: runs(accuracies(0.3 + 0.2 * i)) for i, place in enumerate(pairs.values())}
    weak = {place: runs(accuracies(0.1 + 0.2 * i)) for i, place in enumerate(pairs)}
    j = judge(sequential | {BASE: runs(accuracies(0.99))}, weak, Rules())
    assert [c.difference for c in j.comparisons] == pytest.approx([-0.2] * 3)


# Runs that are not finite


def test_runs_that_are_not_finite_are_the_worst_of_all() -> None:
    weak: list[float | None] = [*accuracies(0.97, seed=1)]
    weak[3] = None
    c, _ = one(weak, accuracies(0.95))
    assert (c.collapsed, c.not_finite, c.counts["below"].failed, c.counts["unconverged"].failed) == (1, 1, 1, 1)
    assert c.losses[3] == math.inf
    c, _ = one([None] * 12, accuracies(0.95))
    assert c.verdicts == {"loses": "material loss", "below": "more often", "unconverged": "more often"}
    assert "the typical run is not finite (12 seeds, 12 of them not finite)" in c.sentences["loses"]


def test_sequential_runs_that_vanish_are_counted() -> None:
    """Five of twelve are left, and weak runs are as good as these: seven times weak scaling alone was finite."""
    good = accuracies(0.95, seed=1)
    weak = accuracies(0.95)
    c, j = one(weak, [*good[:5], *[None] * 7])
    assert j.references[BASE].not_finite == 7
    assert j.references[BASE].failed == {"below": 7, "unconverged": 7}
    assert c.losses[5:] == [-math.inf] * 7
    # Where both vanish, nothing is known; that was "contradicted" from the five others.
    c, _ = one([*weak[:5], *[None] * 7], [*good[:5], *[None] * 7])
    assert c.verdicts == {"loses": "undecided", "below": "not shown", "unconverged": "not shown"}
    assert "7 of 12 sequential runs" in c.sentences["below"]


def test_all_vanish() -> None:
    """No number of theirs is nan in a sentence, and nobody is worse than they are."""
    c, j = one([None] * 12, [None] * 12)
    assert c.verdicts == {"loses": "undecided", "below": "not shown", "unconverged": "not shown"}
    assert c.sentences["loses"].startswith("no pair of runs is finite")
    assert not any("nan" in sentence for sentence in c.sentences.values())
    assert math.isnan(j.references[BASE].target)
    c, _ = one(accuracies(0.95), [None] * 12)
    assert c.verdicts["loses"] == "ruled out"
    assert "the typical sequential run is not finite" in c.sentences["loses"]


# Runs that fail


def test_below_the_target_is_not_a_failure_to_converge() -> None:
    """92 % where sequential runs have 95 % is below the target; the training loss says that it converged."""
    sequential = {s: Outcome(v, 2.3, 0.05) for s, v in enumerate(accuracies(0.95))}
    weak = {s: Outcome(v, 2.3, 0.1) for s, v in enumerate(accuracies(0.92, seed=1))}
    (c,) = judge({BASE: sequential}, {WEAK_AT_8: weak}, Rules()).comparisons
    assert c.verdicts["below"] == "more often"
    assert (c.counts["unconverged"].failed, c.verdicts["unconverged"]) == (0, "not shown")
    stuck = {s: Outcome(o.metric, 2.3, 0.5) for s, o in weak.items()}  # came down by 80 % of 2.25
    (c,) = judge({BASE: sequential}, {WEAK_AT_8: stuck}, Rules()).comparisons
    assert c.verdicts["unconverged"] == "more often"
    (c,) = judge({BASE: sequential}, {WEAK_AT_8: stuck}, Rules(converged_share=0.75)).comparisons
    assert c.counts["unconverged"].failed == 0


def test_a_sequential_run_can_miss_its_own_target() -> None:
    """Of ten: with its own value in the mean and the deviation, none can be three deviations away."""
    sequential = [*accuracies(0.95, 9), 0.7]
    _, j = one(accuracies(0.95, 10, 1), sequential)
    assert j.references[BASE].failed["below"] == 1


def test_as_often_as_the_sequential_runs_is_not_more_often() -> None:
    """Nine of twelve miss a target that nine of twelve sequential runs miss, too."""
    values = [*accuracies(0.5, 9), *accuracies(0.95, 3)]
    c, _ = one(values, values, target=0.9)
    assert (c.counts["below"].failed, c.counts["below"].of_reference) == (9, 9)
    assert c.verdicts["below"] == "not shown"
    assert "9 of 12 runs (95 % interval 0.43 to 0.95), 9 of 12 sequential runs" in c.sentences["below"]


def test_targets() -> None:
    alike = [0.9] * 12
    reference = lambda **rules: one(alike, alike, **rules)[1].references[BASE]  # noqa: E731
    assert reference(target=0.5).target == 0.5
    assert reference(deviation_floor=0.01).target == pytest.approx(0.9 - 2.718 * 0.01 * math.sqrt(13 / 12), abs=1e-4)
    assert reference(deviation_floor=0.01, higher_is_better=False).target > 0.92


# Searches that failed

TUNED, RULE = Place("", "weak_tuned", "epochs", 8), Place("", "weak_sqrt", "epochs", 8)
SEQUENTIAL_TUNED = Place("", "sequential_tuned", "epochs", 1)


def tuned(own: Sequence[float], rule: Sequence[float], reference: Sequence[float], base: Sequence[float]) -> Comparison:
    sequential = {BASE: runs(base), SEQUENTIAL_TUNED: runs(reference)}
    j = judge(sequential, {TUNED: runs(own), RULE: runs(rule)}, Rules())
    return next(c for c in j.comparisons if c.place == TUNED)


def test_a_tuned_arm_that_a_rule_beats_is_a_failed_search() -> None:
    base: Callable[[int], list[float]] = lambda seed: accuracies(0.95, seed=seed)  # noqa: E731
    c = tuned(accuracies(0.9), accuracies(0.94, seed=1), base(2), base(3))
    assert c.verdicts["loses"] == "undecided"
    assert (
        "the search failed, so a loss says nothing of the batch: weak_tuned is beaten by weak_sqrt"
        in (c.sentences["loses"])
    )
    c = tuned(accuracies(0.9), accuracies(0.9, seed=1), base(2), base(3))
    assert (c.verdicts["loses"], c.search_failed) == ("material loss", "")
    # A loss that is ruled out stays so: a better search would only rule it out with more right.
    c = tuned(accuracies(0.96), accuracies(0.98, seed=1), base(2), base(3))
    assert c.verdicts["loses"] == "ruled out"
    # Where the sequential search failed, its runs are too easy to reach.
    c = tuned(accuracies(0.95), accuracies(0.9, seed=1), accuracies(0.93, seed=2), base(3))
    assert c.verdicts["loses"] == "undecided"
    assert "sequential_tuned is beaten by sequential, which is not tuned, in 12 of 12 seeds" in c.sentences["loses"]
