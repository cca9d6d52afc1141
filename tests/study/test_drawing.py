"""How figures are drawn: styles of arms, marks that lie apart, views and medians."""

from __future__ import annotations

import math

import pytest

from trainer.study import drawing
from trainer.study.arms import CONTROLS, NAMES, SEQUENTIALS
from trainer.study.drawing import Curve, Level, Point

NAN = math.nan


def test_every_arm_is_drawn_alike_everywhere_and_unlike_all_others() -> None:
    assert set(drawing.ARMS) == {*NAMES, *SEQUENTIALS, *CONTROLS}
    styles = drawing.styles_of([(arm, "") for arm in drawing.ARMS])
    assert len({(s.colour, s.mark, s.filled) for s in styles}) == len({s.label for s in styles}) == 16
    assert len({(s.colour, s.dashes) for s in styles}) == 16
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


# What is in view


def test_the_view_holds_every_mark_its_interval_and_the_levels() -> None:
    low, high = drawing.view_of([Point(2, 0.9, 0.8, 0.95), Point(4, 0.85)], [Level(0.97, "sequential", 0.96, 0.99)])
    assert 0.75 < low < 0.8
    assert 0.99 < high < 1.02
    assert drawing.view_of([], []) == (0.0, 1.0)
    low, high = drawing.view_of([Point(2, 0.5)], [])
    assert low < 0.5 < high


def test_what_is_not_finite_or_far_off_is_left_out_of_the_view() -> None:
    low, high = drawing.view_of([Point(2, 0.5), Point(4, 0.6), Point(8, 1e9), Point(16, NAN, 0.0, 99.0)], [])
    assert 0.45 < low < 0.5 < 0.6 < high < 0.65


def test_losses_over_a_wide_range_are_shown_by_their_logarithm() -> None:
    def view(*values: float) -> tuple[float, float, bool]:
        return drawing.curve_view([drawing.across_seeds([Curve(list(range(len(values))), values)])])

    assert view(2.0, 0.5)[2] is False
    low, high, logarithmic = view(2.0, 0.02)
    assert logarithmic and 0 < low < 0.02 and high > 2.0
    assert view(2.0, -0.02)[2] is False, "a loss below 0 has no logarithm"
    assert view(2.0, 1.9, 1.8, 1e9)[1] < 3, "a run that explodes leaves the view"
    assert drawing.curve_view([]) == (0.0, 1.0, False)


def test_a_logarithmic_axis_leaves_out_what_it_cannot_show() -> None:
    low, high = drawing.log_view([-3.0, 0.0, NAN, 50.0, 90.0, 1e12])
    assert (low, high) == pytest.approx((50 / 1.4, 90 * 1.4))
    low, high = drawing.log_view([])
    assert 0 < low < 1 < high


def test_few_ticks_are_kept_and_many_thinned_between_the_ends() -> None:
    assert drawing.sparse([1, 2, 4], 3) == [1, 2, 4]
    thinned = drawing.sparse(list(range(100)), 5)
    assert len(thinned) == 5
    assert (thinned[0], thinned[-1]) == (0, 99)


def test_a_long_curve_is_drawn_with_few_points() -> None:
    line = drawing.across_seeds([Curve(list(range(5000)), [1.0] * 5000)])
    assert len(line.x) == 300
    assert (line.x[0], line.x[-1]) == (0, 4999)


def test_a_prediction_is_dashed_and_an_open_mark_is_white() -> None:
    (linear, warmup) = drawing.styles_of([("weak_linear", ""), ("weak_linear_warmup", "")])
    assert drawing.look_of(linear)["linestyle"] == "solid"
    assert drawing.look_of(linear, dashed=True)["linestyle"] != "solid"
    assert drawing.look_of(linear)["markerfacecolor"] == linear.colour
    assert drawing.look_of(warmup)["markerfacecolor"] == "white"
