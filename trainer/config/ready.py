"""The configs that come with the trainer: where they are, and how a bare name finds one."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError

# The schema of a config file, for editors. `commands.reference` writes it. It is no config, so it is in another folder.
SCHEMA = "editor/schema.json"


def folder() -> Path:
    """The folder of the ready configs: ds_configs/ of a checkout, or its copy in an installed package."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "ds_configs"
    return packaged if packaged.is_dir() else package.parent / "ds_configs"


def names() -> list[str]:
    """The file names of the ready configs."""
    return sorted(file.name for file in folder().glob("*.json"))


def find(given: str, tell: Callable[[str], object] = lambda sentence: None) -> Path:
    """The config file that a user means: the file itself, or, if there is none, the ready config of this bare name.

    Args:
        given: a path, or the bare name of a ready config, such as strong.json.
        tell: is called with a sentence that says where the file is, if it is a ready config.

    Raises:
        UserError: there is no such file, but a ready config has that name or one near to it.
    """
    path = Path(given)
    if path.exists():
        return path
    known = names()
    if path.name in known and path.parent == Path():
        own = folder() / path.name
        tell(f"{given} is not in this folder, so the trainer's own is used: {own}")
        return own
    # If there are other configs in the folder, `schema.read_json` lists these, which is the better hint.
    alone = not (path.parent.is_dir() and any(path.parent.glob("*.json")))
    stems = [Path(name).stem for name in known] if alone else []
    close = difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.7)
    if path.name in known or close:
        name = path.name if path.name in known else f"{close[0]}.json"
        raise UserError(f"The config file {path} does not exist. The trainer has a ready one: type {name}")
    return path
