"""Learning-rate scaling rules and schedules, as pure functions of the step. AdaScale, which has a state, is elsewhere.

The learning rate of a step is `optimizer.params.lr` times `factor(...)`; DeepSpeed's engine steps the
schedule. Nothing here depends on the world size except through the global batch, so under strong
scaling the schedule is one and the same at every W.
"""

from __future__ import annotations

import math


def scaling_factor(rule: str, global_batch_size: int, base_global_batch_size: int) -> float:
    """What a scaling rule multiplies the learning rate by.

    Args:
        rule: "none" (1), "linear" (k; Goyal et al. 2017, arXiv 1706.02677, section 2.1) or
            "sqrt" (sqrt(k); Krizhevsky 2014, arXiv 1404.5997; Hoffer et al. 2017, arXiv 1705.08741).
        global_batch_size: samples a step of this run.
        base_global_batch_size: samples a step for which the learning rate was chosen; k is their ratio.
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

    During warm-up it rises by a constant amount a step: from 1 at step 0 to `scale` at step `warmup_steps`
    (gradual warm-up, Goyal et al. 2017, section 2.2). Without anything to climb (scale <= 1) the ramp is
    the usual one from zero, `scale * (step + 1) / warmup_steps`, so that no step is wasted. After it,
    `schedule` runs over the steps that are left, from `scale` down to `final_fraction` of it.

    Args:
        step: optimizer step, from 0; with `adascale_steps` the scale-invariant steps made so far.
        scale: what the scaling rule gives.
        warmup_steps: steps of the ramp; 0 for none.
        total_steps: steps of the whole run.
        schedule: "constant", "linear" or "cosine" (Loshchilov and Hutter 2017, arXiv 1608.03983, one cycle).
        final_fraction: where linear and cosine end, as a fraction of the highest rate.
    """
    if step < warmup_steps:
        if scale > 1.0:
            return 1.0 + (scale - 1.0) * step / warmup_steps
        return scale * min(step + 1, warmup_steps) / warmup_steps  # a whole step never meets the bound
    if schedule == "constant":
        return scale
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    progress = min(1.0, progress)
    remaining = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return scale * (final_fraction + (1.0 - final_fraction) * remaining)
