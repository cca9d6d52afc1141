"""The memory of this machine. A file of some kilobytes may unpack to more than that."""

from __future__ import annotations

import os


def machine_bytes() -> int:
    """The memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
