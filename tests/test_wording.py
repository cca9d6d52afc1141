"""Words that many messages share."""

from __future__ import annotations

from trainer.wording import counted, row_at


def test_a_count_agrees_with_its_noun() -> None:
    assert [counted(n, "row") for n in (0, 1, 2_000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]


def test_rows_are_counted_from_1() -> None:
    assert row_at(0) == "row 1 (row 1 is the first sample)"
