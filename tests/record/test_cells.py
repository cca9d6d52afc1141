"""No cell of a csv file is a formula to a spreadsheet, and numbers stay numbers."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from trainer.record.cells import no_formula


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_a_text_that_begins_like_a_formula_gets_a_quote_mark(sign: str) -> None:
    assert no_formula(f"{sign}HYPERLINK(A1)") == f"'{sign}HYPERLINK(A1)"


@pytest.mark.parametrize("value", ["-1.5", "+3", "-1e-3", "-inf", "-", "= ", "", "a=b", "'=1", "-1.5\n", -1.5, 3, None])
def test_numbers_signs_alone_and_other_texts_stay(value: Any) -> None:
    assert no_formula(value) == value


@pytest.mark.parametrize(("text", "cell"), [("a\rb", "a\nb"), ("\r=1", "'\n=1"), ("a\r\nb", "a\r\nb")])
def test_a_carriage_return_by_itself_ends_no_row(text: str, cell: str) -> None:
    """Python's csv did not quote it before version 3.13, and readers take it for the end of a row."""
    written = io.StringIO(newline="")
    csv.writer(written).writerow([no_formula(text), "next"])
    assert list(csv.reader(io.StringIO(written.getvalue(), newline=""))) == [[cell, "next"]]
