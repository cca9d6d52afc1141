"""`keys`: what the keys of a config mean. It reads the schema for editors, so no task has to be imported."""

from __future__ import annotations

import difflib
import json
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..config import ready
from ..config.reference import words
from ..config.schema import read_json
from ..errors import UserError


class Key(NamedTuple):
    """A key of a config file.

    Attributes:
        name: dotted.
        only: the task, optimizer or scheduler that alone knows it, such as "task digits"; else an empty text.
        schema: of its value.
        required: whether it must be given.
        block: whether it holds keys of its own.
    """

    name: str
    only: str
    schema: dict[str, Any]
    required: bool = False
    block: bool = False

    @property
    def parent(self) -> str:
        """The dotted key of its block; an empty text at the top level."""
        return self.name.rpartition(".")[0]


_REFUSED = "refused"


def all_keys() -> list[Key]:
    """Every key, in the order of the schema. DeepSpeed's keys that are refused come last."""
    schema = read_json(ready.folder() / ready.SCHEMA)
    refused = [Key(name.strip("^$"), _REFUSED, inner) for name, inner in schema["patternProperties"].items()]
    return [*_walk(schema, "", ""), *refused]


def _walk(node: dict[str, Any], path: str, only: str) -> Iterator[Key]:
    conditions = [(str(part["$comment"]), part["then"]) for part in node.get("allOf", ()) if "then" in part]
    for name, inner in node.get("properties", {}).items():
        # Limits of an argument that only some optimizers have: its description comes with these optimizers, below.
        if "description" in inner or "properties" in inner:
            block = bool(inner.get("properties"))
            if "description" in inner:
                yield Key(path + name, only, inner, name in node.get("required", ()), block)
            yield from _walk(inner, f"{path}{name}.", only)
        for which, then in conditions:
            if name in then["properties"]:
                yield from _walk({"properties": {name: then["properties"][name]}}, path, which)


def keys(pattern: str | None, program: str) -> int:
    """Prints the keys that a pattern names; without a pattern, the groups of keys.

    Args:
        pattern: a key, a block, a task, or a part of a name or of a meaning.
        program: how the user calls this program, for hints.

    Raises:
        UserError: no key fits the pattern.
    """
    known = all_keys()
    if pattern is None:
        print(_groups(known))
        print(
            f"\n{program} keys trainer.best shows a group; {program} keys warmup shows keys with warmup in their name."
        )
        return 0
    print("\n".join(_entries(found(pattern, known))))
    return 0


def found(pattern: str, known: list[Key]) -> list[Key]:
    """The keys that a pattern means: with this name, block or task; else with this text in their name or meaning."""
    text = pattern.strip().strip(".").lower()
    tests = (
        lambda key: f".{text}." in f".{key.name.lower()}." or key.only.lower().split()[-1:] == [text],
        lambda key: text in key.name.lower(),
        lambda key: text in key.schema.get("description", "").lower(),
    )
    for test in tests:
        matches = [key for key in known if test(key)]
        if matches and text:
            return sorted(matches, key=lambda key: not key.name.startswith("trainer."))  # ours first
    names = dict.fromkeys(part for key in known for part in (key.name, key.name.rpartition(".")[2]))
    close = difflib.get_close_matches(text, names, n=1)
    raise UserError(
        f'No key has "{pattern}" in its name or its meaning. '
        + (f'Did you mean "{close[0]}"?' if close else "Without a name, this command lists the groups of keys.")
    )


def _groups(known: list[Key]) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    meanings = {key.name: key.schema.get("description", "") for key in known if key.block}
    meanings |= {"": "DeepSpeed's keys", _REFUSED: "DeepSpeed's keys that have no effect here"}
    for key in known:
        if not key.block or key.schema.get("default", 0) is None:
            rows.setdefault((key.parent, key.only), []).append(key.name)
    lines = []
    for (parent, only), names in rows.items():
        name = _REFUSED if only == _REFUSED else parent or "(top level)"
        meaning = meanings.get(only if only == _REFUSED else parent, "") if only in ("", _REFUSED) else only
        lines.append(f"{name:<22}{len(names):>4} keys  {meaning}")
    return "\n".join(lines)


def _entries(chosen: list[Key]) -> Iterator[str]:
    """The texts of keys. A key that is alike for several optimizers is shown once."""
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    alike: dict[tuple[str, str, str], list[str]] = {}
    for key in chosen:
        if not key.block or key.schema.get("default", 0) is None:
            alike.setdefault((key.name, *_facts(key)), []).append(key.only)
    for (name, values, meaning), only in alike.items():
        where = "" if only == [""] else f" ({', '.join(only)})"
        yield f"{name}{where}"
        for text in filter(None, (values, meaning)):
            yield textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _facts(key: Key) -> tuple[str, str]:
    """The values and the default of a key, and its meaning."""
    meaning = key.schema.get("description", "")
    if key.only == _REFUSED:
        return "", meaning
    facts = [words(key.schema).replace("`", ""), "required" if key.required else ""]
    if "default" in key.schema:
        default = key.schema["default"]
        facts.append(f"default {'none' if default is None else json.dumps(default)}")
    return "; ".join(filter(None, facts)), meaning
