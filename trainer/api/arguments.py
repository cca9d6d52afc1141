"""Checks of the arguments that a program gives. A message says what to give instead."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError


def overrides_in(value: object) -> dict[str, Any]:
    """A copy of the argument `overrides`; an empty dictionary for None. Raises UserError if it is no dictionary."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f'overrides is {_shown(value)}. Give a dictionary, such as {{"trainer.epochs": 3}}.')
    for key in value:
        if not isinstance(key, str):
            raise UserError(f'overrides has the key {key!r}. A key must be a text, such as "trainer.epochs".')
    return dict(value)


def refuse_no_task(value: object) -> None:
    """Raises UserError if the argument `task` is neither a name nor a class."""
    if value is None or isinstance(value, (str, type)):
        return
    if hasattr(value, "splits"):
        name = type(value).__name__
        raise UserError(
            f"task is an object of the class {name}. Give the class itself: task={name}.\n"
            "The arguments of its __init__ belong in trainer.task_options."
        )
    raise UserError(f'task is {_shown(value)}. Give a name such as "digits", path/to/file.py:ClassName, or a class.')


def refuse_no_path(name: str, value: object, give: str) -> None:
    """Raises UserError if an argument is neither a text nor a Path. `give` says what to give, for the message."""
    if not isinstance(value, (str, Path)):
        raise UserError(f"{name} is {_shown(value)}. Give {give}.")


def refuse_other_than(name: str, value: object, known: Sequence[str]) -> None:
    """Raises UserError if an argument is not one of the known texts."""
    if value not in known:
        *others, last = (f'"{one}"' for one in known)
        raise UserError(f"{name} is {_shown(value)}. It must be {', '.join(others)} or {last}.")


def objects_in(name: str, value: object) -> list[object]:
    """The objects in an argument that takes several, as a list. Raises UserError if it is not iterable."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UserError(f"{name} is {_shown(value)}. Give a list, such as {name}=[MyCallback()].")
    return list(value)


def count_in(name: str, value: object) -> int:
    """An argument that has to be a whole number of at least 1, as an int. Raises UserError if it is not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise UserError(f"{name} is {_shown(value)}. It must be a whole number of at least 1.")
    return int(value)


def _shown(value: object) -> str:
    """A value for a message: the value itself if its kind is short to write, else its type."""
    if value is None or isinstance(value, (str, bool, int, float, Path)):
        return repr(str(value)) if isinstance(value, Path) else repr(value)
    return f"of the type {type(value).__name__}"
