"""Rows of tokens: every token that is to be predicted is the target of exactly one place, where its bytes count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.token_rows import IGNORED, TokenSequence, pack, pad_rows

PAD = 99


def sequence(ids: list[int], predicted: list[bool], sizes: list[int]) -> TokenSequence:
    return TokenSequence(np.array(ids), np.array(predicted), np.array(sizes))


@st.composite
def documents(draw: st.DrawFn) -> list[TokenSequence]:
    """Documents of at least two tokens, some of which are not to be predicted."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(2, 12))
        lists = [st.integers(0, 50), st.booleans(), st.integers(0, 4)]
        found.append(sequence(*(draw(st.lists(kind, min_size=size, max_size=size)) for kind in lists)))
    return found


def test_a_prompt_is_read_and_not_predicted() -> None:
    two = [sequence([1, 2, 3, 9], [False, False, True, True], [0, 0, 5, 0]), sequence([4, 9], [True] * 2, [2, 0])]
    packed = pack(two, 2, 0)
    assert packed["input_ids"].tolist() == [[1, 2], [3, 9], [4, 0]]
    assert packed["targets"].tolist() == [[IGNORED, 3], [9, 4], [9, IGNORED]]
    assert packed["bytes"].tolist() == [5, 2, 0]
    assert packed["tokens"].tolist() == [1, 2, 1]
    assert packed["lengths"].tolist() == [2, 2, 1]
    assert pack(two, 1, 0)["targets"].tolist() == [[3], [9], [4], [9]], "a row that is all prompt teaches nothing"
    rows = pad_rows(two, 3, 0)
    assert rows["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert rows["targets"].tolist() == [[IGNORED, 3, 9], [9, IGNORED, IGNORED]]
    assert (rows["tokens"].tolist(), rows["bytes"].tolist(), rows["lengths"].tolist()) == ([2, 1], [5, 0], [3, 1])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(documents(), st.integers(1, 9))
def test_a_packed_stream_is_cut_without_loss(sequences: list[TokenSequence], length: int) -> None:
    ids = [int(i) for s in sequences for i in s.ids]
    predicted = [bool(p) for s in sequences for p in s.predicted]
    sizes = [int(b) for s in sequences for b in s.bytes]
    pairs = [(a, b) for a, b, asked in zip(ids, ids[1:], predicted[1:]) if asked]
    packed = pack(sequences, length, PAD)
    valid = packed["targets"] != IGNORED
    assert list(zip(packed["input_ids"][valid].tolist(), packed["targets"][valid].tolist())) == pairs
    assert packed["bytes"].sum() == sum(b for b, asked in zip(sizes[1:], predicted[1:]) if asked)
    assert packed["tokens"].tolist() == valid.sum(1).tolist()
    assert (packed["tokens"] > 0).all()
    assert packed["input_ids"].shape[1] == length
    assert (packed["lengths"][:-1] == length).all(), "only the last row may be cut short"
    for row, used in zip(packed["input_ids"], packed["lengths"]):
        assert (row[used:] == PAD).all() and (row[:used] != PAD).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(documents())
def test_a_padded_row_is_one_record(sequences: list[TokenSequence]) -> None:
    rows = pad_rows(sequences, 12, PAD)
    assert rows["input_ids"].shape == (len(sequences), max(len(s.ids) for s in sequences) - 1)
    for i, s in enumerate(sequences):
        length = rows["lengths"][i]
        assert length == len(s.ids) - 1
        assert rows["input_ids"][i, :length].tolist() == s.ids[:-1].tolist()
        assert (rows["input_ids"][i, length:] == PAD).all()
        targets = [int(t) if asked else IGNORED for t, asked in zip(s.ids[1:], s.predicted[1:])]
        assert rows["targets"][i].tolist() == targets + [IGNORED] * (rows["targets"].shape[1] - length)
        assert rows["tokens"][i] == s.predicted[1:].sum()
        assert rows["bytes"][i] == s.bytes[1:][s.predicted[1:]].sum()


def test_all_columns_are_whole_numbers_that_torch_indexes_with() -> None:
    one = [sequence([1, 2, 3], [True] * 3, [1, 1, 1])]
    for made in (pack(one, 2, 0), pad_rows(one, 2, 0)):
        assert {name: array.dtype for name, array in made.items()} == dict.fromkeys(made, np.dtype("int64"))
        assert set(made) == {"input_ids", "targets", "tokens", "bytes", "lengths"}


def test_a_record_that_is_longer_than_a_row_must_be_cut_before() -> None:
    with pytest.raises(AssertionError):
        pad_rows([sequence([1, 2, 3, 4], [True] * 4, [1] * 4)], 2, 0)
