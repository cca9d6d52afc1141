"""The options of a task. They are declared like the config: a dataclass, each field with a type, range and meaning.

A task of the trainer calls its dataclass `Options`, and begins its constructor with `read_options`. Rules that a type
or a range cannot express are checked by the task itself, with `refuse`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from ..errors import UserError
from .schema import build, convert, hints_of

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
    for name, value in given.items():
        if value == "":
            refuse(name, value, "a name, or left out")
    options: T = build(cls, dict(given), _PATH)
    return options


def check_options(cls: type, given: Mapping[str, Any]) -> None:
    """Raises UserError if an option is unknown or missing, or if its field in a task's dataclass does not allow it."""
    try:
        build(cls, dict(given), _PATH)
    except UserError:
        raise
    except ValueError as error:  # raised by the __post_init__ of a user's dataclass
        raise UserError(f'"{_PATH[:-1]}": {error}') from error


def read_arguments(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a task's constructor, checked by its annotations. One without an annotation is not checked.

    Args:
        cls: the task.
        given: name -> value; names that the constructor takes.

    Raises:
        UserError: neither the annotation nor the default allows a value.
    """
    parameters = inspect.signature(cls).parameters
    chosen = {name: parameters[name] for name in given if name in parameters}
    annotated = {name: p.annotation for name, p in chosen.items() if p.annotation is not p.empty}
    hints = hints_of(annotated, cls)
    return {
        # Often None is the default, but the annotation does not say so.
        name: value
        if name not in hints or (value is None and chosen[name].default is None)
        else convert(hints[name], value, _PATH + name)
        for name, value in given.items()
    }


def refuse(option: str, value: Any, rule: str) -> NoReturn:
    """Raises UserError, because an option breaks a rule. The message ends with "It must be" and the rule."""
    raise UserError(f'"{_PATH}{option}" is {value!r}. It must be {rule}.')


def is_number(value: Any) -> bool:
    """Whether a value is a number. True and false are not, though Python counts them as integers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
