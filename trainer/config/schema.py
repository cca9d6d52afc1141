"""How a JSON file becomes checked dataclasses: reading, overrides, types, ranges, near-name errors.

A schema is a dataclass whose fields are made by `option`. Only the standard library is imported.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import json
import math
import sys
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
    """A config field: its default, its meaning, and the range of its number.

    Args:
        default: a class stands for a block: a new instance of it.
        doc: the meaning, for the tables and the schema.
        minimum, maximum: the range, with its ends.
        above, below: the range, without its ends.
    """
    metadata = {"doc": doc, "minimum": minimum, "above": above, "maximum": maximum, "below": below}
    if isinstance(default, (dict, list)):  # each config gets a copy of its own, or a change in one would change all
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


# The deepest nesting of blocks. Without a limit, Python's own would be reached somewhere: it depends on the caller, and
# copying a config recurses, too.
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
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except FileNotFoundError:
        near = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f" In {path.parent} there are: {', '.join(p.name for p in near)}." if near else ""
        raise UserError(f"The config file {path} does not exist.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} cannot be read: {error}.") from None
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise UserError(_no_json(path, text, error)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if _deeper_than(values, _DEEPEST):
        raise UserError(f"{path} has blocks or lists more than {_DEEPEST} deep in one another.")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object {{...}}, not {_kind(values)}.")
    return values


def _no_json(path: Path, text: str, error: json.JSONDecodeError) -> str:
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if not first.startswith(("{", "[")):
        found = f"its first line is {first[:60]!r}" if first else "it is empty"
        remedy = f" Data are named in one: --set trainer.task_options.data={path}" if path.suffix != ".json" else ""
        return f"{path} is no config: a config is a JSON object {{...}}, but {found}.{remedy}"
    lines = text.splitlines()
    line = lines[error.lineno - 1].strip() if error.lineno <= len(lines) else ""
    shown = f" ({line[:60]})" if line else ""
    return f"{path} is not valid JSON: line {error.lineno}, column {error.colno}{shown}: {error.msg}."


# This block is never replaced as a whole. It holds most settings of a file, and most of these have defaults. So nobody
# would notice that the file's values are gone.
_NEVER_WHOLE = "trainer"


def lay_over(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets one dotted key of nested dictionaries, in place. A block is replaced as a whole.

    Raises:
        UserError: the key lies inside of a value that is no block, or it is the whole block "trainer".
    """
    if dotted == _NEVER_WHOLE:
        raise UserError(
            f'"{dotted}" is the whole block. Setting it would drop all its other keys, also those of the file.\n'
            f'Name single keys, for example "{dotted}.epochs".'
        )
    *parents, last = dotted.split(".")
    block = values
    for name in parents:
        block = block.setdefault(name, {})
        if not isinstance(block, dict):
            raise UserError(f'--set {dotted}: "{name}" is {_kind(block)}, not a block.')
    block[last] = value


def parse_override(text: str) -> tuple[str, Any]:
    """(key, value) of a text `dotted.key=value`. The value is JSON if it can be read as JSON, else a string."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set {text}: expected dotted.key=value, for example --set trainer.epochs=5.")
    try:
        parsed = json.loads(value, parse_constant=_reject_constant)
        too_deep = _deeper_than(parsed, _DEEPEST)
    except ValueError:
        return key, value
    except RecursionError:
        too_deep = True
    if too_deep:
        raise UserError(f"--set {key} has blocks or lists more than {_DEEPEST} deep in one another.")
    return key, parsed


def near(name: str, valid: typing.Iterable[str]) -> str:
    """A sentence that names the valid key closest to `name`, or all valid keys if none is close."""
    valid = list(valid)
    typed = name.lower()
    for known in valid:  # first names with one other letter: AdamV is nearer to AdamW than to Adam
        if len(typed) >= 5 and len(known) == len(typed) and sum(a != b for a, b in zip(known.lower(), typed)) == 1:
            return f'Did you mean "{known}"?'
    matches = difflib.get_close_matches(typed, [v.lower() for v in valid], n=1, cutoff=0.6)
    if matches:
        return f'Did you mean "{next(v for v in valid if v.lower() == matches[0])}"?'
    return f"Known: {', '.join(valid)}." if valid else "It takes none."


def build(cls: type, values: dict[str, Any], path: str) -> Any:
    """An instance of a schema dataclass, made from JSON values that are checked.

    Args:
        cls: the dataclass.
        values: name -> value.
        path: its dotted path with a dot at the end, for messages.

    Raises:
        UserError: a key is unknown or missing, or a value breaks its field's rule.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for name, given in fields.items():
        if given.default is given.default_factory is dataclasses.MISSING and name not in values:
            doc = given.metadata.get("doc")
            raise UserError(f'"{path}{name}" is missing{f": {doc}" if doc else ""}.')
    hints = hints_of({name: given.type for name, given in fields.items()}, cls)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f'unknown key "{path}{key}". {near(key, fields)}')
        arguments[key] = convert(hints[key], value, path + key, fields[key].metadata)
    return cls(**arguments)


