"""Data in memory on the device: a split is a few tensors, and a micro-batch is gathered from them by index.

A micro-batch is never a slice. A slice may start at any address, and a math library may choose its kernel
by alignment. A gather returns a fresh allocation, which is always aligned in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .checks.hashes import tensors_sha256

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Split:
    """One split of a dataset.

    Attributes:
        arrays: name -> tensor (samples, ...). All have the same first dimension, the samples.
        counts: what each sample adds to the loss's count, (samples,); None stands for 1 each.
            A language model gives the valid tokens of each sample here, a weighted loss gives its weights.
        lengths: for samples of different lengths: the positions of each sample that are not padding,
            (samples,) int64. None if all samples have one length.
        padded: the names of the arrays (samples, positions, ...) to which `lengths` applies. Each micro-batch of them
            is cut to its own longest sample, so padding depends on the micro-batch alone.
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

    def subset(self, indices: Tensor) -> Split:
        """The samples at `indices`, (n,) int64 on the CPU, as a split; this one must be on the CPU, too."""
        return replace(
            self,
            arrays=self.gather(indices),
            counts=None if self.counts is None else self.counts.index_select(0, indices),
            lengths=None if self.lengths is None else self.lengths.index_select(0, indices),
        )

    def to(self, device: torch.device) -> Split:
        """The split on a device; counts and lengths stay on the host, where the batch arithmetic happens."""
        return replace(self, arrays={name: array.to(device) for name, array in self.arrays.items()})

    def longest(self, indices: Tensor, bounds: Sequence[tuple[int, int]]) -> list[int] | None:
        """The length of the longest sample of each micro-batch, (M,); None if samples have no lengths.

        Args:
            indices: (n,) int64 on the CPU.
            bounds: the micro-batches, as positions in `indices`.
        """
        if self.lengths is None:
            return None
        lengths = self.lengths.index_select(0, indices).numpy()
        # reduceat: one maximum for each piece, from one start to the next. On the host: no GPU is waited for.
        return np.maximum.reduceat(lengths, [start for start, _ in bounds]).tolist()

    def tokens(self, indices: Tensor) -> int:
        """The summed lengths of the samples at `indices`, (n,) int64 on the CPU; 0 if samples have no lengths."""
        return 0 if self.lengths is None else int(self.lengths.index_select(0, indices).sum())

    def cut(self, batch: Batch, longest: int | None) -> Batch:
        """A micro-batch without the padding behind its longest sample, as fresh tensors."""
        if longest is None:
            return batch
        # A copy, because a slice of columns is not contiguous, and kernels may compute it in another way.
        return batch | {name: batch[name][:, :longest].clone() for name in self.padded}

    def count_of(self, indices: Tensor) -> float:
        """The summed count of the samples at `indices`, (B,) int64 on the CPU."""
        if self.counts is None:
            return float(len(indices))
        # float64 adds whole counts up to 2^53 without rounding. Sums of other weights are rounded, in an order that
        # depends on B alone.
        return float(self.counts.index_select(0, indices).to(torch.float64).sum())

    def counts_of(self, indices: Tensor, bounds: Sequence[tuple[int, int]]) -> list[float]:
        """The summed count of each micro-batch, (M,); arguments as in `longest`."""
        if self.counts is None:
            return [float(stop - start) for start, stop in bounds]
        counts = self.counts.index_select(0, indices).to(torch.float64).numpy()
        return np.add.reduceat(counts, [start for start, _ in bounds]).tolist()

    def data_hash(self) -> str:
        """SHA-256 over names, types, shapes and bytes."""
        extra = {"counts": self.counts, "lengths": self.lengths}
        # Sorted, so that the order in which a task lists its arrays does not matter.
        items = sorted(self.arrays.items()) + [(n, v) for n, v in extra.items() if v is not None]
        return tensors_sha256(items)


