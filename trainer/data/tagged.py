"""Sentences as words with a tag each: read from tables and CoNLL files, checked, and aligned with tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..wording import counted, row_at
from . import tables, text
from .conll import NO_LISTS
from .table_files import Table

WORD_COLUMNS = ("tokens", "words", "1")
TAG_COLUMNS = ("ner_tags", "tags", "labels", "ner", "pos_tags")
OUTSIDE = "O"
# Tags of entities: a letter for the word's place in its entity, and the entity's kind. L means E, and U means S.
ENTITY = re.compile(r"[BIESLU]-.+", re.DOTALL)


@dataclass(frozen=True)
class Sentences:
    """A split. `rows` are the places of the sentences in their file."""

    words: list[list[str]]
    tags: list[list[str]]
    rows: np.ndarray
    groups: list[Any] | None = None

    def take(self, places: np.ndarray) -> Sentences:
        """Some of the sentences. places: (n,) int64."""
        groups = None if self.groups is None else [self.groups[i] for i in places]
        return Sentences([self.words[i] for i in places], [self.tags[i] for i in places], self.rows[places], groups)


def columns_of(table: Table, words: str | None, tags: str | None) -> tuple[str, str]:
    """The columns of words and of tags. A CoNLL file's are numbers: words in the first, tags in the last.

    Raises:
        UserError: they are not there, or no column of the table holds lists.
    """
    if not any(isinstance(value, list) for name in table.column_names for value in table.values(name, 0, 20)):
        raise UserError(f'"trainer.task_options.data": {NO_LISTS}')
    numbers = [column for column in table.column_names if column.isdecimal()]
    last = numbers[-1:] if len(numbers) == len(table.column_names) > 1 else []
    return (
        tables.find_column(table.column_names, words, WORD_COLUMNS, "words_column"),
        tables.find_column(table.column_names, tags, (*TAG_COLUMNS, *last), "tags_column"),
    )


def words_of(table: Table, column: str, where: str) -> list[list[str]]:
    """The words of each sentence. Raises UserError for anything else than lists of texts."""
    values = tables.values_of(table, column, where)
    for row, value in enumerate(values):
        odd = value if not isinstance(value, list) else next((w for w in value if not isinstance(w, str)), None)
        if not isinstance(value, list) or odd is not None:
            raise UserError(
                f'The column "{column}" in {where} must hold lists of words, such as ["a", "word"], but {row_at(row)} '
                f"{'holds' if isinstance(value, list) else 'is'} {str(odd)[:50]!r} "
                f"({type(odd).__name__})." + (f" {NO_LISTS}" if isinstance(value, str) else "")
            )
    return values


def read(table: Table, words: str, tags: str, split: str, group: str | None, notes: list[str]) -> Sentences:
    """A split's sentences; those without words are left out, with a note.

    Raises:
        UserError: a sentence has no list of words or of tags, or lists of unequal length.
    """
    every, names = words_of(table, words, split), table.list_classes.get(tags)
    labels = []
    for row, (own, value) in enumerate(zip(every, tables.values_of(table, tags, split))):
        where = f'the column "{tags}" in {split}, {row_at(row)}'
        if not isinstance(value, list):
            raise UserError(f"{where}, must hold a list of tags, but it is {str(value)[:50]!r}.")
        if len(value) != len(own):
            raise UserError(
                f"In {split}, {row_at(row)} has {counted(len(own), 'word')} and {counted(len(value), 'tag')}: "
                f"{str(own)[:60]} and {str(value)[:60]}. Every word needs one tag."
            )
        odd = [
            t for t in value if not tables.is_label(t) or not str(t).strip() or (names and t not in range(len(names)))
        ]
        if odd:
            raise UserError(f"{where}, holds {odd[0]!r}, which is no tag.")
        labels.append([names[tag] if names else str(tag) for tag in value])
    kept = np.flatnonzero([len(own) > 0 for own in every])
    if not len(kept):
        raise UserError(f"No sentence of {split} has a word.")
    if len(kept) < len(every):
        notes.append(f"{counted(len(every) - len(kept), 'sentence')} of {split} without words left out")
    return Sentences(every, labels, np.arange(len(every)), tables.groups(table, group, split)).take(kept)


def are_entities(names: Sequence[str]) -> bool:
    """Whether tags mark entities (B-person, I-person), and are not simply one class a word, like parts of speech."""
    return all(name == OUTSIDE or ENTITY.fullmatch(name) for name in names)


def tag_names(tags: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """The tags: "O", then by alphabet. With entities, each kind in train gets every letter that train uses.

    So B-place in test is a known tag, even if train has only I-place.

    Args:
        tags: split -> the tags of each sentence.

    Raises:
        UserError: a split has a tag that cannot be learnt from train, or train has one tag only.
    """
    found = {tag for sentence in tags["train"] for tag in sentence}
    if are_entities(sorted(found)):
        kinds = {tag[2:] for tag in found if tag != OUTSIDE}
        letters = {tag[0] for tag in found if tag != OUTSIDE} | (
            {"B", "I"} & {t[0] for s in tags.values() for w in s for t in w}
        )
        found |= {OUTSIDE} | {f"{letter}-{kind}" for letter in letters for kind in kinds}
    for split, sentences in tags.items():
        unknown = Counter(tag for sentence in sentences for tag in sentence if tag not in found)
        if unknown:
            tag, count = unknown.most_common(1)[0]
            raise UserError(
                f"The tag {tag!r} occurs {count:,} time{'s' * (count > 1)} in {split}, but never in train, so no model "
                f"can learn it. Train has: {', '.join(sorted(found)[:20])}."
            )
    if len(found) < 2:
        raise UserError(f"All tags in train are {next(iter(found))!r}. A model needs at least two.")
    return sorted(found, key=lambda tag: (tag != OUTSIDE, tag[2:] if ENTITY.fullmatch(tag) else tag, tag))


@dataclass(frozen=True)
class Tokens:
    """Sentences as tokens: their numbers, and the place of each word's first token; -1 if the word is cut off."""

    ids: list[list[int]]
    places: list[list[int]]


