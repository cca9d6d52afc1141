"""Tokens as rows of one length: a stream that is packed into full rows, or one padded record on each row.

A row holds inputs and targets. The target at each position is the next token. Both are numpy, (N, positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A target that does not count in the loss.
IGNORED = -100


@dataclass
class TokenSequence:
    """A document as tokens: their numbers, whether each is a target, and the bytes of text that it stands for."""

    ids: np.ndarray
    predicted: np.ndarray
    bytes: np.ndarray


def pack(sequences: Sequence[TokenSequence], length: int, padding: int) -> dict[str, np.ndarray]:
    """One stream cut into rows. Each target token, except the stream's first, is the target of exactly one position."""
    ids = np.concatenate([s.ids for s in sequences])
    predicted = np.concatenate([s.predicted for s in sequences])
    sizes = np.concatenate([s.bytes for s in sequences])
    places = len(ids) - 1  # the last token is only a target
    rows = -(-places // length)

    def cut(values: np.ndarray, rest: int) -> np.ndarray:
        return np.concatenate([values, np.full(rows * length - places, rest, dtype=np.int64)]).reshape(rows, length)

    result = _counted(
        cut(ids[:-1], padding),
        cut(np.where(predicted[1:], ids[1:], IGNORED), IGNORED),
        cut(np.where(predicted[1:], sizes[1:], 0), 0),
        np.minimum(places - length * np.arange(rows), length),
    )
    useful = result["tokens"] > 0  # a row may be all prompt
    return {name: values[useful] for name, values in result.items()}


def pad_rows(sequences: Sequence[TokenSequence], length: int, padding: int) -> dict[str, np.ndarray]:
    """One record a row, padded on the right to the longest."""
    lengths = np.array([len(s.ids) - 1 for s in sequences], dtype=np.int64)
    width = int(lengths.max(initial=0))
    assert width <= length
    inputs = np.full((len(sequences), width), padding, dtype=np.int64)
    targets = np.full((len(sequences), width), IGNORED, dtype=np.int64)
    sizes = np.zeros((len(sequences), width), dtype=np.int64)
    for i, s in enumerate(sequences):
        inputs[i, : lengths[i]] = s.ids[:-1]
        targets[i, : lengths[i]] = np.where(s.predicted[1:], s.ids[1:], IGNORED)
        sizes[i, : lengths[i]] = np.where(s.predicted[1:], s.bytes[1:], 0)
    return _counted(inputs, targets, sizes, lengths)


def _counted(inputs: np.ndarray, targets: np.ndarray, sizes: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
    tokens = (targets != IGNORED).sum(axis=1).astype(np.int64)
    return {
        "input_ids": inputs,
        "targets": targets,
        "tokens": tokens,
        "bytes": sizes.sum(axis=1),
        "lengths": lengths.astype(np.int64),
    }
