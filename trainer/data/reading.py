"""Reads many files at once, in order, and names all that cannot be read in one message."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..errors import UserError

Result = TypeVar("Result")

BLOCK = 256  # files that are read at a time


def read_each(
    named: Iterable[tuple[str, Any]],
    one: Callable[[Any], Result],
    word: str,
    reason_of: Callable[[Exception], str],
) -> Iterator[tuple[str, Result]]:
    """(name, what `one` gives) of each named source, in order, on all processors.

    Args:
        named: (name for messages, source).
        one: reads a source. If it raises anything, the source cannot be read. It runs in several threads.
        word: what a source is, for messages: "image".
        reason_of: an exception in words.

    Raises:
        UserError: at the end, with all sources that cannot be read.
    """
    from concurrent.futures import ThreadPoolExecutor

    def attempt(entry: tuple[str, Any]) -> tuple[str, Result | None, Exception | None]:
        name, source = entry
        try:
            return name, one(source), None
        except Exception as error:  # decoders raise a dozen kinds
            return name, None, error

    broken = []
    # Threads are enough: decoders release Python's lock while they work.
    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        for block in blocks(named, BLOCK):
            for name, result, error in pool.map(attempt, block):
                if error is not None:
                    broken.append(f"{name} ({reason_of(error)})")
                else:
                    yield name, result  # type: ignore[misc]
    if broken:
        shown = "\n".join(f"  {line}" for line in broken[:10]) + ("\n  ..." if len(broken) > 10 else "")
        raise UserError(
            f"{len(broken)} {word}{'s' * (len(broken) > 1)} cannot be read:\n{shown}\nRepair or remove them."
        )


def blocks(entries: Iterable[Any], length: int) -> Iterator[list[Any]]:
    """Consecutive entries in lists of `length`, the last of them shorter."""
    block = []
    for entry in entries:
        block.append(entry)
        if len(block) == length:
            yield block
            block = []
    if block:
        yield block
