"""csv and tsv: every field as it is written, as many rows as the file has, and a note where that is not so."""

from __future__ import annotations

import csv
import io
import tracemalloc
from typing import Any

import pytest

from trainer.data.delimited import read_rows
from trainer.errors import UserError


def rows(text: str, tabs: bool = False, separator: str | None = None) -> list[list[str]]:
    return list(map(list, read_rows(text, "folder/a.csv", separator, tabs)[1]))


def notes(text: str, tabs: bool = False, separator: str | None = None) -> list[str]:
    return read_rows(text, "folder/a.csv", separator, tabs)[2]


def written(content: list[list[str]], **style: Any) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n", **style).writerows([["text", "label"], *content])
    return file.getvalue()


def test_fields_are_as_they_are_written() -> None:
    odd = ["None", "NA", "null", "nan", "007", "1.0", "1e3", "true", "2020-01-01", "-", " a ", ""]
    assert rows("text,label\n" + "".join(f"x,{value}\n" for value in odd)) == [["x", value] for value in odd]


def test_tweets_that_begin_with_a_quote_swallow_nothing() -> None:
    tweets = [[f"tweet {i}", "ab"[i % 2]] for i in range(60)]
    tweets[5][0], tweets[25][0], tweets[40][0] = '"quoted start', '"another', 'end of it"'
    plain = "text\tlabel\n" + "".join("\t".join(row) + "\n" for row in tweets)
    assert rows(plain, tabs=True) == tweets
    assert notes(plain, tabs=True) == []
    commas = plain.replace("\t", ",")
    assert rows(commas) == tweets
    assert notes(commas) == ["quotes in a.csv do not pair up, so they are read as they are written"]


def test_a_pair_of_tweets_that_quotes_would_join() -> None:
    """The first ends in the field where the second closes it, so that csv's rules are kept."""
    tweets = [["a", "x"], ['"start', "y"], ["b", "x"], ['end"', "y"]]
    text = "text\tlabel\n" + "".join("\t".join(row) + "\n" for row in tweets)
    assert rows(text, tabs=True) == tweets


@pytest.mark.parametrize("style", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
def test_files_that_are_quoted_consistently(style: Any, separator: str) -> None:
    content = [["plain", "a"], [f"with {separator} in it", "b"], ['say "hi"', "a"], ["two\nlines", "b"]]
    text = written(content, quoting=style, delimiter=separator)
    assert rows(text, tabs=separator == "\t") == content
    without = [row for row in content if "\n" not in row[0]]
    text = written(without, quoting=style, delimiter=separator)
    assert rows(text, tabs=separator == "\t") == without


def test_quoted_line_breaks_are_noted() -> None:
    text = written([["two\nlines", "a"], ["one", "b"]])
    assert notes(text) == ["4 lines of a.csv are 3 rows, because quoted texts hold line breaks"]


def test_quotes_inside_quotes_that_are_not_doubled() -> None:
    assert rows('text,label\n"big" dog,a\n"x, y",b\n') == [["big dog", "a"], ["x, y", "b"]]


def test_the_separator_is_that_of_the_header() -> None:
    assert rows("text;label\nyes, and no;a\n") == [["yes, and no", "a"]]
    assert notes("text;label\nyes, and no;a\n") == ["a.csv is separated by ';'"]
    assert notes("text\tlabel\na\tb\n") == ["a.csv is separated by tabs"]
    assert rows("text,label\na;b,c\n") == [["a;b", "c"]]
    assert rows("text#label\na#c\n", separator="#") == [["a", "c"]]
    assert rows("text\nonly; one\n") == [["only; one"]]


def test_line_ends_of_every_system_and_no_others() -> None:
    assert rows("text,label\r\na,b\r\n") == rows("text,label\ra,b\r") == [["a", "b"]]
    assert rows("text,label\na\u2028b\x0bc\x85d,e\n") == [["a\u2028b\x0bc\x85d", "e"]]


def test_blank_lines_are_counted() -> None:
    assert rows("text,label\n\na,b\n\n\n") == [["a", "b"]]
    assert notes("text,label\n\na,b\n\n\n") == ["1 blank line of a.csv left out"]


def test_long_fields() -> None:
    assert rows(f'text,label\n"{"x" * 300_000}",b\n') == [["x" * 300_000, "b"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "text,label\na,b\nc,d,e\n",
            r"folder/a.csv cannot be read: row 2 .* has 3 fields, but the header has 2: 'c,d,e'",
        ),
        ("text,label\na\n", "row 1 .* has 1 field, but the header has 2"),
        ("text,label,label\na,b,c\n", 'two columns "label"'),
        ("\n\n", "is empty"),
    ],
)
def test_rows_that_cannot_be_right(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        rows(text)


def test_large_files_are_read_in_little_memory() -> None:
    """A reading that is not needed is not made, and no copy has four bytes a character: this was 25 times the text."""
    text = written([[f"text, {i} and so on", "a"] for i in range(20_000)])
    tracemalloc.start()
    try:
        read_rows(text, "a.csv", None, tabs=False)
        assert tracemalloc.get_traced_memory()[1] < 15 * len(text)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("first", ["sep=;\n", '"sep=;"\r\n', "\ufeffSEP=;\n"])
def test_a_first_line_for_excel_says_the_separator(first: str) -> None:
    header, rows, _ = read_rows(first + "text;label\nx,y;1\n", "a.csv", None, tabs=False)
    assert (header, rows) == (["text", "label"], [("x,y", "1")])
