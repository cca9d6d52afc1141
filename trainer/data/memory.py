"""How much fits into this machine: a file of some kilobytes may unpack to more."""

from __future__ import annotations

import os


def machine_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
