"""Which samples are train, validation and test in one fold of a cross-validation.

A task may compute something from its training samples: means, categories, a vocabulary. Such a task calls a `Cut` as
soon as it has read its data, and then prepares everything by the rows that are train in this fold. So no model knows
anything of its test rows. What is prepared in this way is not cached, so no fold can get the data of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..config.keys import FoldOptions
from ..errors import UserError
from ..exact.order import key
from .held_out import hold_out
from .table_files import Table

if TYPE_CHECKING:
    from numpy.typing import NDArray

Part = TypeVar("Part")


class Cut:
    """One fold: called once, with what is known of all samples.

    Attributes:
        options: `trainer.fold`.
        labels: (samples,) int64 by which the folds were stratified; None if they were not.
        groups: of each sample, if there are any.
        fold_of: (samples,) int64, the fold in which each sample is tested.
        rows: split -> (n,) sorted int64, the places of its samples among all of them. Empty before the call.
        files: the file of each sample, for the table of predictions; None if samples are not files. The caller of the
            cut sets it.
    """

    def __init__(self, options: FoldOptions) -> None:
        self.options = options
        self.labels: NDArray[np.int64] | None = None
        self.groups: Sequence[Any] | None = None
        self.fold_of: NDArray[np.int64] = np.zeros(0, np.int64)
        self.rows: dict[str, NDArray[np.int64]] = {}
        self.files: Sequence[str] | None = None

    def chosen(self, splits: Mapping[str, Part]) -> dict[str, Part]:
        """The splits of the data that are put together, in the order in which their samples are numbered.

        Raises:
            UserError: the data has none of them.
        """
        found = {name: splits[name] for name in self.options.pool if name in splits}
        if not found:
            raise UserError(
                f'The folds are cut from {" and ".join(self.options.pool)} ("pool"), but the data has only '
                f"{', '.join(splits)}."
            )
        return found

    def __call__(
        self, count: int, labels: np.ndarray | None = None, groups: Sequence[Any] | None = None
    ) -> dict[str, np.ndarray]:
        """The rows of each split, sorted: "train", "validation" (unless nothing is held out for it) and "test".

        Args:
            count: the number of all samples.
            labels: (count,) int64, their classes, where there are classes.
            groups: of each sample. The samples of one group stay in one fold, and on one side of the validation split.

        Raises:
            UserError: there are too few samples, groups, or samples of a class for so many folds.
        """
        o = self.options
        if o.stratified and labels is None:
            raise UserError('"stratified" is true, but these samples have no classes. Leave it out.')
        self.labels = None if o.stratified is False or labels is None else np.asarray(labels, np.int64)
        self.groups = groups
        self.fold_of = fold_of_rows(count, o.folds, o.seed, self.labels, groups)
        test = np.flatnonzero(self.fold_of == o.number)
        rest = np.flatnonzero(self.fold_of != o.number)
        self.rows = {"train": rest, "test": test}
        if o.validation_fraction:
            strata = None if self.labels is None else self.labels[rest]
            own = None if groups is None else [groups[i] for i in rest.tolist()]
            out = hold_out(len(rest), o.validation_fraction, o.seed, strata, own)
            if len(out):
                self.rows = {"train": np.delete(rest, out), "validation": rest[out], "test": test}
        return self.rows


def fold_of_rows(
    count: int,
    folds: int,
    seed: int,
    labels: np.ndarray | None = None,
    groups: Sequence[Any] | None = None,
) -> NDArray[np.int64]:
    """The fold of each of `count` samples, (count,) int64, by scikit-learn's splitters; arguments as of `Cut`.

    Raises:
        UserError: see `Cut`.
    """
    from sklearn.model_selection import KFold, StratifiedGroupKFold, StratifiedKFold

    numbers: NDArray[np.int64] | None = None
    if groups is not None:
        different = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        numbers = np.array([different[group] for group in groups])
        _check_enough(len(different), folds, "groups", "a group stays in one fold")
    _check_enough(count, folds, "samples", "each fold needs one")
    if labels is not None:
        _check_classes(labels, folds)
    state = key(seed, "folds") % 2**32
    places = np.zeros((count, 1))
    if numbers is not None:
        # Without classes, all samples are of one class: the splitter then spreads the groups over folds of like size.
        strata = np.zeros(count, np.int64) if labels is None else labels
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=state).split(places, strata, numbers)
    elif labels is not None:
        parts = StratifiedKFold(folds, shuffle=True, random_state=state).split(places, labels)
    else:
        parts = KFold(folds, shuffle=True, random_state=state).split(places)
    result = np.zeros(count, np.int64)
    for number, (_, test) in enumerate(parts):
        result[test] = number
    return result


def _check_enough(there: int, folds: int, what: str, why: str) -> None:
    if there < folds:
        raise UserError(
            f"{folds} folds need {folds} {what} ({why}), but there {'are' if there != 1 else 'is'} {there:,}. Take "
            + (f"at most {there} folds." if there > 1 else "other data.")
        )


def _check_classes(labels: np.ndarray, folds: int) -> None:
    _, sizes = np.unique(labels, return_counts=True)
    least = int(sizes.min())
    if least < folds:
        few = int((sizes < folds).sum())
        raise UserError(
            f"{folds} stratified folds need {folds} samples of each class, but {few} of the {len(sizes)} classes "
            f"{'have' if few != 1 else 'has'} fewer: the smallest has {least}.\n"
            + (f"Take at most {least} folds, or set" if least > 1 else "Set")
            + ' "stratified" to false.'
        )


def together(cut: Cut, found: Mapping[str, Table], needed: Sequence[str]) -> dict[str, Table]:
    """The tables that are cut, as one: {"train": their rows, one table after another}.

    Args:
        cut: says which.
        found: split -> table.
        needed: columns that each of them must have: those that are read.

    Raises:
        UserError: one lacks a column, or declares other classes.
    """
    (first, whole), *others = cut.chosen(found).items()
    if not others:
        return {"train": whole}
    columns = {name: whole.values(name) for name in whole.columns}
    for split, table in others:
        for name in list(columns):
            if name in table.columns:
                columns[name] += table.values(name)
            elif name in needed:
                raise UserError(f'The folds are cut from {first} and {split}, but {split} has no column "{name}".')
            else:
                del columns[name]
        if (table.classes, table.list_classes) != (whole.classes, whole.list_classes):
            raise UserError(f"The folds are cut from {first} and {split}, which declare different classes.")
    notes = [note for table in found.values() for note in table.notes]
    return {"train": replace(whole, columns=columns, notes=notes)}
