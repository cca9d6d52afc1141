"""The end of a process that has made a run."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn


def end(code: int) -> NoReturn:
    """Ends the process without the interpreter's clean-up, once everything is written.

    The watching threads may be inside a store's C++ code, and the clean-up would then crash. DeepSpeed's own clean-up
    takes seconds.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream is not None:  # as after >&-
                stream.flush()
    os._exit(code)