def encode(tokenizer: Any, sentences: Sequence[Sequence[str]], limit: int | None, what: str) -> Tokens:
    """Tokenises sentences whose words are given, and cuts them at `limit` tokens; None for no limit.

    If the tokenizer makes no token of a word, such as a sign without width, the word becomes its unknown token.
    Otherwise the word would have no tag.
    """
    result = Tokens([], [])

    def encoded(some: list[list[str]]) -> Any:
        return tokenizer(
            some, is_split_into_words=True, truncation=limit is not None, max_length=limit, return_attention_mask=False
        )

    with text.quiet():
        for rows in text.chunks(len(sentences), text.CHUNK_TEXTS, what):
            some = [list(sentence) for sentence in sentences[rows.start : rows.stop]]
            output = encoded(some)
            places = [_places(output.word_ids(i), len(words)) for i, words in enumerate(some)]
            changed = False
            for words, own in zip(some, places):
                # A word without a token before this one is an empty word. After it, words are cut off.
                seen = max((i for i, place in enumerate(own) if place >= 0), default=len(own))
                for i, place in enumerate(own):
                    if place < 0 and (i < seen or limit is None) and tokenizer.unk_token:
                        words[i], changed = tokenizer.unk_token, True
            if changed:
                output = encoded(some)
                places = [_places(output.word_ids(i), len(words)) for i, words in enumerate(some)]
            result.ids.extend(output["input_ids"])
            result.places.extend(places)
    return result


def _places(word_ids: Sequence[int | None], words: int) -> list[int]:
    first = [-1] * words
    for place, word in enumerate(word_ids):
        if word is not None and first[word] < 0:
            first[word] = place
    return first


def pieces(tokenizer: Any, sentences: Sequence[Sequence[str]], limit: int | None) -> list[tuple[int, int, int]]:
    """(sentence, first word, one after the last word) of parts of at most `limit` tokens, in order."""
    every, room = encode(tokenizer, sentences, None, "Tokenising"), 0
    if limit is not None:
        room = max(1, limit - tokenizer.num_special_tokens_to_add())
    result = []
    for sentence, (ids, places) in enumerate(zip(every.ids, every.places)):
        sizes = np.diff([*places, len(ids)]).tolist() if places else []
        start = used = 0
        for word, size in enumerate(sizes):
            if room and used and used + size > room:
                result.append((sentence, start, word))
                start, used = word, 0
            used += size
        if sizes:
            result.append((sentence, start, len(sizes)))
    return result
