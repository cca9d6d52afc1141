"""Arguments of a wrong type: what is said, and what passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from trainer import UserError
from trainer.api.arguments import (
    count_in,
    objects_in,
    overrides_in,
    refuse_no_path,
    refuse_no_task,
    refuse_other_than,
)


class Mine:
    def splits(self) -> None: ...


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda: overrides_in("a=1"), "overrides is 'a=1'. Give a dictionary"),
        (lambda: overrides_in([]), "overrides is of the type list. Give a dictionary"),
        (lambda: overrides_in({5: 3}), 'overrides has the key 5. A key must be a text, such as "trainer.epochs".'),
        (lambda: refuse_no_task(Mine()), "an object of the class Mine. Give the class itself: task=Mine."),
        (lambda: refuse_no_task(5), "task is 5. Give a name"),
        (lambda: refuse_no_path("data", None, "a file"), "data is None. Give a file."),
        (lambda: refuse_other_than("device", "gpu", ("auto", "cpu")), 'It must be "auto" or "cpu".'),
        (lambda: objects_in("callbacks", "on_log"), "callbacks is 'on_log'. Give a list"),
        (lambda: objects_in("callbacks", 5), "callbacks is 5. Give a list"),
        (lambda: count_in("ranks", True), "ranks is True. It must be a whole number of at least 1."),
        (lambda: count_in("ranks", "2"), "ranks is '2'."),
    ],
)
def test_what_is_no_argument(check: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check()
    assert words in str(caught.value)


def test_what_is_one() -> None:
    assert overrides_in(None) == {} and overrides_in(MappingProxyType({"a": 1})) == {"a": 1}
    for task in (None, "digits", Mine):
        refuse_no_task(task)
    for path in ("here", Path("here")):
        refuse_no_path("data", path, "a file")
    refuse_other_than("device", "cpu", ("auto", "cpu"))
    assert objects_in("callbacks", (one for one in "ab")) == ["a", "b"]
    assert count_in("ranks", np.int64(2)) == 2
