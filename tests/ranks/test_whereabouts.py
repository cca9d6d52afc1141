"""Where a rank's own thread is, as its heartbeat asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from trainer.ranks.whereabouts import whereabouts


def in_a_lock(event: threading.Event) -> None:
    event.wait(10)


def in_python(event: threading.Event) -> None:
    while not event.is_set():
        pass


def in_c_code(event: threading.Event) -> None:
    time.sleep(0.3)


def called_by_a_library(event: threading.Event) -> None:
    np.apply_along_axis(lambda row: row + event.wait(10), 0, np.zeros(1))


@pytest.mark.parametrize("hang", [in_a_lock, in_python, in_c_code, called_by_a_library])
def test_the_function_is_named_that_is_no_librarys(hang: Callable[[threading.Event], None]) -> None:
    found: list[str] = []
    event = threading.Event()

    def ask() -> None:
        time.sleep(0.1)
        found.append(whereabouts())
        event.set()

    thread = threading.Thread(target=ask)
    thread.start()
    hang(event)
    thread.join()
    name = "<lambda>" if hang is called_by_a_library else hang.__name__
    assert found[0].startswith(f"{name}() ({__file__}, line ")
