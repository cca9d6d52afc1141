"""The gradient noise scale of the sequential runs, epoch by epoch, with its interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .inference import ratio_interval


@dataclass(frozen=True)
class Scale:
    """tr(Sigma) / |G|^2 in samples (McCandlish et al. 2018), from means over seeds, and its interval.

    inf where |G|^2 cannot be told from 0.
    """

    value: float
    low: float
    high: float


def whole_scale(runs: Sequence[Mapping[str, Any]], alpha: float) -> Scale | None:
    """The scale over whole runs, one a seed; None if it was not measured."""
    known = [run["gradient_noise"] for run in runs if run.get("gradient_noise")]
    known = [noise for noise in known if noise.get("trace") is not None]
    return _scale([noise["trace"] for noise in known], [noise["gradient_squared"] for noise in known], alpha)


def scales_by_epoch(runs: Sequence[Mapping[str, Any]], alpha: float) -> dict[int, Scale]:
    """Epoch, from 1 -> its scale. A logged window belongs to the epoch in which it ends."""
    pairs: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        traces, squares = (_means(run, f"noise/{name}") for name in ("trace", "gradient_squared"))
        for epoch in traces.keys() & squares.keys():
            pairs.setdefault(epoch, []).append((traces[epoch], squares[epoch]))
    scales = {e: _scale([t for t, _ in pairs[e]], [s for _, s in pairs[e]], alpha) for e in sorted(pairs)}
    return {epoch: scale for epoch, scale in scales.items() if scale is not None}


def _scale(traces: Sequence[float], squares: Sequence[float], alpha: float) -> Scale | None:
    if not traces:
        return None
    # The ratio of two means, and not the mean of ratios: |G|^2 of one seed may be close to 0.
    below = math.fsum(squares)
    return Scale(math.fsum(traces) / below if below > 0 else math.inf, *ratio_interval(traces, squares, alpha))


def _means(run: Mapping[str, Any], name: str) -> dict[int, float]:
    """Epoch -> mean of a logged curve."""
    found: dict[int, list[float]] = {}
    curve = run["curves"].get(name, {"epoch": [], "value": []})
    for epoch, value in zip(curve["epoch"], curve["value"]):
        # The tolerance is for rounding: a window that ends with an epoch belongs to it.
        found.setdefault(math.ceil(epoch - 1e-9), []).append(value)
    return {epoch: math.fsum(values) / len(values) for epoch, values in found.items()}
