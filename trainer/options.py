"""Checks of `trainer.task_options`: a wrong value is an error that names the option, the value and the rule."""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import UserError


def refuse(option: str, value: Any, rule: str) -> NoReturn:
    """Raises UserError: an option breaks a rule."""
    raise UserError(f'"trainer.task_options.{option}" is {value!r}. It must be {rule}.')


def check(option: str, value: Any, good: bool, rule: str) -> None:
    """Raises UserError unless the value of an option is good."""
    if not good:
        refuse(option, value, rule)


def check_flags(**values: Any) -> None:
    """Raises UserError unless each option is true or false."""
    for option, value in values.items():
        check(option, value, isinstance(value, bool), "true or false")


def check_names(**values: Any) -> None:
    """Raises UserError unless each option is a name or not given."""
    for option, value in values.items():
        check(option, value, value is None or (isinstance(value, str) and value != ""), "a name, or null")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_number(
    option: str, value: Any, low: float, high: float | None = None, *, integer: bool = False, none: bool = False
) -> Any:
    """An option that is a number from low to below high. Raises UserError."""
    if value is None and none:
        return None
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value < low or (high is not None and value >= high):
        rule = f"{'a whole' if integer else 'a'} number, at least {low:g}"
        rule += f" and below {high:g}" if high is not None else ""
        refuse(option, value, rule + ", or null" * none)
    return value


def check_kind(option: str, value: Any, kind: type, rule: str, *, none: bool = False) -> Any:
    """An option of a type (bool, str). Raises UserError."""
    if (value is None and none) or (isinstance(value, kind) and value != ""):
        return value
    refuse(option, value, rule + ", or null" * none)
