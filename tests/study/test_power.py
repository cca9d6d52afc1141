"""The power of a design, by hand. That verdicts are found as often as it says is in test_levels.py."""

from __future__ import annotations

import pytest

from trainer.study.power import paired, power, seeds_for

LEVEL, MARGIN = 0.05 / 43, 0.01


def test_power_by_hand() -> None:
    """Twelve seeds and 43 comparisons: all twelve have to agree, and each does with Phi(1) = 0.841."""
    assert power(12, LEVEL, MARGIN, MARGIN) == pytest.approx(0.8413**12, rel=1e-3)
    assert power(9, LEVEL, MARGIN, MARGIN) == 0.0
    assert paired(MARGIN) == pytest.approx(0.01414, abs=1e-5)


def test_the_seeds_that_are_enough() -> None:
    needed = seeds_for(0.8, LEVEL, MARGIN, MARGIN)
    assert needed is not None
    assert power(needed, LEVEL, MARGIN, MARGIN) >= 0.8 > power(needed - 1, LEVEL, MARGIN, MARGIN)
    assert seeds_for(0.8, LEVEL, MARGIN, 20 * MARGIN) is None
