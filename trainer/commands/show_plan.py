"""`python -m trainer plan`: what each world size would do, computed without starting anything."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.keys import Config
from ..errors import UserError
from ..exact.plan import nearest_possible
from ..record.console import table


def plan_table(config: Config, world_sizes: Sequence[int]) -> str:
    """One row a world size: the batch, micro-batches a rank, accumulation, and whether it is possible."""
    keys = (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps)
    rows: list[Sequence[str]] = []
    scaling = ""
    for world_size in world_sizes:
        try:
            plan = config.plan(world_size)
        except UserError:
            nearest = nearest_possible(world_size, *keys)
            if nearest is None:
                raise  # no world size works: the keys themselves are wrong, and the message says how
            rows.append((str(world_size), "-", "-", "-", "-", f"no; nearest is {nearest}"))
            continue
        scaling = plan.scaling
        # The rank with the most micro-batches determines the step time. Communication can only lower the speed-up.
        ideal = plan.micro_batches / plan.gradient_accumulation_steps
        rows.append(
            (
                str(world_size),
                f"{plan.global_batch_size:,}",
                plan.per_rank(),
                str(plan.gradient_accumulation_steps),
                f"{ideal:.2f}",
                "yes",
            )
        )
    header = ("ranks", "global batch", "micro-batches per rank", "accumulation", "speed-up at most", "possible")
    lines = [table(rows, header)]
    micro = config.train_micro_batch_size_per_gpu
    if scaling == "strong":
        lines.insert(0, f"strong scaling, micro-batches of {micro} samples: every possible row gives the same model\n")
        lines += _advice(config, world_sizes)
    elif scaling == "weak":
        lines.insert(0, f"weak scaling, micro-batches of {micro} samples: every row is another model\n")
    return "\n".join(lines)


# Micro-batches of so many samples are rarely faster if they are larger still.
_LARGE = 32


def _advice(config: Config, world_sizes: Sequence[int]) -> list[str]:
    """What a larger micro-batch would gain, and what it limits."""
    try:
        plan = config.plan(1)
    except UserError:  # gradient_accumulation_steps is given, which leaves one world size
        return []
    m, M, B = plan.micro_batch_size, plan.micro_batches, plan.global_batch_size
    larger = [k * m for k in (2, 4, 8, 16, 32) if k * m <= _LARGE and B % (k * m) == 0]
    if not larger:
        return []
    allowed = ", ".join(f"{size} samples allow {B // size}" for size in larger)
    lines = [
        f"\n{M} micro-batches allow up to {M} ranks. Larger micro-batches are computed faster, but allow fewer ranks "
        f"and give another model: {allowed}."
    ]
    enough = [size for size in larger if B // size >= max(world_sizes)]
    if enough:
        most, size = max(world_sizes), enough[-1]
        lines.append(f"For {most} ranks, train_micro_batch_size_per_gpu={size} is small enough, and usually faster.")
    return lines
