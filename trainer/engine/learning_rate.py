"""Learning-rate scaling rules and schedules, as pure functions of the step. AdaScale has a state: see `adascale`.

The learning rate of a step is `optimizer.params.lr` times `factor(...)`. Nothing here depends on the world size
except through the global batch. So under strong scaling the schedule is the same at every W.
"""

from __future__ import annotations

import math


def scaling_factor(rule: str, global_batch_size: int, base_global_batch_size: int) -> float:
    """The factor by which a scaling rule multiplies the learning rate.

    Args:
        rule: "none" (1), "linear" (k; Goyal et al. 2017, arXiv 1706.02677, section 2.1) or
            "sqrt" (sqrt(k); Krizhevsky 2014, arXiv 1404.5997; Hoffer et al. 2017, arXiv 1705.08741).
        global_batch_size: samples a step of this run.
        base_global_batch_size: samples a step for which the learning rate was chosen. k is the ratio of the two.
    """
    ratio = global_batch_size / base_global_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


def factor(
    step: float,
    *,
    scale: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str,
    final_fraction: float,
) -> float:
    """The learning rate of `step` (from 0) as a multiple of `optimizer.params.lr`.

    During warm-up it rises by a constant amount a step, from 1 at step 0 to `scale` at step `warmup_steps`
    (gradual warm-up, Goyal et al. 2017, section 2.2). If scale <= 1, there is no rise from 1. The warm-up is then
    the usual one from zero, `scale * (step + 1) / warmup_steps`: its first step has a rate above 0 and is not wasted.
    After the warm-up, `schedule` runs over the remaining steps, from `scale` down to `final_fraction` of it.

    Args:
        step: optimizer step, from 0; with `adascale_steps` the number of scale-invariant steps so far.
        scale: the factor of the scaling rule.
        warmup_steps: steps of the warm-up; 0 for none.
        total_steps: steps of the whole run.
        schedule: "constant", "linear" or "cosine" (Loshchilov and Hutter 2017, arXiv 1608.03983, one cycle).
        final_fraction: the last rate of linear and cosine, as a fraction of the highest rate.
    """
    if step < warmup_steps:
        if scale > 1.0:
            return 1.0 + (scale - 1.0) * step / warmup_steps
        return scale * min(step + 1, warmup_steps) / warmup_steps  # min() is for AdaScale's fractional steps
    if schedule == "constant":
        return scale
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    progress = min(1.0, progress)
    remaining = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return scale * (final_fraction + (1.0 - final_fraction) * remaining)
