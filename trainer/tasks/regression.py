"""What tasks that predict a number share: its standardisation, and metrics in its units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..data import preparation
from ..data.preparation import Numeric
from ..errors import UserError


def standard(column: str, values: np.ndarray) -> Numeric:
    """The mean and deviation of a target (n,) float64 of the training split. Raises UserError if all are alike."""
    mean, deviation = preparation.mean_and_deviation(values)
    if not deviation:
        named = f'All values of "{column}", the column to predict,' if column else "All numbers to predict"
        raise UserError(f"{named} are {mean:g} in train: nothing can be learnt.")
    return Numeric(column, mean, deviation)


def in_units(standardised: Tensor, target: Numeric) -> np.ndarray:
    """(N,) float64 in the units of the target."""
    values: np.ndarray = standardised.double().numpy() * target.deviation + target.mean
    return values


def columns(outputs: Tensor, labels: Tensor, target: Numeric) -> dict[str, Sequence[Any]]:
    """Columns for the table of a fold's predictions: target and prediction, in units."""
    return {"target": in_units(labels, target).tolist(), "prediction": in_units(outputs, target).tolist()}


def metrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The coefficient of determination, the mean absolute error, and the root of the mean squared error.

    Args:
        predicted, truth: (N,) float64, in the units of the target.

    Returns:
        r2, mae and rmse; no r2 if all true values are alike, because it divides by their spread.
    """
    errors = predicted - truth
    squares = float((errors**2).sum())
    spread = float(((truth - truth.mean()) ** 2).sum())
    found = {"r2": 1.0 - squares / spread} if spread > 0 else {}
    return found | {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt(squares / len(truth)))}


def why_no_r2(name: str) -> str:
    """Why `metrics` gives no `r2`; an empty text for another name."""
    return "all its true values are alike, and r2 needs two different ones" if name == "r2" else ""
