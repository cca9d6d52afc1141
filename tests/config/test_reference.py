"""The table of a schema's keys, as pages show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from trainer.config.keys import Config
from trainer.config.reference import table
from trainer.config.schema import option
from trainer.config.task_options import required


@dataclass(frozen=True)
class Inner:
    depth: int = option(1, "how deep", minimum=0)


@dataclass(frozen=True, kw_only=True)
class Schema:
    data: str = required("a file")
    count: int | None = option(None, "how many", minimum=1, maximum=8)
    share: float = option(0.5, "how much", above=0, below=1)
    flag: bool = option(True, "whether")
    kind: Literal["a", 2, None] = option("a", "which")
    inner: Inner = option(Inner, "a block")
    maybe: Inner | None = option(None, "a block or none")
    free: dict[str, Any] = option({}, "a free block")
    items: list[str] = option(["a long name", "another long name"], "a list")
    anything: Any = option(None, "what its owner checks")


ROWS = {
    "data": "| `data` | required | text | a file |",
    "count": "| `count` | none | whole number, at least 1, at most 8 | how many |",
    "share": "| `share` | `0.5` | number, above 0, below 1 | how much |",
    "flag": "| `flag` | `true` | true or false | whether |",
    "kind": '| `kind` | `"a"` | `"a"` or `2` or `null` | which |',
    "inner": "| `inner.depth` | `1` | whole number, at least 0 | how deep |",
    "maybe": "| `maybe` | none | a block | a block or none |\n"
    "| `maybe.depth` | `1` | whole number, at least 0 | how deep |",
    "free": "| `free` | `{}` | a block | a free block |",
    "items": "| `items` | all | a list | a list |",
    "anything": "| `anything` | none |  | what its owner checks |",
}  # fmt: skip
HEAD = ["| key | default | values | meaning |", "|---|---|---|---|"]


def test_a_row_for_every_key_in_order() -> None:
    assert table(Schema).split("\n") == [*HEAD, *"\n".join(ROWS.values()).split("\n")]


def test_keys_stand_below_their_block() -> None:
    text = table(Schema, "trainer.")
    assert "| `trainer.inner.depth` |" in text and "| `trainer.maybe` |" in text and "| `trainer.flag` |" in text


@pytest.mark.parametrize("name", ROWS)
def test_a_key_that_is_left_out(name: str) -> None:
    rows = table(Schema, skipped=(name,)).split("\n")[2:]
    assert rows == "\n".join(row for key, row in ROWS.items() if key != name).split("\n")


def test_every_row_of_the_config_has_its_four_cells() -> None:
    """A "|" in a meaning would break the page's table."""
    for row in table(Config).splitlines():
        assert row.count("|") == 5 and row.rstrip(" |").count("|") == 4, row
