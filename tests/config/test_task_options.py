"""Options of tasks: a type, a range and a meaning each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from trainer.config.schema import option
from trainer.config.task_options import is_number, read_options, refuse, required
from trainer.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Any = required("a file")
    kind: Literal["a", "b"] = option("a", "which")
    width: int = option(4, "units", minimum=1, maximum=8)
    share: float = option(0.1, "held out", minimum=0, below=1)
    name: str | None = option(None, "a column")


def test_what_is_given_and_what_is_not() -> None:
    found = read_options(Options, {"data": ["anything"], "share": 0, "width": 8})
    assert found == Options(data=["anything"], share=0.0, width=8)
    assert isinstance(found.share, float)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, r'"trainer\.task_options\.data" is missing: a file\.'),
        ({"data": "x", "widht": 3}, r'unknown key "trainer\.task_options\.widht"\. Did you mean "width"\?'),
        ({"data": "x", "width": 9}, r'width" is 9\. It must be at most 8'),
        ({"data": "x", "width": True}, r'width" must be a whole number, not true'),
        ({"data": "x", "share": 1}, r'share" is 1\.0\. It must be below 1'),
        ({"data": "x", "kind": "c"}, r'kind" is "c"\. It must be one of "a", "b"'),
        ({"data": "x", "name": ""}, r"name\" is ''\. It must be a name, or left out"),
    ],
)
def test_what_breaks_a_rule(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_options(Options, given)


def test_a_rule_of_a_tasks_own() -> None:
    with pytest.raises(UserError, match=r'"trainer\.task_options\.size" is 0\. It must be a side in pixels\.'):
        refuse("size", 0, "a side in pixels")
    assert is_number(3.0) and not is_number(False) and not is_number("3")
