"""Is a loss another one with a variant: verdicts by hand, and how often they are wrong and found, by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.study.made_up import results
from trainer.study.arms import Place
from trainer.study.interaction import Interaction, interaction_sentences, interactions, interactions_in, pairs_of
from trainer.study.judgement import Judgement, Outcome, Rules, judge
from trainer.study.results import Results

ALPHA = 0.05
V = "group norm"
Values = Sequence[float | None]


def runs(values: Values) -> dict[int, Outcome]:
    return dict(enumerate(map(Outcome, values)))


def judged(losses: dict[Place, Values], sequential: dict[str, Values]) -> tuple[Judgement, dict[Place, int]]:
    """A study whose weak runs lose so much against the sequential runs of their variant; None is not finite."""
    weak = {
        place: runs([None if loss is None else (own or 0.0) - loss for loss, own in zip(of, sequential[place.variant])])
        for place, of in losses.items()
    }
    reference = {Place(v, "sequential", "epochs", 1): runs(values) for v, values in sequential.items()}
    return judge(reference, weak, Rules()), {place: len(of) for place, of in losses.items()}


def place(variant: str, W: int = 8, arm: str = "weak") -> Place:
    return Place(variant, arm, "epochs", W)


def one(base: Values, variant: Values, sequential: dict[str, Values] | None = None) -> Interaction:
    n = len(base)
    j, planned = judged({place(""): base, place(V): variant}, sequential or {"": [0.9] * n, V: [0.8] * n})
    (found,) = interactions(j, [V], planned)
    return found


def test_the_losses_are_compared_and_not_the_metrics() -> None:
    """The variant is worse by 0.1 in every arm, which is no interaction."""
    assert one([0.05] * 12, [0.05] * 12).verdict == "not shown"
    # Equal losses of 300 test samples, which differ by rounding errors alone.
    thirds = [k / 300 for k in range(1, 13)]
    assert set(one(thirds, thirds, {"": [0.9] * 12, V: [0.94] * 12}).differences.values()) == {0.0}
    found = one([0.05] * 12, [0.08] * 12)
    assert (found.verdict, found.place) == ("larger", place(V))
    assert list(found.differences.values()) == pytest.approx([0.03] * 12)
    assert found.adjusted == pytest.approx(2 * 2.0**-12), "two directions of one place"
    assert one([0.05] * 12, [0.02] * 12).verdict == "smaller"


def test_runs_that_are_not_finite() -> None:
    """An infinite loss is above any other; two of them tell nothing, and count against both directions."""
    assert one([0.05] * 12, [None] * 12).verdict == "larger"
    assert one([None] * 12, [0.05] * 12).verdict == "smaller"
    both = one([None] * 12, [None] * 12)
    assert (both.verdict, both.untold) == ("not shown", 12)
    mixed = one([0.05] * 9 + [None] * 3, [0.06] * 9 + [None] * 3)  # 9 of 12: p = 0.07, and of nine alone 0.002
    assert (mixed.verdict, mixed.untold) == ("not shown", 3)
    assert one([0.05] * 12, [0.06] * 12, {"": [None] * 12, V: [0.8] * 12}).verdict == "larger"


def test_the_correction_is_over_all_planned_places_and_directions() -> None:
    """Of seven seeds all agree: p = 1/128, which 4 directions allow at 0.05, and 8 do not."""
    sequential: dict[str, Values] = {"": [0.9] * 7, V: [0.8] * 7}
    losses: dict[Place, Values] = {place(""): [0.05] * 7, place(V): [0.08] * 7}
    j, planned = judged(losses, sequential)
    more = {place(v, W): 7 for v in ("", V) for W in (2, 8, 16, 32)}
    assert [i.verdict for i in interactions(j, [V], planned)] == ["larger"]
    found = {i.place.world_size: i for i in interactions(j, [V], more)}
    assert found[8].verdict == "not shown"
    assert found[8].unable == "7 seeds cannot decide one of 4 interactions; at least 8 are needed"
    assert found[2].unable == "7 of the declared seeds are missing"
    # Subsets, other arms than weak ones, and places that the base lacks are no interactions.
    assert pairs_of([place(V), place("400 samples"), place("")], [V]) == [place(V)]
    assert pairs_of([place(V)], [V]) == []


def test_a_search_that_failed_says_nothing_of_the_loss() -> None:
    """A rule with the base's rate beats the tuned arm of the base."""
    tuned = {v: Place(v, "weak_tuned", "epochs", 8) for v in ("", V)}
    rule = Place("", "weak_sqrt", "epochs", 8)
    reference = {Place(v, "sequential_tuned", "epochs", 1): runs([0.9] * 12) for v in ("", V)}
    reference[Place("", "sequential", "epochs", 1)] = runs([0.9] * 12)
    weak = {tuned[""]: runs([0.7] * 12), tuned[V]: runs([0.6] * 12), rule: runs([0.8] * 12)}
    (found,) = interactions(judge(reference, weak, Rules()), [V], dict.fromkeys(weak, 12))
    assert found.verdict == "not shown"
    assert found.unable.startswith("a search failed, so a loss says nothing of the batch: weak_tuned is beaten by")


