"""Many files at once: their order, and one message for all that cannot be read."""

from __future__ import annotations

import time

import pytest

from trainer.data.reading import blocks, read_each
from trainer.errors import UserError


def test_results_come_in_order_and_what_is_broken_at_the_end() -> None:
    def one(source: int) -> int:
        time.sleep(0.01 if source == 0 else 0)
        if source in (2, 3):
            raise ValueError(f"{source} is odd" if source % 2 else "even")
        return 10 * source

    found = []
    reads = read_each(((f"file {i}", i) for i in range(5)), one, "clip", str)
    with pytest.raises(UserError) as error:
        found.extend(reads)
    assert found == [("file 0", 0), ("file 1", 10), ("file 4", 40)]
    assert str(error.value) == ("2 clips cannot be read:\n  file 2 (even)\n  file 3 (3 is odd)\nRepair or remove them.")


def test_blocks_hold_everything_once() -> None:
    assert list(blocks(range(5), 2)) == [[0, 1], [2, 3], [4]]
