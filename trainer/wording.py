"""Words that many messages share: a count with its noun, and how the rows of data are named."""

from __future__ import annotations


def counted(count: int, noun: str, several: str | None = None) -> str:
    """A count with its noun: "1 row", "2,000 rows". several: the plural, if it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else several or f'{noun}s'}"


def row_at(place: int) -> str:
    """A row of data, for messages. Rows are counted from 1, and a header does not count.

    Args:
        place: of the row, from 0.
    """
    return f"row {place + 1:,} (row 1 is the first sample)"
