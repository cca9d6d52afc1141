"""Does a loss fall with the training samples: verdicts by hand, and how often they are wrong, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.study.made_up import results
from trainer.study.arms import Place
from trainer.study.judgement import Outcome, Rules, judge
from trainer.study.results import Results
from trainer.study.sentences import verdicts
from trainer.study.trend import Trend, families_of, score, trend_sentences, trends

ALPHA, INF = 0.05, math.inf
SIZES = {"150 samples": 150, "300 samples": 300, "600 samples": 600, "": 1200}


def place(variant: str, W: int = 4, arm: str = "weak", budget: str = "epochs") -> Place:
    return Place(variant, arm, "updates" if budget == "updates" else "epochs", W)


def study(losses: np.ndarray, planned: int | None = None) -> list[Trend]:
    """The trends of (W, sizes, seeds) losses, from the smallest size on; inf is a run that is not finite."""
    seeds = losses.shape[-1]
    reference = {Place(v, "sequential", "epochs", 1): {s: Outcome(0.9) for s in range(seeds)} for v in SIZES}
    weak = {
        place(v, W + 2): {s: Outcome(None if math.isinf(x) else 0.9 - x) for s, x in enumerate(losses[W, k].tolist())}
        for W in range(len(losses))
        for k, v in enumerate(SIZES)
    }
    return trends(judge(reference, weak, Rules()), SIZES, dict.fromkeys(weak, planned or seeds))


def rows(*by_size: Sequence[float]) -> np.ndarray:
    return np.array([by_size])


def test_the_score_counts_pairs_of_sizes() -> None:
    """Kendall's: six pairs of four sizes. Equal losses are a tie, also two infinite ones."""
    assert score([4.0, 3.0, 2.0, 1.0]) == 6
    assert score([1.0, 2.0, 3.0, 4.0]) == -6
    assert score([4.0, 1.0, 2.0, 2.0]) == 3 - 2
    assert score([INF, INF, 1.0, 0.0]) == 5
    assert score([math.nan, 2.0, 1.0]) == 1
    assert score([1.0, 1.0]) == 0


def test_falling_losses() -> None:
    (t,) = study(rows([0.08] * 10, [0.07] * 10, [0.03] * 10, [0.0] * 10))
    assert (t.verdict, t.samples, set(t.scores.values())) == ("falls", [150, 300, 600, 1200], {6})
    assert t.adjusted == 2.0**-10
    assert study(rows([0.0] * 10, [0.03] * 10, [0.07] * 10, [0.08] * 10))[0].verdict == "not shown"
    assert study(rows([0.05] * 10, [0.05] * 10, [0.05] * 10, [0.05] * 10))[0].verdict == "not shown"
    assert study(rows([INF] * 10, [INF] * 10, [0.07] * 10, [0.08] * 10))[0].verdict == "falls"


def test_nothing_is_said_before_all_seeds_are_there_or_of_too_few() -> None:
    falling = rows([0.08] * 10, [0.07] * 10, [0.03] * 10, [0.0] * 10)
    assert study(falling, planned=12)[0].unable == "2 of the declared seeds are missing"
    few = study(np.concatenate([falling[..., :4]] * 3))
    assert {t.unable for t in few} == {"4 seeds cannot decide one of 3 trends; at least 6 are needed"}
    assert {t.verdict for t in few} == {"not shown"}


def test_only_sizes_of_one_arm_budget_and_w_are_a_family() -> None:
    """A W that is too large for the smallest subset has one size less; a variant is no size."""
    of = {place(v) for v in SIZES} | {place(v, 8) for v in ("600 samples", "")} | {place("", 16), place("cnn")}
    of |= {place(v, budget="updates") for v in ("150 samples", "300 samples")}
    found = families_of(of, SIZES)
    assert {str(base): len(places) for base, places in found.items()} == {
        "weak, W = 4": 4, "weak, W = 8": 2, "weak, W = 4, equal updates": 2,
    }  # fmt: skip


# How often a trend is called one that is none. Each draws (sizes, seeds) losses without a trend.

SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda r, n: r.normal(0.05, 0.01, (4, n)),
    # Of few samples runs scatter more: the losses of a seed cannot be exchanged.
    "scattered": lambda r, n: (
        r.normal(0.05, 0.01, (4, n)) * np.array([[8.0], [4.0], [2.0], [1.0]]) ** 0.5
        + 0.05 * (1 - np.array([[8.0], [4.0], [2.0], [1.0]]) ** 0.5)
    ),
    "heavy tails": lambda r, n: 0.05 + 0.01 * r.standard_t(1.5, (4, n)),
    "collapsing": lambda r, n: np.where(r.random((4, n)) < 0.2, np.inf, r.normal(0.05, 0.01, (4, n))),
    "shared": lambda r, n: r.normal(0.05, 0.02, n) + r.normal(0, 0.003, (4, n)),
}


def share(shape: str, slope: float, count: int, seeds: int) -> float:
    """How often any of three W is said to fall; each doubling of the samples takes off `slope`."""
    random, found = np.random.default_rng(13), 0
    for _ in range(count):
        losses = np.stack([SHAPES[shape](random, seeds) for _ in range(3)])
        found += any(t.verdict == "falls" for t in study(losses - slope * np.arange(4)[None, :, None]))
    return found / count


@pytest.mark.parametrize(("seeds", "count"), [(12, 40), pytest.param(40, 400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_trend_is_seldom_called_one(shape: str, seeds: int, count: int) -> None:
    assert share(shape, 0.0, count, seeds) <= ALPHA + 3.1 * math.sqrt(ALPHA * (1 - ALPHA) / count)
    assert share(shape, -0.02, min(count, 20), seeds) == 0.0, "losses that rise"


def test_a_trend_is_found() -> None:
    """It falls by a deviation with each doubling, in 20 seeds."""
    assert share("normal", 0.01, 20, 20) == 1.0
    assert share("collapsing", 0.02, 20, 20) > 0.7, "a fifth of the runs are not finite, at any size"


# Sentences


def test_what_a_study_says_of_its_sizes(tmp_path: Path) -> None:
    """A material loss at 300 and none at 1,200 is a trend only if the seeds agree on it, of each W."""
    folder = results(
        tmp_path,
        lost=lambda cell: cell.world_size == 8 and cell.variant == "300 samples",
        arms=["weak"],
        world_sizes=[2, 8],
        dataset_sizes=[300, 600],
    )
    falls, none = sorted(trend_sentences(Results(folder)), key=lambda line: "not shown" in line)
    assert "equal epochs, W = 8: the loss falls with the number of samples (300, 600, 1,200)." in falls
    assert "in 10 of 10 seeds, and rises more often in 0 (95 % interval of the first share 0.69 to 1.00" in falls
    assert "W = 2: the loss is not shown to fall" in none
    assert falls in verdicts(folder)
