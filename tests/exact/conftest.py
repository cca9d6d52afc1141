"""Fixtures of the tests of exact/."""

from __future__ import annotations

import pytest


@pytest.fixture
def early_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs are used from the second step on."""
    from trainer.exact.packs import packs

    monkeypatch.setattr(packs, "TRIALS", 1)