# How often verdicts are wrong. Each draws (places, seeds) differences of losses whose median is 0.

SHAPES: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "normal": lambda r, m, n: r.normal(0, 0.015, (m, n)),
    "heavy tails": lambda r, m, n: 0.01 * r.standard_t(1.5, (m, n)),
    "skewed": lambda r, m, n: r.exponential(0.03, (m, n)) - 0.03 * math.log(2),
    # Both collapse now and then, and a tenth of the runs in both at once.
    "collapsing": lambda r, m, n: np.where(
        r.random((m, n)) < 0.1, np.nan, r.normal(0, 0.01, (m, n)) + 0.3 * (r.integers(-1, 2, (m, n)))
    ),
    "shared": lambda r, m, n: r.normal(0, 0.008, (m, n)) + r.normal(0, 0.01, n),
}


def shown(shape: str, larger: float, count: int, places: int, seeds: int) -> list[list[str]]:
    """The verdicts of so many studies; a difference of nan is two runs that are not finite."""
    random, found = np.random.default_rng(11), []
    for _ in range(count):
        differences = larger + SHAPES[shape](random, places, seeds)
        losses: dict[Place, Values] = {}
        for k, row in enumerate(differences.tolist()):
            base = random.normal(0.05, 0.01, seeds).tolist()
            both = [math.isnan(d) for d in row]
            losses[place("", k + 2)] = [None if gone else b for b, gone in zip(base, both)]
            losses[place(V, k + 2)] = [None if gone else b + d for b, d, gone in zip(base, row, both)]
        j, planned = judged(losses, {"": [0.9] * seeds, V: [0.9] * seeds})
        found.append([i.verdict for i in interactions(j, [V], planned)])
    return found


SIZES = [(4, 12, 60), pytest.param(8, 40, 300, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("places", "seeds", "count"), SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_interaction_is_seldom_called_one(shape: str, places: int, seeds: int, count: int) -> None:
    found = shown(shape, 0.0, count, places, seeds)
    wrong = np.mean([any(v != "not shown" for v in verdicts) for verdicts in found])
    assert wrong <= ALPHA + 3.1 * math.sqrt(ALPHA * (1 - ALPHA) / count)


def test_an_interaction_is_found_and_its_direction_is_right() -> None:
    """A loss that is two deviations larger in 24 seeds: each agrees with probability 0.977."""
    found = shown("normal", 0.03, 10, 4, 24)
    assert {v for verdicts in found for v in verdicts} == {"larger"}
    assert {v for verdicts in shown("heavy tails", -0.06, 10, 4, 24) for v in verdicts} <= {"smaller", "not shown"}


# Sentences


def test_what_a_study_says_of_its_variants(tmp_path: Path) -> None:
    """Weak at W = 8 loses 0.25 with the base, and with the variant nothing."""
    folder = results(
        tmp_path,
        lost=lambda cell: cell.arm == "weak" and cell.world_size == 8 and not cell.variant,
        arms=["weak"],
        variants={V: {"trainer.epochs": 21}},
        dataset_sizes=[400],
        world_sizes=[2, 8],
        budgets=["epochs", "updates"],
    )
    read = Results(folder)
    found = {str(i.place): i.verdict for i in interactions_in(read)}
    assert found[f"{V}: weak, W = 8"] == found[f"{V}: weak, W = 8, equal updates"] == "smaller"
    assert len(found) == 4
    said = interaction_sentences(read)
    assert any(
        line.startswith(
            f"weak, learning rate unchanged, equal updates, W = 8: the loss is smaller with {V}. It differs"
        )
        for line in said
    )
    assert any("W = 2: the loss is not shown to differ with" in line for line in said)
    (tmp_path / "few").mkdir()
    few = Results(results(tmp_path / "few", seeds=3, arms=["weak"], variants={V: {"trainer.epochs": 21}}))
    (said_once,) = interaction_sentences(few)
    assert said_once.startswith("2 interactions with a variant are not shown: 3 seeds cannot decide one of 2")
    (tmp_path / "none").mkdir()
    assert interaction_sentences(Results(results(tmp_path / "none"))) == []
