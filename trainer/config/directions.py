"""Whether a low or a high value of a metric is better, where its name says so in every task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

_HIGH = (
    "accuracy", "auroc", "dice", "entity_f1", "entity_precision", "entity_recall", "f1", "macro_f1", "map", "mean_iou",
    "micro_f1", "r2",
)  # fmt: skip
_LOW = ("loss", "mae", "mse", "nll", "perplexity", "rmse")

DIRECTIONS: Mapping[str, Literal["min", "max"]] = {
    **dict.fromkeys(_HIGH, "max"),
    **dict.fromkeys(_LOW, "min"),
}
"""name -> "min" or "max"; names that are not here have no direction of their own."""
