"""Words and tags: what is read, refused, and aligned with tokens."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.data import tagged, text, unknown
from trainer.data.table_files import Table
from trainer.errors import UserError


def read(words: list[Any], tags: list[Any], **more: Any) -> tuple[tagged.Sentences, list[str]]:
    notes: list[str] = []
    table = Table({"tokens": words, "ner_tags": tags}, **more)
    return tagged.read(table, "tokens", "ner_tags", "train", None, notes), notes


def test_sentences_without_words_are_left_out_with_a_note() -> None:
    found, notes = read([["a", "b"], [], ["c"]], [["O", "B-x"], [], ["O"]])
    assert found.words == [["a", "b"], ["c"]] and found.rows.tolist() == [0, 2]
    assert notes == ["1 sentence of train without words left out"]
    declared, _ = read([["a", "b"]], [[1, 0]], list_classes={"ner_tags": ["O", "B-x"]})
    assert declared.tags == [["B-x", "O"]]


@pytest.mark.parametrize(
    ("words", "tags", "said"),
    [
        ([["a", "b"]], [["O"]], "In train, row 1 .* has 2 words and 1 tag: "),
        ([["a"]], [None], "row 1 .* must hold a list of tags, but it is 'None'"),
        ([["a"]], [[None]], "holds None, which is no tag"),
        (["a b"], [["O"]], r"must hold lists of words.* row 1 .* is 'a b' \(str\)\. A csv file has no lists"),
        ([["a", 3]], [["O", "O"]], r"row 1 .* holds '3' \(int\)"),
        ([[]], [[]], "No sentence of train has a word"),
    ],
)
def test_sentences_that_are_refused(words: list[Any], tags: list[Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(words, tags)


def test_a_number_that_is_no_declared_tag_is_refused() -> None:
    with pytest.raises(UserError, match="holds 2, which is no tag"):
        read([["a"]], [[2]], list_classes={"ner_tags": ["O", "B-x"]})


def test_the_tags_of_a_kind_are_complete() -> None:
    """A test split may have I-b where train has only B-b: the model has an output for it."""
    names = tagged.tag_names({"train": [["B-b", "O", "B-a", "I-a"]], "test": [["B-b", "I-b"]]})
    assert names == ["O", "B-a", "I-a", "B-b", "I-b"]
    assert tagged.tag_names({"train": [["NOUN", "ADJ"]]}) == ["ADJ", "NOUN"]
    with pytest.raises(UserError, match="The tag 'B-c' occurs 2 times in test, but never in train"):
        tagged.tag_names({"train": [["B-b", "O"]], "test": [["B-c", "B-c"]]})
    with pytest.raises(UserError, match="All tags in train are 'NOUN'"):
        tagged.tag_names({"train": [["NOUN"]]})


def test_the_columns_of_conll_files_are_numbers() -> None:
    lists: list[Any] = [[["a"]]]
    assert tagged.columns_of(Table({str(i): lists[0] for i in (1, 2, 3, 4)}), None, None) == ("1", "4")
    assert tagged.columns_of(Table({str(i): lists[0] for i in (1, 2, 3, 4)}), "2", "3") == ("2", "3")
    with pytest.raises(UserError, match=r"tags_column. is needed"):
        tagged.columns_of(Table({"1": lists[0]}), None, None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return text.wrap(unknown.build_subwords(["ab cd abcd AB"] * 5, lowercase=False), 8)


def test_labels_stand_at_the_first_token_of_a_word(tokenizer: Any) -> None:
    sentence = ["abcdcd", "\u200b", "ab", "AB"]
    tokens = tagged.encode(tokenizer, [sentence], None, "")
    ids, places = tokens.ids[0], tokens.places[0]
    assert ids[0] == tokenizer.cls_token_id and places[0] == 1
    assert places == sorted(set(places)) and min(places) >= 1, "each word has a token of its own"
    assert ids[places[1]] == tokenizer.unk_token_id, "a sign without width"
    assert ids[places[2]] != ids[places[3]], "capital letters count"
    for word, place, stop in zip(sentence, places, [*places[1:], len(ids) - 1]):
        if word != "\u200b":
            assert (
                tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[place:stop])).replace(" ", "")
                == word
            )


def test_long_sentences_are_cut_for_training_and_read_in_parts_for_prediction(tokenizer: Any) -> None:
    sentence = ["ab"] * 10
    tokens = tagged.encode(tokenizer, [sentence], 8, "")
    assert len(tokens.ids[0]) == 8 and [place >= 0 for place in tokens.places[0]] == [True] * 6 + [False] * 4
    assert tagged.pieces(tokenizer, [["ab"], sentence], 8) == [(0, 0, 1), (1, 0, 6), (1, 6, 10)]
    assert tagged.pieces(tokenizer, [sentence], None) == [(0, 0, 10)]


def test_a_table_of_texts_is_told_which_formats_hold_lists() -> None:
    with pytest.raises(UserError, match=r"A csv file has no lists.*\.jsonl.*Parquet.*CoNLL"):
        tagged.columns_of(Table({"words": ["a b"], "x": ["O O"]}), None, None)
    assert tagged.columns_of(Table({"words": [None, ["a"]], "tags": [None, ["O"]]}), None, None) == ("words", "tags")