def hints_of(annotations: dict[str, Any], owner: type) -> dict[str, Any]:
    """Name -> the type that its annotation stands for; Any for an annotation that cannot be resolved.

    Args:
        annotations: types, or texts as `from __future__ import annotations` makes them.
        owner: the class in which they stand.
    """
    names: dict[str, Any] = {}
    for base in reversed(owner.__mro__):  # a base class may be of another file, with other names
        names |= vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
    hints = {}
    for name, annotation in annotations.items():
        try:
            one = types.SimpleNamespace(__annotations__={name: annotation})
            hints[name] = typing.get_type_hints(one, names, dict(vars(owner)))[name]
        except Exception:  # a name that is imported only for type checkers, or no type at all
            hints[name] = Any
    return hints


_UNIONS = (typing.Union, types.UnionType)
# Annotations that mean JSON's lists and blocks.
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_BLOCKS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_NOTHING: typing.Mapping[str, Any] = {}


def convert(hint: Any, value: Any, path: str, metadata: typing.Mapping[str, Any] = _NOTHING) -> Any:
    """A JSON value as a type annotation wants it; unchanged if the annotation cannot be checked.

    Args:
        hint: the annotation.
        value: of JSON.
        path: its dotted place, for messages.
        metadata: the range of a number, as `option` notes it.

    Raises:
        UserError: the annotation or the range does not allow it.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in _UNIONS:
        return _convert_to_any(inner, value, path, metadata)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f'"{path}" must be a block {{...}}, not {_kind(value)}.')
        return build(typing.cast(type, hint), value, path + ".")
    if origin is Literal:
        # The kinds are compared, too, because in Python True == 1.
        if not any(choice == value and isinstance(choice, bool) == isinstance(value, bool) for choice in inner):
            listed = ", ".join(json.dumps(c, default=str) for c in inner)
            raise UserError(f'"{path}" is {json.dumps(value)}. It must be one of {listed}.')
        return value
    if origin in _LISTS:
        return _convert_list(origin, inner, value, path)
    if origin in _BLOCKS:
        _check_type(dict, value, path)
        return {k: convert(inner[1], v, f"{path}.{k}") for k, v in value.items()} if len(inner) == 2 else value
    if not any(hint is known for known in _NAMES):  # Any: its user checks it
        return value
    _check_size(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    _check_type(hint, value, path)
    _check_range(value, path, metadata)
    return value


def _convert_to_any(hints: tuple[Any, ...], value: Any, path: str, metadata: typing.Mapping[str, Any]) -> Any:
    """Converts a value to the first of several types that allows it. A type that leaves it as it is comes first."""
    if len(hints) == 2 and type(None) in hints and value is not None:  # then the message is about the other type alone
        return convert(next(hint for hint in hints if hint is not type(None)), value, path, metadata)
    converted, errors = [], []
    for hint in hints:
        try:
            converted.append(convert(hint, value, path, metadata))
        except UserError as refused:
            errors.append(refused)
    if not converted:
        wrong_kind = f'"{path}" must be '
        for error in errors:  # the value has the right kind, but is out of its range or has a wrong element
            if not str(error).startswith(wrong_kind):
                raise error
        raise UserError(f"{wrong_kind}{' or '.join(_named(hint) for hint in hints)}, not {_kind(value)}.")
    return next((result for result in converted if type(result) is type(value)), converted[0])


def _named(hint: Any) -> str:
    """A type in words, for messages."""
    origin = typing.get_origin(hint) or hint
    if origin is Literal:
        return " or ".join(json.dumps(choice, default=str) for choice in typing.get_args(hint))
    kind = dict if origin in _BLOCKS or dataclasses.is_dataclass(hint) else list if origin in _LISTS else origin
    return _NAMES.get(kind, str(hint))


def _convert_list(origin: Any, inner: tuple[Any, ...], value: Any, path: str) -> Any:
    _check_type(list, value, path)
    if origin is tuple and inner and inner[-1] is not ...:
        if len(value) != len(inner):
            raise UserError(f'"{path}" has {len(value)} elements. It must have {len(inner)}.')
        hints = list(inner)
    else:
        hints = [inner[0] if inner else Any] * len(value)
    result = [convert(hint, element, f"{path}[{k}]") for k, (hint, element) in enumerate(zip(hints, value))]
    return tuple(result) if origin is tuple else result


def _check_type(wanted: type, value: Any, path: str) -> None:
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f'"{path}" must be {_NAMES[wanted]}, not {_kind(value)}.')


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


_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
_NAMES |= {dict: "a block {...}", list: "a list [...]", type(None): "null"}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return {dict: "a block {...}", list: "a list [...]"}[type(value)]
    return f"{json.dumps(value)} ({_NAMES[type(value)]})" if not isinstance(value, bool) else json.dumps(value)


def check_arguments(values: dict[str, Any], types_by_name: dict[str, tuple[type, ...]], path: str) -> None:
    """Checks the names and JSON types in a block that has no dataclass (optimizer or scheduler arguments, ZeRO).

    Raises:
        UserError: a name is unknown, or a value has another type.
    """
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


def flat(values: collections.abc.Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one: dotted key -> value. An empty mapping counts as a value."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, collections.abc.Mapping) and value
            else {prefix + key: value}
        )
    return result
