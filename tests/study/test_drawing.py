"""How figures are drawn: styles of arms, marks that lie apart, views and medians."""

from __future__ import annotations

import math

import pytest

from trainer.study import drawing
from trainer.study.arms import NAMES, SEQUENTIAL_TUNED
from trainer.study.drawing import Curve

NAN = math.nan


def test_every_arm_is_drawn_alike_everywhere_and_unlike_all_others() -> None:
    assert set(drawing.ARMS) == {*NAMES, SEQUENTIAL_TUNED}
    styles = drawing.styles_of([(arm, "") for arm in drawing.ARMS])
    assert len({(s.colour, s.mark, s.filled) for s in styles}) == len({s.label for s in styles}) == 12
    assert len({(s.colour, s.dashes) for s in styles}) == 12
    assert drawing.styles_of([("anything", "weak_lars")])[0]._replace(label="weak, LARS") in styles
    others = drawing.styles_of([(f"other {i}", "") for i in range(14)])
    assert len({(s.colour, s.mark, s.filled) for s in others}) == 14


def test_arms_lie_apart_and_near_their_w() -> None:
    for count, sizes in ((1, [2, 4, 8]), (2, [2, 4]), (12, [8]), (12, [2, 32])):
        shifts = drawing.shifts(count, sizes)
        assert len(set(shifts)) == count
        assert max(shifts) / min(shifts) < 2**0.6
        assert math.prod(shifts) == pytest.approx(1)
    assert max(drawing.shifts(12, [30, 31, 32])) < (31 / 30) ** 0.5


def test_the_median_over_seeds() -> None:
    """Grids differ, and a run that broke off is infinite: two of three, and so is the median."""
    line = drawing.across_seeds(
        [Curve([0, 2, 4], [0, 2, 4]), Curve([0, 2, 4], [10, NAN, 1]), Curve([0, 4], [8, 8], broken=True), Curve([], [])]
    )
    assert line.x.tolist() == [0, 2, 4]
    assert line.middle.tolist() == [8, 8, 8]
    assert line.low.tolist() == [0, 2, 4]
    assert line.high.tolist() == [10, math.inf, math.inf]
    assert line.ends == [(0, 10), (4, 8)]
    line = drawing.across_seeds([Curve([0, 1, 2], [1, 2, 3]), Curve([0, 1], [1, NAN]), Curve([0, 1], [1, math.inf])])
    assert line.middle.tolist() == [1, math.inf, math.inf]
    # one that is only shorter has no part in the rest
    assert drawing.across_seeds([Curve([0, 4], [1, 1]), Curve([0, 2], [3, 3])]).middle.tolist() == [2, 2, 1]
