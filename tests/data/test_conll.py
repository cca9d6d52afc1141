"""Files with a word a line."""

from __future__ import annotations

import pytest

from trainer.data.conll import read_conll
from trainer.errors import UserError


def test_tabs_blanks_comments_and_documents() -> None:
    assert read_conll("a\tO\nb c\tB-x\n\t\n\n#\tO\n", "f") == {"1": [["a", "b c"], ["#"]], "2": [["O", "B-x"], ["O"]]}
    text = "-DOCSTART- -X- O O\r\n\r\nEU NNP I-NP B-ORG\r\n. . O O\r\n"
    assert read_conll(text, "f")["4"] == [["B-ORG", "O"]]
    assert read_conll("# text = a b\na X\nb Y\n\n# id 1 2\nc X\n", "f") == {
        "1": [["a", "b"], ["c"]],
        "2": [["X", "Y"], ["X"]],
    }


def test_a_word_may_hold_other_ends_of_lines() -> None:
    assert read_conll("a\u0085b\tO\nc\tO", "f")["1"] == [["a\u0085b", "c"]]


def test_a_line_of_another_width_is_named() -> None:
    with pytest.raises(UserError, match=r"line 3 of f has 1 field, but most lines have 2: 'lonely'"):
        read_conll("a O\nb O\nlonely\nc O\n", "f")
    with pytest.raises(UserError, match="f has no words"):
        read_conll("\n \n", "f")
