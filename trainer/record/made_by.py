"""Which code made a result, and the command that makes it again."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Commit(NamedTuple):
    """The git commit of the trainer's code, and whether files of it differ from the commit."""

    sha: str
    changed: bool

    def __str__(self) -> str:
        return self.sha + (", with changes that are not committed" if self.changed else "")


@functools.cache
def commit() -> Commit | None:
    """The commit of this code; None if it is no git checkout, or git cannot tell.

    The first call decides, so a run asks when it begins: the checkout may change before it ends.
    """
    package = Path(__file__).resolve().parents[1]
    if not (package.parent / ".git").exists():
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(package.parent), "status", "--porcelain=v2", "--branch", "--", package.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"^# branch\.oid ([0-9a-f]{40,64})$", done.stdout, re.MULTILINE)
    changed = any(not line.startswith("#") for line in done.stdout.splitlines())
    return Commit(found[1], changed) if found else None


# Flags that the command leaves out: the launcher's, and those with which a second run would continue in the folder of
# the first one. Flag -> whether it has a value.
_OF_ONE_RUN = {"--local_rank": True, "--resume": True, "--output_dir": True, "--allow_changed_config": False}


def command(arguments: Sequence[str], world_size: int) -> str:
    """The command line that makes a run again, in a new folder and without secrets.

    Args:
        arguments: sys.argv of a rank.
        world_size: the ranks to start.
    """
    program, *rest = arguments
    if Path(program).name == "main.py":
        # Started with -m, the program has a full path, which holds only on this machine.
        words = ["-m", "trainer.main"] if Path(program).is_absolute() else [program]
        words = ["python", *words]
        if world_size > 1:
            words = ["deepspeed", "--num_gpus", str(world_size), *(["--module"] if words[1] == "-m" else []), words[-1]]
    elif "ipykernel" in program:
        return "# trained in a notebook by trainer.train()"
    elif Path(program).name == "__main__.py":
        words = ["python", "-m", "trainer"]
    else:  # the installed program, or a script that calls trainer.train()
        words = ["python", program] if program.endswith(".py") else [Path(program).name]
    skip = False
    for word in rest:
        name, _, value = word.partition("=")
        if skip:
            skip = False
        elif name in _OF_ONE_RUN:
            skip = _OF_ONE_RUN[name] and not value
        else:
            words.append(_without_secret(word))
    return shlex.join(words)


_SECRET = re.compile(r"(^|[_.-])(token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)
_MASK = "..."


def without_secrets(value: Any) -> Any:
    """A JSON value in which what seems to be a password or a key is replaced by three dots."""
    if isinstance(value, Mapping):
        return {k: _MASK if _SECRET.search(str(k)) and v is not None else without_secrets(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(inner) for inner in value]
    # A name and a password in an address.
    return re.sub(r"(?<=://)[^/@\s]+@", f"{_MASK}@", value) if isinstance(value, str) else value


def without_secrets_in(arguments: Sequence[str]) -> str:
    """A command line as it was given, secrets replaced by three dots."""
    return shlex.join(_without_secret(word) for word in arguments)


def _without_secret(word: str) -> str:
    """A word of a command line without secrets. The word may be key=value, with a value in JSON."""
    key, equals, text = word.partition("=")
    if equals and _SECRET.search(key):
        return f"{key}={_MASK}"
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, (dict, list)):
        masked = without_secrets(value)
        return word if masked == value else f"{key}={json.dumps(masked)}"
    return str(without_secrets(word))
