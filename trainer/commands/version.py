"""`--version`: the versions of the code and of its libraries. None of them is imported."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import __version__
from ..record.made_by import commit


def versions() -> str:
    """The versions in one line."""
    code = commit()
    words = [f"strong-scaling-trainer {__version__}"]
    if code is not None:
        words[0] += f" (commit {code._replace(sha=code.sha[:12])})"
    for package in ("torch", "deepspeed"):
        try:
            words.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            words.append(f"{package} is not installed")
    return ", ".join([*words, f"Python {platform.python_version()}"])


class Version(argparse.Action):
    """Prints the versions and ends. They are looked up only when they are asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:  # noqa: D102
        print(versions())
        parser.exit()
