"""What a run says of the data that it read. A user sees at once if something is missing."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..wording import counted

# This many classes are listed. If there are more, the largest ones and the smallest are.
MOST_CLASSES = 12
SAMPLE_CHARACTERS = 80
# Names that arrays of labels usually have.
LABELS = ("y", "label", "labels", "target")
# The names of groups are shown if validation and test have no more than this together; and characters of a name.
MOST_GROUPS = 6
NAME_CHARACTERS = 40


@dataclass(frozen=True)
class Groups:
    """The groups of some splits' rows, such as patients or speakers.

    Attributes:
        column: the column of groups; None if none is named.
        of: split -> the group of each row. A split may lack the column.
    """

    column: str | None
    of: Mapping[str, Sequence[Any] | None]

    def said(self, split: str) -> str:
        """How many groups a split has; or their names, if validation and test have few together."""
        groups = self.of.get(split)
        if self.column is None or groups is None:
            return ""
        names = {name: dict.fromkeys(map(str, own)) for name, own in self.of.items() if own is not None}
        few = sum(len(own) for name, own in names.items() if name != "train") <= MOST_GROUPS
        if split == "train" or not few:
            return f"{self.column}: {counted(len(names[split]), 'group')}"
        return f"{self.column}: {', '.join(shortened(name) for name in names[split])}"


NO_GROUPS = Groups(None, {})


def rows_line(
    rows: Mapping[str, int], given: Sequence[str], unit: str = "row", of: str = "", groups: Groups = NO_GROUPS
) -> str:
    """The number of rows in each split, and which groups it has.

    Args:
        rows: split -> their number.
        given: the splits that the data has; the others are held out of train.
        unit: what a row is.
        of: words after the total, such as " of 28 x 28, grey".
        groups: see `Groups`.
    """
    parts = []
    for name, count in rows.items():
        more = ["" if name in given else "held out of train", groups.said(name)]
        parts.append(f"{name} {count:,}" + (f" ({'; '.join(filter(None, more))})" if any(more) else ""))
    total = sum(rows.values())
    line = f"{total:,} {unit}{'s' * (total != 1)}{of}: {', '.join(parts)}"
    if "validation" not in rows:
        line += ". Nothing is held out for validation, so the model of the last step is kept"
    return line


def shortened(name: str) -> str:
    """A name of the data in one line of limited length."""
    line = " ".join(name.split())
    return line[:NAME_CHARACTERS] + ("..." if len(line) > NAME_CHARACTERS else "")


def columns_line(columns: Sequence[str], used: Mapping[str, str | None]) -> str:
    """Which columns are read, and which are not. used: what a column is -> its name."""
    read = ", ".join(f'{what} from "{column}"' for what, column in used.items() if column is not None)
    rest = [column.strip() or repr(column) for column in columns if column not in used.values()]
    return read + (f"; not read: {', '.join(rest)}" if rest else "")


def classes_line(names: Sequence[str], labels: Mapping[str, Any]) -> str:
    """The number of samples of each class. labels: split -> (samples,) numbers of classes."""
    counts = np.stack([np.bincount(np.asarray(values), minlength=len(names)) for values in labels.values()])
    order = list(range(len(names)))
    shown, rest = order, []
    if len(names) > MOST_CLASSES:
        order.sort(key=lambda i: (-counts[0, i], i))
        shown, rest = [*order[: MOST_CLASSES - 1], order[-1]], order[MOST_CLASSES - 1 : -1]
    shown_names = [repr(name) if name != name.strip() or not name else name for name in names]
    parts = [f"{shown_names[i]} {' + '.join(f'{n:,}' for n in counts[:, i])}" for i in shown]
    if rest:
        parts.insert(-1, f"{len(rest)} more, the smallest")
    line = f"{counted(len(names), 'class', 'classes')} ({' + '.join(labels)}): {', '.join(parts)}"
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(unicodedata.normalize("NFKC", name).strip().casefold(), []).append(name)
    twins = next((group for group in alike.values() if len(group) > 1), None)
    if twins is not None:
        line += f". Check {' and '.join(map(repr, twins))}: they differ only in blanks, case or the encoding of accents"
    return line


def sample_line(text: str, label: str | None = None) -> str:
    """The first sample of the training set, in one line of limited length."""
    cut = text[:SAMPLE_CHARACTERS] + ("..." if len(text) > SAMPLE_CHARACTERS else "")
    return f"first sample: {cut!r}" + ("" if label is None else f" -> {label}")


def array_lines(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines on the arrays of a user's own task: their shapes, the classes if there are labels, and the first sample.

    Args:
        splits: name -> tensors by name, samples in the first dimension.
    """
    train = splits["train"]
    shapes = [f"{name} {tuple(a.shape[1:])} {str(a.dtype).removeprefix('torch.')}" for name, a in train.items()]
    lines = [f"one sample: {', '.join(shapes)}"]
    for name, array in train.items():
        if name in LABELS and array.ndim == 1 and not array.is_floating_point():
            values = {split: arrays[name].numpy() for split, arrays in splits.items() if name in arrays}
            found = np.unique(np.concatenate(list(values.values())))
            if len(found) <= max(MOST_CLASSES, len(array) // 2):
                numbers = {split: np.searchsorted(found, own) for split, own in values.items()}
                lines.append(f"{name}: {classes_line([str(v) for v in found], numbers)}")
    first = [f"{name} = {_shown(array[0])}" for name, array in train.items()]
    return [*lines, f"first sample: {'; '.join(first)}"]


def _shown(sample: Any) -> str:
    """The first numbers of one sample, without torch's line breaks."""
    values = [f"{value:.4g}" for value in sample.flatten()[:6].tolist()]
    return ", ".join(values) + (", ..." if sample.numel() > len(values) else "")


def copies_notes(splits: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """A sentence for each split that shares rows with train, label included.

    Args:
        splits: name -> arrays (rows, ...) of everything that is read of a row.
    """

    def rows(arrays: Mapping[str, np.ndarray]) -> list[bytes]:
        parts = [np.ascontiguousarray(array).view(np.uint8).reshape(len(array), -1) for array in arrays.values()]
        return [row.tobytes() for row in np.concatenate(parts, axis=1)]

    train = set(rows(splits["train"]))
    notes = []
    for split, arrays in splits.items():
        every = [] if split == "train" else rows(arrays)
        shared = sum(row in train for row in every)
        if shared:
            notes.append(
                f"{shared:,} of the {len(every):,} rows of {split} are also in train, in every column that is read. If "
                "they are copies, its metrics are too good"
            )
    return notes