def as_split(value: Any, name: str, task: str) -> Split:
    """A Split from what a task returned: a Split, or a plain dictionary of tensors or arrays.

    Args:
        value: what the task returned.
        name: of the split, for messages.
        task: its name, for messages.

    Raises:
        UserError: it is neither, it is empty, its arrays have different lengths, or none of its samples counts.
    """
    counts = lengths = None
    padded: tuple[str, ...] = ()
    if isinstance(value, Split):
        value, counts, lengths, padded = value.arrays, value.counts, value.lengths, tuple(value.padded)
        counts = torch.from_numpy(counts) if isinstance(counts, np.ndarray) else counts
        lengths = torch.from_numpy(lengths) if isinstance(lengths, np.ndarray) else lengths
    if not isinstance(value, Mapping) or not value:
        raise UserError(
            f'{task}.splits()["{name}"] must be a dictionary of arrays, name -> (samples, ...), '
            f"not {type(value).__name__}."
        )
    arrays: Batch = {}
    for key, array in value.items():
        # numpy's kinds: bool, signed and unsigned whole numbers, floats. Texts and Python objects are refused below.
        if isinstance(array, np.ndarray) and array.dtype.kind in "biuf":
            array = torch.from_numpy(np.ascontiguousarray(array))
        if not isinstance(array, Tensor) or array.ndim == 0:
            raise UserError(
                f'{task}.splits()["{name}"]["{key}"] must be a tensor or an array of numbers with one row a sample, '
                f"not {type(array).__name__}{f' of {array.dtype}' if isinstance(array, np.ndarray) else ''}."
            )
        # Contiguous, so that a gather gives the same layout however the task built the array.
        arrays[key] = array.detach().contiguous()
    all_arrays = arrays | {n: v for n, v in (("counts", counts), ("lengths", lengths)) if v is not None}
    rows = {key: len(array) for key, array in all_arrays.items()}
    if len(set(rows.values())) != 1:
        said = ", ".join(f"{key}: {length}" for key, length in rows.items())
        raise UserError(f'{task}.splits()["{name}"]: every array must have one row a sample, but they have {said}.')
    if next(iter(rows.values())) == 0:
        raise UserError(f'{task}.splits()["{name}"] is empty.')
    _check_counts(counts, f'{task}.splits()["{name}"]')
    _check_lengths(arrays, lengths, padded, f'{task}.splits()["{name}"]')
    return Split(arrays, counts, lengths, padded)


def _check_counts(counts: Tensor | None, where: str) -> None:
    if counts is None:
        return
    if counts.ndim != 1 or not bool((torch.isfinite(counts) & (counts >= 0)).all()):
        raise UserError(f"{where}: counts must be one number a sample, finite and not negative.")
    # The loss of a split is the sum of its losses divided by the sum of its counts.
    if float(counts.to(torch.float64).sum()) == 0:
        raise UserError(f"{where}: none of the {len(counts)} samples counts: their counts add up to 0.")


def _check_lengths(arrays: Batch, lengths: Tensor | None, padded: tuple[str, ...], where: str) -> None:
    if padded and lengths is None:
        raise UserError(f"{where} names padded arrays ({', '.join(padded)}) but gives no lengths.")
    if lengths is None:
        return
    if lengths.dtype != torch.int64 or int(lengths.min()) < 1:
        raise UserError(
            f"{where}: lengths must be int64 and at least 1; they are {lengths.dtype}, the smallest is {lengths.min()}."
        )
    for name in padded:
        places = arrays[name].shape[1] if name in arrays and arrays[name].ndim > 1 else None
        if places is None:
            raise UserError(f"{where}: the padded array {name!r} must be there, with shape (samples, positions, ...).")
        if int(lengths.max()) > places:
            raise UserError(
                f"{where}: a sample has the length {int(lengths.max())}, but {name!r} has only {places} positions."
            )


def as_splits(value: Any, task: str) -> dict[str, Split]:
    """All splits that a task returned, checked: "train", and "validation" and "test" if the task has them.

    Raises:
        UserError: there is no "train" split, or a split is unknown or not valid.
    """
    if not isinstance(value, Mapping) or "train" not in value:
        has = f"the keys {sorted(value)}" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise UserError(f'{task}.splits() must return a dictionary with a "train" split; it returned {has}.')
    unknown = set(value) - {"train", "validation", "test"}
    if unknown:
        raise UserError(f"{task}.splits() returned the split {sorted(unknown)[0]!r}. Known: train, validation, test.")
    return {name: as_split(value[name], name, task) for name in ("train", "validation", "test") if name in value}
