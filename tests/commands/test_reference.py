"""The tables of keys on the pages, and the schema for editors, are those of the code."""

from __future__ import annotations

import re

import pytest

from trainer.commands import reference
from trainer.config import ready


@pytest.mark.parametrize("page", reference.PAGES)
def test_tables_of_keys_are_those_of_the_schema(page: str) -> None:
    text = (reference.ROOT / page).read_text()
    assert reference.filled(text) == text, "python -m trainer.commands.reference"


def test_the_schema_for_editors_is_that_of_the_keys() -> None:
    assert (ready.folder() / ready.SCHEMA).read_text() == reference.schema(), "python -m trainer.commands.reference"


def test_every_table_has_its_page() -> None:
    pages = "".join((reference.ROOT / page).read_text() for page in reference.PAGES)
    assert set(re.findall(r"<!-- keys: (\w+) -->", pages)) == set(reference.tables())
    assert (
        "`trainer.checkpoint.keep` | `2` | whole number, at least 1 | the number of newest checkpoints to keep |"
        in pages
    )


def test_only_what_lies_between_the_marks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "tables", lambda: {"one": "| new 1 |", "two": "| new \\2 |"})
    page = "before\n<!-- keys: one -->\nold\n<!-- end -->\n| stays |\n<!-- keys: two -->\n<!-- end -->\nafter"
    filled = reference.filled(page)
    assert filled == (
        "before\n<!-- keys: one -->\n\n| new 1 |\n\n<!-- end -->\n| stays |\n"
        "<!-- keys: two -->\n\n| new \\2 |\n\n<!-- end -->\nafter"
    )
    assert reference.filled(filled) == filled


def test_a_page_with_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="trainr"):
        reference.filled("<!-- keys: trainr -->\n<!-- end -->")


def test_every_task_of_the_trainer_has_a_table() -> None:
    from trainer.tasks.first_look import BUILT_IN

    assert set(reference.tables()) == {"deepspeed", "trainer", "study", "search", "cross_validation", *BUILT_IN}
