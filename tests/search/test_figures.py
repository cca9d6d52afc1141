"""What the figures of a search show: the value of each trial, and a range in which the good trials can be read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trainer.search.figures import _view, curves, history, importance, last_value, slices
from trainer.search.space import Parameter
from trainer.study.drawing import empty_figure


def trial(number: int, state: str, value: float | None, *accuracies: float, lr: float = 0.1) -> dict[str, Any]:
    epochs = list(range(1, len(accuracies) + 1))
    curve = {"accuracy": {"epoch": epochs, "value": list(accuracies)}}
    return {"number": number, "state": state, "value": value, "metrics": {}, "curves": curve, "point": {"lr": lr}}


TRIALS = [
    trial(0, "complete", 0.8, 0.5, 0.8),
    trial(1, "pruned", None, 0.3, lr=0.01),
    trial(2, "failed", None, 0.6, lr=1.0),
    trial(3, "complete", 0.9, 0.7, 0.9, lr=0.2),
]


def lines(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """The x and y of each line, by its name in the legend."""
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_the_value_of_a_trial_that_was_ended_early_is_its_last_one_and_a_failed_one_has_none() -> None:
    values = [last_value(t, "accuracy") for t in TRIALS]
    assert values[:2] == [0.8, 0.3]
    assert math.isnan(values[2]), "the accuracy before a failure says nothing"
    assert math.isnan(last_value({"value": None, "state": "failed", "curves": None}, "accuracy"))


@pytest.mark.parametrize(("mode", "best"), [("max", [0.8, 0.9, 0.9]), ("min", [0.8, 0.8, 0.8])])
def test_the_history_has_a_mark_for_each_trial_and_the_best_so_far(mode: str, best: list[float]) -> None:
    (axes,) = history(TRIALS, "accuracy", mode).axes
    found = lines(axes)
    assert found["finished"] == ([1, 4], [0.8, 0.9])
    assert found["ended early, last value"] == ([2], [0.3])
    assert found["the best"] == (([4], [0.9]) if mode == "max" else ([1], [0.8]))
    assert found["best so far"] == ([1, 4, 4], best)
    assert "failed" in {text.get_text() for legend in axes.figure.legends for text in legend.get_texts()}


def test_curves_leave_out_what_is_not_finite() -> None:
    (axes,) = curves([*TRIALS, trial(4, "failed", None, math.nan)], "accuracy", "max").axes
    assert lines(axes)["the best"] == ([1, 2], [0.7, 0.9])
    assert len(axes.get_lines()) == 4


def test_a_slice_of_a_list_has_a_place_for_each_of_its_values() -> None:
    """Marks of one value stand beside one another, at most 0.18 from its place, so none is hidden."""
    parameters = [
        Parameter("lr", "lr", choices=(0.01, 0.1, 0.2, 1.0)),
        Parameter("lr", "lr", low=0.01, high=1.0, log=True),
    ]
    first, second = slices(parameters, TRIALS, "accuracy", "max").axes
    assert [text.get_text() for text in first.get_xticklabels()] == ["0.01", "0.1", "0.2", "1"]
    assert lines(first)["finished"][0] == pytest.approx([1, 2], abs=0.18)
    assert second.get_xscale() == "log"
    assert lines(second)["finished"][0] == [0.1, 0.2]


def test_importance_begins_with_the_least() -> None:
    """Matplotlib draws bars from below, so the most important key is on top."""
    (axes,) = importance({"lr": 0.7, "width": 0.1, "batch": 0.2}).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["width", "batch", "lr"]


@pytest.mark.parametrize(
    ("mode", "values", "low", "high"),
    [
        ("min", [0.1, 0.2, 0.3, 1000.0], 0.1, 4.1),  # 20 times from the best to the middle one, 0.3
        ("max", [-1000.0, 0.7, 0.8, 0.9], -1.1, 0.9),
        ("min", [0.1, 0.2, 0.3, math.nan], 0.1, 0.3),
    ],
)
def test_a_trial_that_is_far_worse_does_not_squeeze_the_others(
    mode: str, values: list[float], low: float, high: float
) -> None:
    _, (axes,) = empty_figure("any", "loss")
    _view(axes, values, mode)
    room = 0.06 * (high - low)
    assert axes.get_ylim() == pytest.approx((low - room, high + room))
