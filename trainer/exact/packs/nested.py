"""Arguments and results of functions: tensors in lists, tuples and dictionaries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def flat(values: Any, found: list[Any]) -> list[Any]:
    """The arguments of a function in one list, and in it the length of each list, tuple or dictionary among them."""
    if isinstance(values, Mapping):
        found += values
        values = values.values()
    for value in values:
        if isinstance(value, (list, tuple, Mapping)):
            found.append(len(value))
            flat(value, found)
        elif isinstance(value, slice):
            found += (value.start, value.stop, value.step)
        else:
            found.append(value)
    return found


def tensors_of(found: Any) -> Iterator[Tensor]:
    """The tensors that a function has returned."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for value in found:
            yield from tensors_of(value)
    elif isinstance(found, Mapping):
        yield from tensors_of(list(found.values()))


def cloned(value: Any) -> Any:
    """Arguments with copies of their tensors."""
    return value.clone() if isinstance(value, Tensor) else mapped(value, cloned)


def parts(value: Any) -> Any:
    """What a list, a tuple or a dictionary holds; nothing for anything else."""
    if isinstance(value, (list, tuple)):
        return value
    return value.values() if isinstance(value, Mapping) else ()


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """A list, a tuple or a dictionary with the function applied to each element; anything else as it is."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(function(v) for v in value)
    if type(value) is dict:
        return {name: function(v) for name, v in value.items()}
    if isinstance(value, dict):  # as transformers' outputs, whose fields are attributes, too
        return filled(value, {name: function(v) for name, v in value.items()})
    return value


def filled(like: Any, values: Mapping[str, Any]) -> Any:
    """A dictionary of a class of its own, with other values."""
    new = copy.copy(like)
    for name, value in values.items():
        new[name] = value
    return new
