"""Standard streams that are closed, as under some daemons and with `>&-`."""

from __future__ import annotations

import os
import sys


def open_streams() -> None:
    """Opens closed standard streams on /dev/null, for this process and those that it starts.

    Otherwise the next file that is opened gets the number of a stream. A C library that prints would then write into
    that file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
