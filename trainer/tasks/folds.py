"""The splits of a task in one fold of a cross-validation, and what it says of each sample that it tests."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.schema import near
from ..data.cut import Cut
from ..data.report import LABELS
from ..errors import UserError
from ..exact.splits import Batch, Split, as_splits
from .protocol import Outputs, Task

# Outputs with more numbers a sample are not written to the table.
_MOST_NUMBERS = 1000


def takes_cut(task: Task) -> bool:
    """Whether a task's `splits` takes the keyword `cut`: it prepares its data by the training samples of a fold."""
    return "cut" in inspect.signature(task.splits).parameters


def splits_in_fold(task: Task, cut: Cut) -> dict[str, Split]:
    """The splits of a task in one fold.

    Args:
        task: asked for its splits once.
        cut: says which samples are train, validation and test; its `rows` are known afterwards.

    Raises:
        UserError: the task cannot be cut into folds, or not into so many.
    """
    name = type(task).__name__
    if takes_cut(task):
        asked: Any = task.splits
        splits = as_splits(asked(cut=cut), name)
        if not cut.rows or any(len(splits[split]) != len(rows) for split, rows in cut.rows.items() if split in splits):
            raise UserError(f"{name}.splits(cut) must call cut, and return the rows that cut gives, in their order.")
        if cut.files is not None and len(cut.files) != len(cut.fold_of):
            raise UserError(
                f"{name}.splits(cut) sets cut.files to {len(cut.files):,} names, but there are {len(cut.fold_of):,} "
                "samples. Each sample needs one."
            )
        return splits
    if type(task).__module__.startswith(f"{__package__}."):
        raise UserError(
            f"The task {type(task).__module__.rpartition('.')[2]} cannot be cut into folds: it prepares its data by "
            "its training split, and cannot prepare it by a part of that. Give each fold's files as its data instead."
        )
    o, whole = cut.options, _together(cut.chosen(as_splits(task.splits(), name)), name)
    groups = None if o.group_column is None else _column(whole, o.group_column, "group_column", name).tolist()
    rows = cut(len(whole), _labels(whole, cut, name), groups)
    return {split: whole.subset(torch.from_numpy(places)) for split, places in rows.items()}


def _together(splits: Mapping[str, Split], task: str) -> Split:
    """The samples of several splits as one split. Raises UserError if their arrays are not alike."""
    (first, one), *others = splits.items()
    for name, other in others:
        if {n: (a.shape[1:], a.dtype) for n, a in one.arrays.items()} != {
            n: (a.shape[1:], a.dtype) for n, a in other.arrays.items()
        } or any((getattr(one, part) is None) != (getattr(other, part) is None) for part in ("counts", "lengths")):
            raise UserError(
                f'{task}.splits(): "{first}" and "{name}" cannot be put together and cut into folds, because their '
                'arrays differ in name, shape or type. Make them alike, or choose one split with "pool".'
            )
    if not others:
        return one
    parts = list(splits.values())

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        known = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(known) if known else None

    arrays = {name: torch.cat([part.arrays[name] for part in parts]) for name in one.arrays}
    return Split(arrays, joined([p.counts for p in parts]), joined([p.lengths for p in parts]), one.padded)


def _column(whole: Split, column: str, option: str, task: str) -> np.ndarray:
    """An array with one value a sample, (samples,). Raises UserError."""
    array = whole.arrays.get(column)
    if array is None:
        raise UserError(f'"{option}": {task}.splits() gives no array "{column}". {near(column, whole.arrays)}')
    if array.numel() != len(whole):
        raise UserError(
            f'"{option}": the array "{column}" has the shape {tuple(array.shape)}. It must have one value a sample.'
        )
    return array.reshape(len(whole)).numpy()


def _labels(whole: Split, cut: Cut, task: str) -> np.ndarray | None:
    """The classes of a user's own task, (samples,) int64; None if it seems to have none."""
    o = cut.options
    if o.stratified is False:
        return None
    if o.label_column is not None:
        values = _column(whole, o.label_column, "label_column", task)
        return np.unique(values, return_inverse=True)[1].astype(np.int64)
    found = _classes_in(whole.arrays)
    return None if found is None else found.numpy().astype(np.int64)


def _classes_in(arrays: Batch) -> Tensor | None:
    """The array that seems to hold classes: (samples,) whole numbers, with a usual name. They repeat."""
    for name in LABELS:
        array = arrays.get(name)
        if array is not None and array.ndim == 1 and not array.is_floating_point():
            return array if len(array.unique()) <= max(2, len(array) // 2) else None
    return None


def columns_of(task: Task, outputs: Outputs, arrays: Batch, metrics: Mapping[str, float]) -> dict[str, Sequence[Any]]:
    """What a task says of each sample of a split: column -> (samples,) plain values.

    They are the task's own `predictions`. For a task without this method, they are its outputs as they are, and the
    arrays of the split with one number a sample. The classes (target, prediction) are added if it is certain that the
    accuracy counts the likeliest output: the accuracy computed here must agree with the task's own.

    Args:
        task: of the run.
        outputs, arrays: of a whole split, on the CPU.
        metrics: of the same split.
    """
    own = getattr(task, "predictions", None)
    if callable(own):
        return dict(own(outputs, arrays))
    columns: dict[str, Sequence[Any]] = {}
    given = outputs if isinstance(outputs, Mapping) else {"output": outputs}
    labels, only = _classes_in(arrays), outputs if isinstance(outputs, Tensor) and outputs.ndim == 2 else None
    if labels is not None and only is not None and "accuracy" in metrics:
        likeliest = only.argmax(1)
        # Equal up to rounding: half a sample is less than any real difference.
        if abs(float((likeliest == labels).double().mean()) - metrics["accuracy"]) < 0.5 / len(labels):
            columns |= {"target": labels.tolist(), "prediction": likeliest.tolist()}
    columns |= {name: array.tolist() for name, array in arrays.items() if array.ndim == 1}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value[0].numel() > _MOST_NUMBERS:
            continue
        flat = value.reshape(len(value), -1).double() if value.is_floating_point() else value.reshape(len(value), -1)
        for place in range(flat.shape[1]):
            columns[f"{name}_{place}" if flat.shape[1] > 1 else name] = flat[:, place].tolist()
    return columns
