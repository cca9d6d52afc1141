"""The JSON schema of a config file (draft 2020-12), for editors. It is made from the dataclasses that check the file.

JSON schema cannot express every rule. Then the schema is less strict: what it refuses, the trainer refuses, too.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from . import deepspeed_keys
from .keys import Config, TrainerOptions

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", dict: "object"}
_TYPES |= {list: "array", type(None): "null"}
_RANGE = {"minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum", "below": "exclusiveMaximum"}


def block(cls: type, path: str = "", more: Mapping[str, Schema] | None = None, text: Schema | None = None) -> Schema:
    """The schema of a block that a dataclass checks.

    Args:
        cls: its fields are made by `schema.option` or `task_options.required`.
        path: its dotted key, with a dot at the end.
        more: dotted key -> what is added to that key's schema.
        text: what is added to the schema of every text, and to that of a value of any type.
    """
    more, text = more or {}, text or {}
    hints, properties, needed = typing.get_type_hints(cls), {}, []
    for field in dataclasses.fields(cls):
        inner = _value(hints[field.name], field.metadata, f"{path}{field.name}", more, text)
        own: Schema = {"description": field.metadata["doc"], **inner, **more.get(path + field.name, {})}
        if field.default is not dataclasses.MISSING:
            own["default"] = field.default
        elif field.default_factory is dataclasses.MISSING:
            needed.append(field.name)
        elif isinstance(made := field.default_factory(), (dict, list)):
            own["default"] = made
        properties[field.name] = own
    return _closed(properties, needed)


def _closed(properties: Schema, needed: Iterable[str] = ()) -> Schema:
    """The schema of a block that allows no other keys."""
    required = {"required": list(needed)} if needed else {}
    return {"type": "object", "properties": properties, **required, "additionalProperties": False}


def value_of(hint: Any, metadata: Mapping[str, Any]) -> Schema:
    """The schema of a value of this type, in the range that `schema.option` has noted in the field's metadata."""
    return _value(hint, metadata, "", {}, {})


def _value(hint: Any, metadata: Mapping[str, Any], path: str, more: Mapping[str, Schema], text: Schema) -> Schema:
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union([_value(arm, metadata, path, more, text) for arm in inner])
    if dataclasses.is_dataclass(hint):
        return block(typing.cast(type, hint), path + ".", more, text)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is list and inner:
        return {"type": "array", "items": _value(inner[0], {}, path, more, text)}
    if origin not in _TYPES:  # Any: its user checks it
        return {"not": {"const": ""}} if text else {}
    limits = {_RANGE[name]: metadata[name] for name in _RANGE if metadata.get(name) is not None}
    return {"type": _TYPES[origin], **(limits if origin in (int, float) else {}), **(text if origin is str else {})}


def _union(arms: list[Schema]) -> Schema:
    """The schema of a union: the keywords of all its types together.

    They can stand together, because a keyword for one kind of value ("minimum") ignores values of other kinds. A choice
    ("enum") is different, but beside choices there is only null.
    """
    result: Schema = {}
    for arm in arms:
        result |= {name: rule for name, rule in arm.items() if name not in ("type", "enum")}
    choices = [choice for arm in arms for choice in arm.get("enum", ())]
    kinds = [arm["type"] for arm in arms if "type" in arm]
    if choices:
        assert kinds in ([], ["null"]), arms
        return {"enum": choices + [None] * len(kinds), **result}
    return {"type": kinds, **result}


# By dotted key: rules that `keys` checks in addition to the field's type and range.
_NUMBER_FROM_0: Schema = {"type": "number", "minimum": 0}
_DOCS = {
    "lr": "the learning rate; trainer.learning_rate changes it over a run",
    "betas": "how slowly the two means of gradients and of their squares forget",
    "eps": "is added to the divisor",
    "weight_decay": "the share of the learning rate by which weights shrink in a step",
    "torch_adam": "take torch's instead of DeepSpeed's FusedAdam, which has to be compiled",
    "fused": "torch's kernel for all parameters at once",
}
_BETAS: Schema = {"minItems": 2, "maxItems": 2, "items": {"type": "number", "minimum": 0, "exclusiveMaximum": 1}}
_GROUP = dict.fromkeys(("lr", "weight_decay", "eps", "momentum"), _NUMBER_FROM_0) | {"betas": {}}
_POOL: Schema = {"items": {"enum": ["train", "validation", "test"]}, "minItems": 1, "uniqueItems": True}
_MORE: dict[str, Schema] = {
    "optimizer.params": {
        "properties": {**{name: {"minimum": 0} for name in ("lr", "weight_decay", "eps")}, "betas": _BETAS},
    },
    "scheduler.type": {"enum": list(deepspeed_keys.SCHEDULERS)},
    "trainer.pack": {"anyOf": [{"enum": ["auto", None]}, {"type": "integer", "minimum": 1}]},
    "trainer.fold.pool": _POOL,
    "cross_validation.pool": _POOL,
    "trainer.parameter_groups": {"additionalProperties": {**_closed(_GROUP), "minProperties": 1}},
}


