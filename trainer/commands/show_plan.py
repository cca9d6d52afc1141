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
    elif scaling == "weak":
        lines.insert(0, f"weak scaling, micro-batches of {micro} samples: every row is another model\n")
    return "\n".join(lines)
