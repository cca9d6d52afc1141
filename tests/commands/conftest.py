"""Fixtures of the tests of commands/."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def usual_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` and `doctor` let short runs look for packs, for the rest of their process. Here it goes on."""
    from trainer.exact.packs import packs

    monkeypatch.setattr(packs, "FEWEST_STEPS", packs.FEWEST_STEPS)
