"""Ends a process that has made a run."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn


def end(code: int) -> NoReturn:
    """Ends the process without the interpreter's clean-up, once everything is written.

    The watching threads may be inside the C++ code of a store, and then the clean-up would crash. Besides, DeepSpeed's
    own clean-up takes seconds.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:  # it is None if the shell has closed it, as by >&-
                stream.flush()
    os._exit(code)
