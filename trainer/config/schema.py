"""How a JSON file becomes checked dataclasses: reading, overrides, types, ranges, near-name errors.

A schema is a dataclass whose fields are made by `option`. Only the standard library is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError


def option(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A config field: its default, its meaning, and the range of its number."""
    metadata = {"doc": doc, "minimum": minimum, "above": above, "maximum": maximum, "below": below}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise UserError(f'the key "{key}" appears twice in the same block.')
        result[key] = value
    return result


# The deepest nesting of blocks. Python's own limit depends on the caller, and copying a config recurses, too.
_DEEPEST = 100


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list))]
        level = [value for values in inner for value in values]
    return any(isinstance(part, (dict, list)) for part in level)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, with line and column where it is malformed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f" In {path.parent} there are: {', '.join(p.name for p in near)}." if near else ""
        raise UserError(f"The config file {path} does not exist.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} cannot be read: {error}.") from None
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if _deeper_than(values, _DEEPEST):
        raise UserError(f"{path} has blocks or lists more than {_DEEPEST} deep in one another.")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object {{...}}, not {_kind(values)}.")
    return values


def lay_over(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets one dotted key of nested dictionaries, in place."""
    *parents, last = dotted.split(".")
    block = values
    for name in parents:
        block = block.setdefault(name, {})
        if not isinstance(block, dict):
            raise UserError(f'--set {dotted}: "{name}" is {_kind(block)}, not a block.')
    block[last] = value


def parse_override(text: str) -> tuple[str, Any]:
    """`dotted.key=value` as (key, value). The value is JSON if it can be read as JSON, else a string."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set {text}: expected dotted.key=value, for example --set trainer.epochs=5.")
    try:
        return key, json.loads(value, parse_constant=_reject_constant)
    except ValueError:
        return key, value


def near(name: str, valid: typing.Iterable[str]) -> str:
    """A sentence that names the valid key closest to `name`, or all valid keys if none is close."""
    valid = list(valid)
    matches = difflib.get_close_matches(name.lower(), [v.lower() for v in valid], n=1, cutoff=0.6)
    if matches:
        return f'Did you mean "{next(v for v in valid if v.lower() == matches[0])}"?'
    return f"Known: {', '.join(valid)}." if valid else "It takes none."


def build(cls: type, values: dict[str, Any], path: str) -> Any:
    """An instance of a schema dataclass from JSON values; `path` is its dotted path with a dot at the end."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f'unknown key "{path}{key}". {near(key, fields)}')
        arguments[key] = _convert(hints[key], value, path + key, fields[key].metadata)
    return cls(**arguments)


def _convert(hint: Any, value: Any, path: str, metadata: typing.Mapping[str, Any]) -> Any:
    if hint is Any:  # its owner checks it
        return value
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if value is None and len(arms) < len(typing.get_args(hint)):
            return None
        (hint,) = arms
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f'"{path}" must be a block {{...}}, not {_kind(value)}.')
        return build(typing.cast(type, hint), value, path + ".")
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool):
            listed = ", ".join(json.dumps(c) for c in choices)
            raise UserError(f'"{path}" is {json.dumps(value)}. It must be one of {listed}.')
        return value
    _check_size(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wanted = typing.get_origin(hint) or hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f'"{path}" must be {_article(wanted)}, not {_kind(value)}.')
    _check_range(value, path, metadata)
    return value


def _check_size(value: Any, path: str) -> None:
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(f'"{path}" has {len(str(abs(value)))} digits. It must fit into 64 bits.')


def _check_range(value: Any, path: str, metadata: typing.Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    minimum, above, maximum, below = (metadata.get(k) for k in ("minimum", "above", "maximum", "below"))
    if not math.isfinite(value):
        raise UserError(f'"{path}" is {value}. It must be finite.')
    if minimum is not None and value < minimum:
        raise UserError(f'"{path}" is {value}. It must be at least {minimum}.')
    if above is not None and value <= above:
        raise UserError(f'"{path}" is {value}. It must be above {above}.')
    if maximum is not None and value > maximum:
        raise UserError(f'"{path}" is {value}. It must be at most {maximum}.')
    if below is not None and value >= below:
        raise UserError(f'"{path}" is {value}. It must be below {below}.')


_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
_NAMES |= {dict: "a block {...}", list: "a list [...]"}


def _article(wanted: type) -> str:
    return _NAMES.get(wanted, wanted.__name__)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return {dict: "a block {...}", list: "a list [...]"}[type(value)]
    return f"{json.dumps(value)} ({_NAMES[type(value)]})" if not isinstance(value, bool) else json.dumps(value)


def check_arguments(values: dict[str, Any], types_by_name: dict[str, tuple[type, ...]], path: str) -> None:
    """Checks the names and JSON types of a free block (optimizer or scheduler arguments, ZeRO)."""
    for key, value in values.items():
        _check_size(value, f"{path}.{key}")
        if key not in types_by_name:
            raise UserError(f'unknown key "{path}.{key}". {near(key, types_by_name)}')
        allowed = types_by_name[key]
        if value == "auto":
            raise UserError(f'"{path}.{key}" is "auto", which only the Hugging Face Trainer fills in. Give a value.')
        if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
            wanted = "a number" if float in allowed else " or ".join(_NAMES[t] for t in allowed)
            raise UserError(f'"{path}.{key}" must be {wanted}, not {_kind(value)}.')
