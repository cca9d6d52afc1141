"""The options of a task, declared like those of the config: a dataclass whose fields have a type, range and meaning.

A task of the trainer calls its dataclass `Options`, and begins its constructor with `read_options`. Rules that a type
or a range cannot express are checked by the task itself, with `refuse`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from ..errors import UserError
from .schema import build

T = TypeVar("T")
_PATH = "trainer.task_options."


def required(doc: str) -> Any:
    """A field without a default: the user must give it."""
    return dataclasses.field(metadata={"doc": doc})


def read_options(cls: type[T], given: Mapping[str, Any]) -> T:
    """A task's options, checked.

    Args:
        cls: the dataclass.
        given: name -> value.

    Raises:
        UserError: one is unknown, missing, or breaks its field's rule.
    """
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in given:
            raise UserError(f'"{_PATH}{field.name}" is missing: {field.metadata["doc"]}.')
    for name, value in given.items():
        if value == "":
            refuse(name, value, "a name, or left out")
    options: T = build(cls, dict(given), _PATH)
    return options


def refuse(option: str, value: Any, rule: str) -> NoReturn:
    """Raises UserError: an option breaks a rule."""
    raise UserError(f'"{_PATH}{option}" is {value!r}. It must be {rule}.')


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
