"""The gradient noise scale: the batch size beyond which averaging more gradients gains little.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: the squared norm of a gradient is on average that of the
expected gradient G, plus noise that falls with the batch size. So gradients of two batch sizes tell the two apart. A
step has both: the gradient of each micro-batch, and their sum. All ranks have the same norms, and compute with them in
micro-batch order, in float64 on the host. So the result has the same bits at every world size.

An epoch draws its batches without replacement from N samples. The traces of micro-batches do not feel that, but |g|^2
of a batch falls short by tr / N, because nothing varies once all N are drawn. `NoiseScale` adds that again, so that G
is the gradient of the training set. Without it, a scale b would come out as b / (1 - b / N): 166 for 146 at N = 1,200.
AdaScale compares the squared norms of batches as they are drawn, and for that `estimate` is right as it is.

There are two assumptions. First, a sample's gradient does not depend on the other samples. Under BatchNorm it depends
on the micro-batch, so what is measured depends on the micro-batch size. Second, micro-batches are drawn at random. If
samples of about one length share a micro-batch (order.by_length), micro-batches differ by more than chance, and the
trace comes out too large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Noise:
    """One step's estimate of the noise in its gradient.

    Attributes:
        trace: tr(Sigma), the summed variance over all parameters of the gradient of one sample.
        gradient_squared: |G|^2, the squared norm of the expected gradient. The estimate is unbiased for samples drawn
            with replacement, so it can be negative.
    """

    trace: float
    gradient_squared: float


def estimate(norms: Sequence[float], counts: Sequence[float], norm: float, samples: int) -> Noise | None:
    """Unbiased estimates from one step; None if it has a single micro-batch, or numbers that are not finite.

    Let c_j be the counts of the micro-batches, C their sum, h_j the mean gradients of the micro-batches, and g that of
    the step. Then E|h_j|^2 = |G|^2 + tr / c_j and E|g|^2 = |G|^2 + tr / C, for any sizes. M micro-batches give
    tr = (sum_j c_j |h_j|^2 - C |g|^2) / (M - 1) and |G|^2 = |g|^2 - tr / C. For equal sizes this is the paper's
    equation A.2, with all M small batches instead of one.

    Args:
        norms: (M,) of the gradients as they are added, u_j = h_j c_j / C.
        counts: (M,) what the summed loss counts in each micro-batch: samples, or valid tokens. The trace is first that
            of one count. It is returned for one sample, which has C / samples counts on average. A micro-batch
            whose count is 0 is left out.
        norm: of g = sum_j u_j, before clipping.
        samples: of the step.
    """
    present = [(u, c) for u, c in zip(norms, counts, strict=True) if c > 0]
    if len(present) < 2 or not all(map(math.isfinite, [*norms, norm])):
        return None
    # fsum rounds once, at the end: the result does not depend on an order of adding.
    C = math.fsum(c for _, c in present)
    # u_j = h_j c_j / C, so c_j |h_j|^2 = |u_j|^2 C^2 / c_j.
    spread = math.fsum(u * u * (C / c) * C for u, c in present) - C * norm * norm
    trace = spread / (len(present) - 1)
    # The trace is that of one count. A sample averages over C / samples counts, which divides it by that number.
    return Noise(trace * (samples / C), norm * norm - trace / C)


def estimates(
    norms: Sequence[Sequence[float]], counts: Sequence[Sequence[float]], whole: Sequence[float], samples: Sequence[int]
) -> list[Noise | None]:
    """The estimates of several steps. Rows are as `estimate` takes them; rows of `norms` may be longer than M."""
    return [estimate(row[: len(c)], c, norm, n) for row, c, norm, n in zip(norms, counts, whole, samples)]


class NoiseScale:
    """Means of the estimates over steps, and their ratio, which is the noise scale.

    It is the ratio of the means, not the mean of ratios: |G|^2 of a single step is mostly noise, and often negative.

    Args:
        population: N, the training samples that an epoch draws without replacement; None for endless ones.

    Attributes:
        steps: the number of steps that gave an estimate.
    """

    def __init__(self, population: int | None = None) -> None:
        self.steps = 0
        self.population = population
        self._trace = self._gradient_squared = 0.0

    def add(self, noise: Noise | None) -> None:
        """Adds a step's estimate. Steps are added one by one, so that a resumed run adds in the same order."""
        if noise is not None:
            self.steps += 1
            self._trace += noise.trace
            self._gradient_squared += noise.gradient_squared

    def means(self) -> dict[str, float | None]:
        """The means, and "scale_samples", B_simple = tr(Sigma) / |G|^2; None if there is no (positive) estimate."""
        if not self.steps:
            return dict.fromkeys(("trace", "gradient_squared", "scale_samples"))
        squared = self._gradient_squared + (self._trace / self.population if self.population else 0.0)
        return {
            "trace": self._trace / self.steps,
            "gradient_squared": squared / self.steps,
            "scale_samples": self._trace / squared if squared > 0.0 else None,
        }

    def summary(self) -> dict[str, Any]:
        """For summary.json."""
        return self.means() | {"steps": self.steps}

    def state_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"steps": self.steps, "trace": self._trace, "gradient_squared": self._gradient_squared}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.steps, self._trace = int(values["steps"]), float(values["trace"])
        self._gradient_squared = float(values["gradient_squared"])

    def copy(self) -> NoiseScale:
        """A copy with the same numbers."""
        other = NoiseScale(self.population)
        other.load_state_dict(self.state_dict())
        return other
