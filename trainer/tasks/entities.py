"""Entities in tagged sentences, and the F1 of their prediction, as seqeval and the script of CoNLL-2000 count them.

seqeval (version 1.2.2, its default mode) was last published in 2020, and only as source. It is not
imported here: a test compares with numbers that it gave.
"""

from __future__ import annotations

from collections.abc import Sequence

# Letters of the BILOU scheme, as the others write them.
_SAME = {"L": "E", "U": "S"}
Entity = tuple[str, int, int]


def _parts(tag: str) -> tuple[str, str]:
    """The letter and the kind of a tag; ("O", "") outside of entities."""
    return (_SAME.get(tag[0], tag[0]), tag[2:]) if tag[1:2] == "-" else ("O", "")


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of a sentence: (kind, first word, last word).

    An entity begins at B or S, after one that ended, or where the kind changes: a lone I-person is a person. So the
    schemes IOB1, IOB2, IOBES and BILOU are all read right.
    """
    found: set[Entity] = set()
    start, (before, kind) = 0, ("O", "")
    for place, (letter, own) in enumerate([*map(_parts, tags), ("O", "")]):
        inside = before != "O"
        if inside and (before in "ES" or letter in "BSO" or own != kind):
            found.add((kind, start, place - 1))
        if letter in "BS" or (letter in "EI" and (before in "ESO" or own != kind)):
            start = place
        before, kind = letter, own
    return found


def metrics(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over the entities of all sentences; 0 where there are none to divide by.

    An entity is right if its kind, its first and its last word are.
    """
    right = said = there = 0
    for own, true in zip(predicted, truth, strict=True):
        a, b = entities(own), entities(true)
        right, said, there = right + len(a & b), said + len(a), there + len(b)
    return {
        "entity_precision": right / said if said else 0.0,
        "entity_recall": right / there if there else 0.0,
        "entity_f1": 2 * right / (said + there) if said + there else 0.0,
    }
