"""`init`: writes a config to start from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..config import ready
from ..config.schema import near, read_json
from ..errors import UserError
from ..tasks.first_look import BUILT_IN
from .keys import all_keys

# Task -> its ready config, where that has another name.
_OF_TASK = {"digits": "strong"}
# Written beside a config outside of this checkout: a path into an installation would be right on one machine only.
_SCHEMA = "trainer-schema.json"


def start(name: str | None, file: str | None, program: str) -> int:
    """Copies a ready config to a new file, and says what to do next.

    Args:
        name: a task, or the name of a ready config. None is an error that lists them.
        file: where it goes; None for <name>.json in this folder.
        program: how the user calls this program, for hints.

    Raises:
        UserError: there is no such config, or the file exists.
    """
    others = [Path(other).stem for other in ready.names() if Path(other).stem not in BUILT_IN]
    there = f"The tasks are {', '.join(BUILT_IN)}. There are also the configs {', '.join(others)}."
    if name is None:
        raise UserError(f"Name a task: `{program} init tabular`, for example.\n{there}")
    stem = name.removesuffix(".json")
    source = ready.folder() / f"{_OF_TASK.get(stem, stem)}.json"
    if source.name not in ready.names():
        hint = near(stem, [*BUILT_IN, *others])
        raise UserError(f'There is no task "{name}". {hint if hint.startswith("Did") else ""}\n{there}')
    target = Path(file or f"{stem}.json")
    place = _schema_for(target)
    _write(target, source.read_text(encoding="utf-8").replace(f'"./{ready.SCHEMA}"', f'"{place}"', 1))
    trainer = read_json(target)["trainer"]
    change = _change(trainer)
    print(f"Wrote {target}.{change} `{program} keys {trainer['task']}` explains the task's options.")
    print(f"Then `{program} plan --ds_config {target}` shows what would run,")
    print(f"and `{program} train --ds_config {target}` runs it.")
    return 0


def _change(trainer: dict[str, Any]) -> str:
    """What to change in a config before its first run; an empty text if its data comes with the task."""
    data = trainer["task_options"].get("data")
    own = f"task {trainer['task']}"
    if not isinstance(data, str) or any(
        key.name == "trainer.task_options.data" and key.only == own and key.schema.get("default") == data
        for key in all_keys()
    ):
        return ""
    return f' Set "data" in it to yours (it is "{data}").'


def _schema_for(target: Path) -> str:
    """How a config names its schema. Outside of a checkout, the schema is written beside the config."""
    schema, root = ready.folder() / ready.SCHEMA, ready.folder().parent
    if (root / ".git").exists() and target.resolve().is_relative_to(root):
        path = os.path.relpath(schema, target.resolve().parent)
        return path if path.startswith(".") else f"./{path}"
    if not target.parent.is_dir():
        raise UserError(f"{target} cannot be written: there is no folder {target.parent}.")
    text, beside = schema.read_text(encoding="utf-8"), target.with_name(_SCHEMA)
    if not target.exists() and not beside.exists():
        _write(beside, text)
    return f"./{_SCHEMA}"


def _write(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} exists, and is not overwritten. Name another file after the task.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