def document(tasks: Mapping[str, type], blocks: Mapping[str, tuple[type, str]], more: Mapping[str, Schema]) -> Schema:
    """The schema of a whole file.

    Args:
        tasks: the trainer's own tasks, name -> dataclass of its options.
        blocks: name of a block that a plain run ignores -> its dataclass, and its meaning.
        more: dotted key -> what is added to that key's schema.
    """
    more = {**_MORE, **more}
    top = block(Config, more=more)
    properties = top["properties"]
    for name, conditions in (
        ("optimizer", _optimizers()),
        ("scheduler", _schedulers()),
        ("trainer", _tasks(tasks)),
    ):
        properties[name]["allOf"] = conditions
    properties["optimizer"]["properties"]["type"] |= {
        "examples": ["AdamW", "Adam", "Lion", "SGD"],
        "allOf": [
            {"not": {"pattern": f"^{_any_case(name)}$"}, "errorMessage": f"{name} cannot be used: {why}"}
            for name, why in deepspeed_keys.REFUSED_OPTIMIZERS.items()
        ],
    }
    properties["scheduler"]["required"] = ["type"]
    properties["zero_optimization"] |= _arguments(deepspeed_keys.ZERO, "DeepSpeed's, with ZeRO")
    properties["zero_optimization"]["properties"]["stage"]["enum"] = [0, 1, 2, 3]
    properties["trainer"]["properties"]["task"]["anyOf"] = [{"enum": sorted(tasks)}, {"pattern": r":|\.py$"}]
    for name, (cls, doc) in blocks.items():
        doc = f"{doc}; a plain run ignores it"
        properties[name] = {"description": doc, **block(cls, f"{name}.", more), **more.get(name, {})}
    properties["$schema"] = {"description": "where editors find this schema; the trainer ignores it", "type": "string"}
    head = {"$schema": _DIALECT, "title": "a config of strong-scaling-trainer"}
    return {**head, **top, "patternProperties": {f"^{name}$": _refused(why) for name, why in _REFUSED}}


_REFUSED = deepspeed_keys.REFUSED.items()


def _refused(why: str) -> Schema:
    """The schema of a DeepSpeed key without effect here. It allows a value that asks for nothing, such as false."""
    doc = f"a DeepSpeed key without effect here: {why}"
    told = {"errorMessage": doc}  # no keyword of JSON schema, but editors show it instead of their own message
    off = {"type": "object", "properties": {"enabled": {"const": False, **told}}, "required": ["enabled"], **told}
    return {"description": doc, "anyOf": [{"enum": [False, None]}, off]}


def _any_case(name: str) -> str:
    """A regular expression for a name in capital or small letters. JSON schema has no flag for this."""
    return "".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in name)


def _arguments(
    types_by_name: Mapping[str, tuple[type, ...]], doc: str, needed: Iterable[str] = (), more: Schema | None = None
) -> Schema:
    """The schema of arguments that `schema.check_arguments` checks. `more` has additions to an argument's schema."""

    def kind(allowed: tuple[type, ...]) -> Any:
        names = [_TYPES[t] for t in allowed if t is not int or float not in allowed]  # a number may be a whole one
        return names[0] if len(names) == 1 else names

    return _closed(
        {
            name: {"description": doc, "type": kind(allowed), **(more or {}).get(name, {})}
            for name, allowed in types_by_name.items()
        },
        needed,
    )


def _optimizers() -> list[Schema]:
    conditions = []
    limits = _MORE["optimizer.params"]["properties"]
    for name, arguments in deepspeed_keys.OPTIMIZERS.items():
        given = {} if name == "adamw" else {"required": ["type"]}  # AdamW is the default, so its type may be left out
        test = {"properties": {"type": {"pattern": f"^{_any_case(name)}$"}}, **given}
        more = {
            key: {**limits.get(key, {}), **({"description": _DOCS[key]} if key in _DOCS else {})} for key in arguments
        }
        params = _arguments(arguments, f"an argument of {name}", more=more)
        conditions.append({"$comment": f"optimizer {name}", "if": test, "then": {"properties": {"params": params}}})
    return conditions


def _schedulers() -> list[Schema]:
    conditions = []
    for name, arguments in deepspeed_keys.SCHEDULERS.items():
        needed = deepspeed_keys.SCHEDULER_REQUIRED.get(name, ())
        params = _arguments(arguments, f"an argument of {name}", needed)
        then = {"properties": {"params": params}, **({"required": ["params"]} if needed else {})}
        test = {"properties": {"type": {"const": name}}, "required": ["type"]}
        conditions.append({"$comment": f"scheduler {name}", "if": test, "then": then})
    return conditions


def _tasks(tasks: Mapping[str, type]) -> list[Schema]:
    (default,) = (field.default for field in dataclasses.fields(TrainerOptions) if field.name == "task")
    conditions = []
    for name, options in tasks.items():
        given = {} if name == default else {"required": ["task"]}  # the default's name may be left out
        inner = block(options, text={"minLength": 1})  # an empty text is refused for every option
        then = {
            "properties": {"task_options": inner},
            **({"required": ["task_options"]} if "required" in inner else {}),
        }
        test = {"properties": {"task": {"const": name}}, **given}
        conditions.append({"$comment": f"task {name}", "if": test, "then": then})
    return conditions
