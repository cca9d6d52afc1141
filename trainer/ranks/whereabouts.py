"""Where a rank's own thread is: for messages about a rank that keeps the others waiting."""

from __future__ import annotations

import contextlib
import gc
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_OF_OTHERS = ("site-packages", "dist-packages")
_LIBRARY = sysconfig.get_paths()["stdlib"]
# No other thread runs for up to this long while frames are read. Reading takes some microseconds.
_ALONE_S = 0.1


def whereabouts() -> str:
    """The innermost function of the main thread that is not a library's: "splits() (/home/me/my_task.py, line 12)"."""
    frames: list[tuple[str, str, int]] = []
    with _nothing_else_runs():
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            frames.append((frame.f_code.co_name, frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
    own = [found for found in frames if _is_own(found[1])]
    if not frames:
        return ""
    name, file, line = (own or frames)[0]
    return f"{name}() ({file}, line {line})"


def _is_own(file: str) -> bool:
    return not file.startswith(("<", _LIBRARY)) and not any(part in _OF_OTHERS for part in Path(file).parts)


@contextlib.contextmanager
def _nothing_else_runs() -> Iterator[None]:
    """Keeps Python from switching threads. CPython 3.11.7 crashed when the thread of a frame ran on meanwhile."""
    interval_s, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(_ALONE_S)
    time.sleep(interval_s)  # a thread that waits already still uses the old interval
    gc.disable()  # a collection may run finalizers in the middle, and they may wait
    try:
        yield
    finally:
        if collects:
            gc.enable()
        sys.setswitchinterval(interval_s)
