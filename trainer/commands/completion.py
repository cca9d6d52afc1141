"""Completion in bash, zsh and fish, by argcomplete: `completion SHELL` prints what the shell runs when it starts.

At each Tab the shell starts this program. It answers before anything heavy is imported.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..config import ready
from ..errors import UserError
from ..tasks.first_look import BUILT_IN
from .keys import Key, all_keys


def script(program: str, shell: str) -> str:
    """The text that makes a shell complete this program."""
    return str(_argcomplete().shellcode([program], shell=shell)).strip()


def _argcomplete() -> Any:
    try:
        import argcomplete
    except ImportError as error:
        raise UserError("Completion needs the package argcomplete: pip install argcomplete") from error
    return argcomplete


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers a shell that asks how a command line could continue, and ends the process."""
    _argcomplete()
    from argcomplete.completers import DirectoriesCompleter, FilesCompleter

    files, folders = FilesCompleter(), DirectoriesCompleter()

    def configs(prefix: str, **_: Any) -> list[str]:
        return [*FilesCompleter(("json",))(prefix), *ready.names()]

    def tasks(prefix: str, **_: Any) -> list[str]:
        return [*BUILT_IN, *FilesCompleter(("py",))(prefix)]

    completers = {
        "ds_config": configs, "config": configs, "task": tasks, "set": settings, "pattern": names_of_keys,
        "model": folders, "folder": folders, "output_dir": folders, "input": files, "output": files, "file": files,
    }  # fmt: skip
    for one in (parser, *_subparsers(parser)):
        for action in one._actions:
            if action.dest in completers:
                action.completer = completers[action.dest]  # type: ignore[attr-defined]
    _argcomplete().autocomplete(parser, always_complete_options=False)


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [inner for action in actions for inner in action.choices.values()]


def settings(prefix: str, **_: Any) -> list[str]:
    """For --set: every key with "=", and after the "=" the values of a key that has a choice of them."""
    key, equals, _value = prefix.partition("=")
    known = [one for one in all_keys() if not one.block and one.only != "refused"]
    if not equals:
        return list(dict.fromkeys(f"{one.name}=" for one in known))
    return [f"{key}={value}" for one in known if one.name == key for value in _choices(one)]


def _choices(key: Key) -> list[str]:
    if key.schema.get("type") == "boolean":
        return ["true", "false"]
    return [choice if isinstance(choice, str) else str(choice) for choice in key.schema.get("enum", ())]


def names_of_keys(prefix: str, **_: Any) -> list[str]:
    """For `keys`: blocks, keys and tasks."""
    return list(dict.fromkeys([*(one.name for one in all_keys()), *BUILT_IN]))
