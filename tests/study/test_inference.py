"""Statistics against scipy, values known by hand, and simulated studies whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from trainer.study.arms import Place
from trainer.study.inference import (
    DRAWS,
    Judgement,
    Rules,
    holm,
    judge,
    mean_interval,
    rate_interval,
    seeds_needed,
    sign_flip_p,
    smallest_p,
)

# Intervals and tests


def test_interval_of_a_mean() -> None:
    values = [0.91, 0.93, 0.92, 0.95, 0.9]
    wanted = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert mean_interval(values, 0.05) == pytest.approx(wanted)
    assert all(map(math.isnan, mean_interval([0.9], 0.05)))


def test_interval_of_a_rate() -> None:
    """All of ten: the lower limit is 0.025^(1/10), the upper 1 (Clopper and Pearson 1934)."""
    assert rate_interval(10, 10, 0.05) == pytest.approx((0.025**0.1, 1.0))
    assert rate_interval(0, 10, 0.05) == pytest.approx((0.0, 1 - 0.025**0.1))
    low, high = rate_interval(3, 10, 0.05)
    assert stats.binom.sf(2, 10, low) == pytest.approx(0.025)
    assert stats.binom.cdf(3, 10, high) == pytest.approx(0.025)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_sign_flips_are_scipys_permutation_test(n: int) -> None:
    random = np.random.default_rng(n)
    for shift in (-0.5, 0.0, 0.5, 3.0):
        d = random.normal(shift, 1, n)
        wanted = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", alternative="greater", n_resamples=10_000
        )
        assert sign_flip_p(d) == pytest.approx(wanted.pvalue)


def test_sign_flips_by_hand() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0]) == 1 / 8
    assert sign_flip_p([-1.0, 2.0, 3.0]) == 2 / 8  # 4 and 6
    assert sign_flip_p([0.0, 2.0, 3.0]) == 2 / 8  # a zero has no sign: half the evidence is gone
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([]) == 1.0


def test_sums_equal_on_paper_count_as_equal() -> None:
    """0.1 + 0.2 - 0.3 is not 0 in floating point, and accuracies are such numbers."""
    assert sign_flip_p([0.1, 0.2, -0.3]) == sign_flip_p([1.0, 2.0, -3.0]) == 5 / 8


def test_many_seeds_are_drawn() -> None:
    d = np.random.default_rng(0).normal(0.3, 1, 40)
    exact = float(stats.norm.sf(d.sum() / math.sqrt((d**2).sum())))
    assert sign_flip_p(d) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(d) == sign_flip_p(d)
    assert sign_flip_p([1.0] * 40) == smallest_p(40) == 1 / (DRAWS + 1)


def test_holm() -> None:
    """Holm 1979: 0.01 x 4, 0.02 x 3 = 0.06, 0.03 x 2 = 0.06, 0.04 x 1 -> 0.06 (never below the one before)."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_seeds_needed() -> None:
    assert seeds_needed(1, 0.05) == 5  # 1/32 = 0.031
    assert seeds_needed(25, 0.05) == 9  # 25/512 = 0.049
    assert seeds_needed(26, 0.05) == 10


# Verdicts

SEEDS = range(10)
BASE = Place("", "sequential", "epochs", 1)
WEAK_AT_8 = Place("", "weak", "epochs", 8)


def one(weak: dict[int, float | None], sequential: dict[int, float | None], rules: Rules, tests: int = 1) -> Judgement:
    return judge({BASE: sequential}, {WEAK_AT_8: weak}, rules, tests)


def accuracies(mean: float, n: int = 10, seed: int = 0) -> dict[int, float | None]:
    return {i: float(v) for i, v in enumerate(np.random.default_rng(seed).normal(mean, 0.005, n))}


def test_numbers_of_a_comparison() -> None:
    sequential: dict[int, float | None] = {0: 0.9, 1: 0.92, 2: 0.94}
    j = one({0: 0.8, 1: 0.85, 2: None}, sequential, Rules(deviation_floor=0.001))
    (c,) = j.comparisons
    r = j.references[BASE]
    assert (r.mean, r.deviation) == (pytest.approx(0.92), pytest.approx(0.02))
    assert r.target == pytest.approx(0.86)
    assert c.differences == pytest.approx([-0.1, -0.07])  # by seed
    assert (c.mean, c.difference, c.failures) == (pytest.approx(0.825), pytest.approx(-0.085), 3)


def test_the_floor_and_a_given_target() -> None:
    alike: dict[int, float | None] = dict.fromkeys(SEEDS, 0.9)
    assert one(alike, alike, Rules(deviation_floor=0.01)).references[BASE].target == pytest.approx(0.87)
    assert one(alike, alike, Rules(target=0.5)).references[BASE].target == 0.5
    assert one(alike, alike, Rules(higher_is_better=False, deviation_floor=0.01)).references[
        BASE
    ].target == pytest.approx(0.93)


@pytest.mark.parametrize(
    ("mean", "loses", "fails"),
    [(0.7, "supported", "supported"), (0.95, "contradicted", "contradicted"), (1.2, "contradicted", "contradicted")],
)
def test_plain_cases(mean: float, loses: str, fails: str) -> None:
    (c,) = one(accuracies(mean, seed=1), accuracies(0.95), Rules(), tests=40).comparisons
    assert c.verdicts == {"loses": loses, "fails": fails}


def test_where_less_is_better() -> None:
    (c,) = one(accuracies(2.0, seed=1), accuracies(1.0), Rules(higher_is_better=False)).comparisons
    assert c.verdicts == {"loses": "supported", "fails": "supported"}
    (c,) = one(accuracies(0.5, seed=1), accuracies(1.0), Rules(higher_is_better=False)).comparisons
    assert c.verdicts == {"loses": "contradicted", "fails": "contradicted"}


