"""Whether a low or a high value of a metric is better, for names that mean the same in every task."""

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
"""Name of a metric -> "min" or "max". For other names, the task or the config has to say it."""
