"""Where a rank's own thread is, for messages about ranks for which others wait."""

from __future__ import annotations

import faulthandler
import os
import re
import struct
import sysconfig
import threading
from pathlib import Path

_OF_OTHERS = ("site-packages", "dist-packages")
_POINTER_BYTES = struct.calcsize("P")
_LIBRARY = sysconfig.get_paths()["stdlib"]
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


def whereabouts() -> str:
    """The innermost function of the main thread that is no library's: "splits() (/home/me/my_task.py, line 12)"."""
    frames = [(found["name"], found["file"], found["line"]) for found in map(_FRAME.match, _stack()) if found]
    own = [frame for frame in frames if _is_own(frame[1])]
    if not frames:
        return ""
    name, file, line = (own or frames)[0]
    return f"{name}() ({file}, line {line})"


def _is_own(file: str) -> bool:
    return not file.startswith(("<", _LIBRARY)) and not any(part in _OF_OTHERS for part in Path(file).parts)


def _stack() -> list[str]:
    """The main thread's stack in lines, the innermost function first.

    faulthandler writes it while no other thread can run. Frames of `sys._current_frames` are read while their thread
    goes on: CPython 3.11.7 has crashed on that.
    """
    with os.fdopen(os.memfd_create("stack"), "w+b") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        text = file.read().decode(errors="replace")
    main = f"0x{threading.main_thread().ident or 0:0{2 * _POINTER_BYTES}x}"
    for thread in text.split("\n\n"):
        title, *lines = thread.splitlines()
        if main in title:
            return lines
    return []
