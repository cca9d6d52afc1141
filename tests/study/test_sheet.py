"""What every page has: a head that lets it load nothing, tables whose cells are text, numbers as people read them."""

from __future__ import annotations

import math

import pytest

from tests.study.made_up import NASTY
from tests.study.test_page import Page
from trainer.study.sheet import document, shown_value, table


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (math.nan, "-"),
        (0.0, "0.0000"),
        (0.95, "0.9500"),
        (-0.0005, "-0.0005"),
        (0.00001234, "1.23e-05"),
        (1234567.0, "1.23e+06"),
        (math.inf, "inf"),
        (1234567, "1,234,567"),
        (True, "True"),  # and not 1
        ("f" * 64, "f" * 12),  # a hash
        ("weak, W = 8", "weak, W = 8"),
    ],
)
def test_a_value_as_people_read_it(value: object, shown: str) -> None:
    assert shown_value(value) == shown


def test_a_table_holds_text_and_aligns_it_left() -> None:
    """Names of variants are a user's, and may hold anything."""
    page = Page()
    page.feed(source := table([[NASTY, 0.5, None, "-"]], ["what", "value", "-", NASTY]))
    assert page.open == []
    assert page.text.count(NASTY) == 2
    assert "script" not in page.tags
    assert page.tags.count("td") == page.tags.count("th") == 4
    assert source.count('<td class="text">') == 1  # numbers, and the dash of a missing one, stand at the right


def test_a_page_may_load_nothing_but_its_own_pictures() -> None:
    page = Page()
    page.feed(document(NASTY, ["<p>one</p>", "<p>two</p>"]))
    assert page.open == []
    assert NASTY in page.text
    attributes = dict(page.attributes)
    assert attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert page.tags.count("p") == 2