def test_every_place_is_compared_with_its_own_reference() -> None:
    """A tuned arm with tuned runs, a variant with its own: here both lose by the same, whatever the others do."""
    tuned, sizes = Place("", "sequential_tuned", "epochs", 1), Place("100 samples", "sequential", "epochs", 1)
    j = judge(
        {BASE: accuracies(0.5), tuned: accuracies(0.95), sizes: accuracies(0.3)},
        {
            Place("", "weak_tuned", "epochs", 8): accuracies(0.75),
            Place("100 samples", "weak", "epochs", 8): accuracies(0.1),
        },
        Rules(),
    )
    assert [c.difference for c in j.comparisons] == pytest.approx([-0.2, -0.2])
    assert [c.failures for c in j.comparisons] == [10, 10]
    assert j.references[tuned].target == pytest.approx(0.935, abs=0.01)


def test_few_seeds_never_give_a_verdict() -> None:
    """However clear they look."""
    for n, tests in ((2, 1), (4, 1), (9, 40)):
        for mean in (0.1, 0.95, 1.5):
            (c,) = one(accuracies(mean, n, 1), accuracies(0.95, n), Rules(), tests).comparisons
            assert c.verdicts == {"loses": "undecided", "fails": "undecided"}
            assert all("not enough evidence" in sentence for sentence in c.sentences.values())


def test_nothing_is_decided_before_all_declared_seeds_are_there() -> None:
    weak, sequential = accuracies(0.1, 9), accuracies(0.95)
    for a, b in ((weak, sequential), (accuracies(0.1), accuracies(0.95, 9))):
        (c,) = judge({BASE: b}, {WEAK_AT_8: a}, Rules(), 1, 10).comparisons
        assert c.verdicts == {"loses": "undecided", "fails": "undecided"}
        assert all(s.endswith("1 of the declared seeds is missing") for s in c.sentences.values())
    (c,) = judge({BASE: sequential}, {WEAK_AT_8: accuracies(0.1)}, Rules(), 1, 10).comparisons
    assert c.verdicts == {"loses": "supported", "fails": "supported"}


def test_what_lies_between_is_undecided() -> None:
    """A loss of about the margin: neither shown nor ruled out."""
    weak = {i: v - 0.01 * (-1) ** i - 0.004 for i, v in accuracies(0.95).items() if v is not None}
    (c,) = one({**weak}, accuracies(0.95), Rules()).comparisons
    assert c.verdicts["loses"] == "undecided"


def test_a_loss_below_the_margin_is_a_loss_and_says_so() -> None:
    weak = {i: v - 0.001 for i, v in accuracies(0.95).items() if v is not None}
    (c,) = one({**weak}, accuracies(0.95), Rules()).comparisons
    assert c.verdicts["loses"] == "supported"
    assert "below the margin" in c.sentences["loses"]


def test_runs_that_are_not_finite_never_speak_for_weak_scaling() -> None:
    weak: dict[int, float | None] = accuracies(0.95, seed=1)
    weak[3] = None
    (c,) = one(weak, accuracies(0.95), Rules()).comparisons
    assert c.verdicts["loses"] == "undecided"
    assert "1 more not finite" in c.sentences["loses"]
    assert c.failures == 1
    (c,) = one(dict.fromkeys(SEEDS), accuracies(0.95), Rules()).comparisons
    assert c.verdicts == {"loses": "undecided", "fails": "supported"}
    assert "no run of it has a metric" in c.sentences["loses"]


def test_runs_that_are_missing_count_as_tests() -> None:
    (c,) = one(accuracies(0.7, seed=1), accuracies(0.95), Rules(), tests=60).comparisons
    assert c.verdicts["loses"] == "undecided"  # 60 / 1024 > 0.05


# Studies whose truth is known


def simulate(loss: float, arms: int, studies: int, seed: int) -> list[Judgement]:
    """Sequential N(0.95, 0.01), and arms that lie `loss` below, ten seeds; accuracies of 300 samples."""
    random = np.random.default_rng(seed)

    def draw(mean: float) -> dict[int, float | None]:
        return {s: float(v) for s, v in enumerate(np.round(random.normal(mean, 0.01, 10) * 300) / 300)}

    return [
        judge(
            {BASE: draw(0.95)},
            {Place("", "weak", "epochs", 2**w): draw(0.95 - loss) for w in range(1, arms + 1)},
            Rules(),
        )
        for _ in range(studies)
    ]


def test_a_loss_that_is_not_there_is_rarely_found() -> None:
    """In at most 5 % of the studies at least one of the five: 15 of 300 expected at most, 27 is 3 deviations more."""
    studies = simulate(0.0, 5, 300, seed=1)
    wrong = sum(any(c.verdicts["loses"] == "supported" for c in s.comparisons) for s in studies)
    assert wrong <= 27
    assert not any(c.verdicts["fails"] == "supported" for s in studies for c in s.comparisons)


def test_a_loss_of_the_margin_is_rarely_ruled_out() -> None:
    studies = simulate(0.01, 5, 300, seed=2)
    wrong = sum(any(c.verdicts["loses"] == "contradicted" for c in s.comparisons) for s in studies)
    assert wrong <= 27


def test_large_losses_are_found() -> None:
    studies = simulate(0.05, 5, 100, seed=3)
    found = sum(c.verdicts["loses"] == "supported" for s in studies for c in s.comparisons)
    assert found >= 0.99 * 500
    gains = simulate(-0.05, 5, 100, seed=4)
    assert sum(c.verdicts["loses"] == "contradicted" for s in gains for c in s.comparisons) >= 0.99 * 500
