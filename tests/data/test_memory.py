"""The memory of the machine, which bounds what is read from files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from trainer.data.memory import machine_bytes

MEMINFO = Path("/proc/meminfo")


def with_memory(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    real = os.sysconf
    pages = mib * 2**20 // real("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sysconf", lambda name: pages if name == "SC_PHYS_PAGES" else real(name))


@pytest.mark.skipif(not MEMINFO.is_file(), reason="no /proc/meminfo here")
def test_it_is_in_bytes_and_all_that_the_kernel_counts() -> None:
    found = re.search(r"MemTotal: +(\d+) kB", MEMINFO.read_text())
    assert found is not None
    assert machine_bytes() == pytest.approx(1024 * int(found[1]), rel=0.01)
