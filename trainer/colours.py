"""Colours on a terminal, and plain text everywhere else."""

from __future__ import annotations

import os
import re
from typing import TextIO

_CODES = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1"}
_SIGNAL = re.compile(r"(note|error|WARNING):")
_OF_SIGNAL = {"note": "yellow", "error": "red", "WARNING": "red"}


def has_colours(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal with colours that the user has not switched off (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


def painted(text: str, colour: str, stream: TextIO | None) -> str:
    """A text in a colour (or "bold") if the stream has colours."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if has_colours(stream) else text


def signalled(line: str, stream: TextIO | None) -> str:
    """The line. If it is a note, a warning or an error, its first word is coloured."""
    found = _SIGNAL.match(line)
    return line if found is None else painted(found[0], _OF_SIGNAL[found[1]], stream) + line[found.end() :]
