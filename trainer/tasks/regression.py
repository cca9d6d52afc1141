"""What tasks that predict a number share: its metrics."""

from __future__ import annotations

import numpy as np


def metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The coefficient of determination, the mean absolute error, and the root of the mean squared error.

    Args:
        predicted, truth: (N,) float64, in the units of the target. Without two different true values there is no r2.
    """
    errors = predicted - truth
    squares = float((errors**2).sum())
    spread = float(((truth - truth.mean()) ** 2).sum())
    found = {"r2": 1.0 - squares / spread} if spread > 0 else {}
    return found | {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt(squares / len(truth)))}


def why_no_r2(name: str) -> str:
    """Why `metrics` gives no `r2`; an empty text for another name."""
    return "all its true values are alike, and r2 needs two different ones" if name == "r2" else ""
