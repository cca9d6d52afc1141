"""Entities of tagged sentences, against numbers that seqeval 1.2.2 gave."""

from __future__ import annotations

import random

import pytest

from trainer.tasks.entities import entities, metrics


def test_entities_of_every_scheme() -> None:
    assert entities(["O", "B-a", "I-a", "O", "B-a", "B-a"]) == {("a", 1, 2), ("a", 4, 4), ("a", 5, 5)}
    old = ["I-a", "I-a", "I-b", "B-b"]
    assert entities(old) == {("a", 0, 1), ("b", 2, 2), ("b", 3, 3)}, "IOB1, and a change of kind"
    for last, single in ("ES", "LU"):
        tags = [f"{single}-a", "B-a", "I-a", f"{last}-a", "O"]
        assert entities(tags) == {("a", 0, 0), ("a", 1, 3)}
    assert entities(["B-per-son", "I-per-son"]) == {("per-son", 0, 1)}
    assert entities([]) == entities(["O"]) == set()


# What seqeval gives for the sentences that `sentences` draws: precision, recall, F1.
SEQEVAL = {
    "BI": (0.7200447928331467, 0.7331812998859749, 0.7265536723163842),
    "BIES": (0.7620423892100193, 0.7732160312805474, 0.767588549247938),
}


def sentences(letters: str) -> tuple[list[list[str]], list[list[str]]]:
    """200 sentences of random tags, and the same with 3 of 10 tags changed."""
    draws = random.Random(0)
    tags = ["O", *(f"{letter}-{kind}" for letter in letters for kind in ("per", "loc"))]
    truth = [[draws.choice(tags) for _ in range(draws.randint(1, 12))] for _ in range(200)]
    return [[tag if draws.random() < 0.7 else draws.choice(tags) for tag in own] for own in truth], truth


@pytest.mark.parametrize("letters", list(SEQEVAL))
def test_metrics_are_those_of_seqeval(letters: str) -> None:
    predicted, truth = sentences(letters)
    assert tuple(metrics(predicted, truth).values()) == pytest.approx(SEQEVAL[letters], abs=1e-12)


def test_no_entity_is_no_division() -> None:
    assert set(metrics([["O"]], [["O"]]).values()) == {0.0}
