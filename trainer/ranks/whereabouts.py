"""Where a rank's own thread is, for messages about ranks for which others wait."""

from __future__ import annotations

import sys
import sysconfig
import threading
from pathlib import Path

_OF_OTHERS = ("site-packages", "dist-packages")
_LIBRARY = sysconfig.get_paths()["stdlib"]


def whereabouts() -> str:
    """The innermost function of the main thread that is no library's: "splits() (/home/me/my_task.py, line 12)"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = frame
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(("<", _LIBRARY)) and not any(part in _OF_OTHERS for part in Path(file).parts):
            break
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return ""
    return f"{frame.f_code.co_name}() ({frame.f_code.co_filename}, line {frame.f_lineno})"
