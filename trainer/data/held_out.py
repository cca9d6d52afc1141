"""Which rows of a training set become its validation and test splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from ..exact.order import key


def check_fractions(validation: float, test: float) -> None:
    """Raises UserError unless the two options leave something to train on."""
    if validation + test >= 1:
        raise UserError(
            f'"trainer.task_options.validation_fraction" ({validation}) and "test_fraction" ({test}) leave nothing to '
            "train on: together they must be below 1."
        )


def held_out(
    count: int,
    fractions: Mapping[str, float],
    seed: int,
    labels: np.ndarray | None = None,
    groups: Sequence[Any] | None = None,
) -> dict[str, np.ndarray]:
    """The rows of each split that is made from a training set, and the rows that are left: sorted int64, "train" last.

    Args:
        count: the number of rows.
        fractions: split -> its share of all rows, 0 for none. The first is drawn first.
        seed, labels, groups: as in `hold_out`.
    """
    places, left = np.arange(count), 1.0
    result = {}
    for name, part in fractions.items():
        if not part:
            continue
        out = hold_out(
            len(places),
            part / left,
            seed,
            None if labels is None else labels[places],
            None if groups is None else [groups[i] for i in places.tolist()],
        )
        if len(out):
            result[name] = places[out]
        # The next split is drawn from the rows that are left, and its share of these is larger.
        places, left = np.delete(places, out), left - part
    return result | {"train": places}


def hold_out(
    count: int, fraction: float, seed: int, labels: np.ndarray | None = None, groups: Sequence[Any] | None = None
) -> np.ndarray:
    """The rows of a training set that become another split: (n,) sorted int64. Only `seed` determines the choice.

    Args:
        count: the number of rows.
        fraction: the fraction of them to hold out; with labels, of each class (at least one row of any class
            that has two).
        seed: `split_seed`, the same whatever the run's seed.
        labels: (count,) int64.
        groups: the group of each row, such as a patient. The rows of a group stay together, so the fractions are only
            met as well as the groups allow.
    """
    rng = np.random.default_rng(key(seed, "hold out"))
    if groups is not None:
        return _whole_groups(np.zeros(count, np.int64) if labels is None else labels, groups, fraction, rng)
    classes = [np.arange(count)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    taken = []
    for rows in classes:
        wanted = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        taken.append(rng.permutation(rows)[:wanted])
    return np.sort(np.concatenate(taken))


def _whole_groups(labels: np.ndarray, groups: Sequence[Any], fraction: float, rng: np.random.Generator) -> np.ndarray:
    """The rows of the groups that are held out, (n,) sorted int64.

    Groups are looked at in random order. One is taken if it brings the fractions of the classes closer to the wanted
    one.
    """
    rows_of: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        rows_of.setdefault(group, []).append(row)
    _, numbers = np.unique(labels, return_inverse=True)
    total = np.bincount(numbers)  # (classes,)
    wanted, taken = fraction * total, np.zeros(len(total))
    out: list[int] = []
    members = list(rows_of.values())
    for place in rng.permutation(len(members)):
        own = np.bincount(numbers[members[place]], minlength=len(total))
        # Train keeps a row of every class.
        closer = ((taken + own - wanted) ** 2).sum() < ((taken - wanted) ** 2).sum()
        if closer and (taken + own < total).all():
            out += members[place]
            taken += own
    return np.array(sorted(out), dtype=np.int64)
