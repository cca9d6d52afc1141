"""A whole search, which the tests of several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.search.small import write_own
from trainer.search.runner import search


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that has finished. It is made once, so a test that changes it restores it."""
    folder = tmp_path_factory.mktemp("whole")
    assert search(str(write_own(folder))) == 0
    return folder
