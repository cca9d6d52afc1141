"""The keys of a schema as a table for people. `commands.reference` writes these tables into the READMEs."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from .json_schema import value_of

_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_TYPES |= {"object": "a block", "array": "a list"}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def table(cls: type, prefix: str = "", skipped: tuple[str, ...] = ()) -> str:
    """A Markdown table of a schema's keys. It lists the keys of a block, and not the block itself.

    Args:
        cls: a dataclass whose fields are made by `schema.option`.
        prefix: what stands before each key, with a dot at its end.
        skipped: names of fields that are left out.
    """
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for row in _rows(cls, prefix, skipped):
        key, *cells = [cell.replace("|", r"\|") for cell in row]  # a bar would begin another cell
        rows.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def _rows(cls: type, prefix: str, skipped: tuple[str, ...]) -> typing.Iterator[tuple[str, str, str, str]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in skipped:
            continue
        arms, optional = _without_none(hints[field.name])
        hint = arms[0]
        if dataclasses.is_dataclass(hint):
            if optional and field.default is None:
                yield prefix + field.name, "none", "a block", field.metadata["doc"]
            yield from _rows(typing.cast(type, hint), f"{prefix}{field.name}.", ())
        else:
            values = " or ".join(words(value_of(arm, field.metadata)) for arm in arms)
            yield prefix + field.name, _default(field), values, field.metadata["doc"]


def _without_none(hint: Any) -> tuple[list[Any], bool]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        return arms, len(arms) < len(typing.get_args(hint))
    return [hint], False


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is field.default_factory is dataclasses.MISSING:
        return "required"
    value = field.default if field.default is not dataclasses.MISSING else typing.cast(Any, field.default_factory)()
    text = json.dumps(value)
    return "none" if value is None else f"`{text}`" if len(text) <= 24 else "all"


def words(schema: Mapping[str, Any]) -> str:
    """The values that a schema allows, in words; an empty text if it allows any. Null is not mentioned."""
    arms = [words(arm) for arm in schema.get("anyOf", ())]
    if arms and all(arms):
        return " or ".join(arms)
    choices = [schema["const"]] if "const" in schema else schema.get("enum", ())
    if choices:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in choices)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    limits = [f"{word} {schema[name]:g}" for name, word in _LIMITS.items() if name in schema]
    return " or ".join(
        ", ".join([_TYPES[kind], *(limits if kind in ("integer", "number") else [])])
        for kind in kinds
        if kind != "null"
    )
