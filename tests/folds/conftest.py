"""A whole cross-validation, which the tests of several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.folds.small import STRONG, overrides
from trainer.folds.runner import cross_validate


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished cross-validation. It is made once, so a test that changes it restores it."""
    folder = tmp_path_factory.mktemp("folds") / "cv"
    assert cross_validate(STRONG, overrides(folder)) == 0
    return folder
