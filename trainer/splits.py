"""Data in memory on the device: a split is a few tensors, and a micro-batch is a gather by index.

A gather, never a slice: its result is a fresh, aligned allocation whatever the position, so a math
library cannot choose another kernel for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """One split of a dataset.

    Attributes:
        arrays: name -> tensor, all with the same first dimension, the samples.
        counts: what each sample contributes to the loss's count, (samples,); None stands for 1 each.
            A language model gives the valid tokens of each sample here, a weighted loss its weights.
        lengths: how many places of each sample are not padding, (samples,) int64, for samples of different
            lengths; None where all are alike.
        padded: the names of the arrays (samples, places, ...) that `lengths` speaks of: each micro-batch of them is
            cut to its own longest sample, so padding depends on the micro-batch alone.
    """

    arrays: Batch
    counts: Tensor | None = None
    lengths: Tensor | None = None
    padded: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def gather(self, indices: Tensor) -> Batch:
        """The samples at `indices`, (B,) int64 on the split's device, as fresh tensors."""
        return {name: array.index_select(0, indices) for name, array in self.arrays.items()}

    def to(self, device: torch.device) -> Split:
        """The split on a device; `counts` stay on the host, where the batch arithmetic happens."""
        return Split({name: array.to(device) for name, array in self.arrays.items()}, self.counts)

    def count_of(self, indices: Tensor) -> float:
        """The summed count of samples, exact: indices (B,) int64 on the CPU."""
        if self.counts is None:
            return float(len(indices))
        return float(self.counts.index_select(0, indices).to(torch.float64).sum())

    def data_hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes."""
        digest = hashlib.sha256()
        items = sorted(self.arrays.items())
        if self.counts is not None:
            items.append(("counts", self.counts))
        for name, array in items:
            digest.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
            # View as bytes: numpy has no bfloat16, and a hash needs none.
            data = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().data)
        return digest.hexdigest()


def as_split(value: Any, name: str, task: str) -> Split:
    """A Split from what a task returned: a Split, or a plain dictionary of tensors or arrays.

    Raises:
        UserError: it is neither, it is empty, or its arrays have different lengths.
    """
    counts = None
    if isinstance(value, Split):
        value, counts = value.arrays, value.counts
        if isinstance(counts, np.ndarray):
            counts = torch.from_numpy(counts)
    if not isinstance(value, Mapping) or not value:
        raise UserError(
            f'{task}.splits()["{name}"] must be a dictionary of arrays, name -> (samples, ...), '
            f"not {type(value).__name__}."
        )
    arrays: Batch = {}
    for key, array in value.items():
        if isinstance(array, np.ndarray) and array.dtype.kind in "biuf":
            array = torch.from_numpy(np.ascontiguousarray(array))
        if not isinstance(array, Tensor) or array.ndim == 0:
            raise UserError(
                f'{task}.splits()["{name}"]["{key}"] must be a tensor or an array of numbers with one row a sample, '
                f"not {type(array).__name__}{f' of {array.dtype}' if isinstance(array, np.ndarray) else ''}."
            )
        arrays[key] = array.detach().contiguous()
    arrays_and_counts = arrays if counts is None else {**arrays, "counts": counts}
    lengths = {key: len(array) for key, array in arrays_and_counts.items()}
    if len(set(lengths.values())) != 1:
        said = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise UserError(f'{task}.splits()["{name}"]: every array must have one row a sample, but they have {said}.')
    if next(iter(lengths.values())) == 0:
        raise UserError(f'{task}.splits()["{name}"] is empty.')
    return Split(arrays, counts)


def as_splits(value: Any, task: str) -> dict[str, Split]:
    """All splits a task returned, checked: "train" at least; "validation" and "test" where it has them."""
    if not isinstance(value, Mapping) or "train" not in value:
        has = f"the keys {sorted(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise UserError(f'{task}.splits() must return a dictionary with a "train" split; it returned {has}.')
    unknown = set(value) - {"train", "validation", "test"}
    if unknown:
        raise UserError(f"{task}.splits() returned the split {sorted(unknown)[0]!r}. Known: train, validation, test.")
    return {name: as_split(value[name], name, task) for name in ("train", "validation", "test") if name in value}
