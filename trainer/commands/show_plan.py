"""`python -m trainer plan`: what each world size would do, computed without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..config.keys import Config
from ..errors import UserError
from ..exact.plan import nearest_possible, rank_block
from ..record import earlier
from ..record.console import table


class Work(NamedTuple):
    """The tokens of a step: of each of its micro-batches with padding, and of all together without padding."""

    micro_batches: list[int]
    tokens: int


def plan_table(config: Config, world_sizes: Sequence[int], work: Sequence[Work] = ()) -> str:
    """A table with a row for each world size: batch, micro-batches of a rank, accumulation, speed, possible or not.

    Args:
        config: of the run.
        world_sizes: the rows.
        work: for texts of different lengths: of each step of an epoch, see `text_work`.
    """
    keys = (config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps)
    rows: list[Sequence[str]] = []
    scaling = ""
    base = Path("runs") if config.trainer.output_dir is None else Path(config.trainer.output_dir).expanduser().parent
    measured = earlier.of_this_config(config.as_dict(), base)
    for world_size in world_sizes:
        try:
            plan = config.plan(world_size)
        except UserError:
            nearest = nearest_possible(world_size, *keys)
            if nearest is None:
                raise  # no world size works: the keys themselves are wrong, and the message says how
            rows.append((str(world_size), "-", "-", "-", "-", "-", f"no; nearest is {nearest}"))
            continue
        scaling = plan.scaling
        # The rank with the most micro-batches determines the step time. Communication only lowers the speed-up further.
        ideal = plan.micro_batches / plan.gradient_accumulation_steps
        if work and scaling == "strong":
            ideal = _most_speed_up(work, world_size)
        rows.append(
            (
                str(world_size),
                f"{plan.global_batch_size:,}",
                plan.per_rank(),
                str(plan.gradient_accumulation_steps),
                f"{ideal:.2f}",
                f"{measured[world_size].samples_per_s:,.0f}" if world_size in measured else "-",
                "yes",
            )
        )
    header: Sequence[str] = (
        "ranks",
        "global batch",
        "micro-batches per rank",
        "accumulation",
        "speed-up at most",
        "samples/s",
        "possible",
    )
    if not measured:
        header, rows = [*header[:-2], header[-1]], [[*row[:-2], row[-1]] for row in rows]
    lines = [table(rows, header)]
    micro = config.train_micro_batch_size_per_gpu
    if scaling == "strong":
        lines.insert(0, f"strong scaling, micro-batches of {micro} samples: every possible row gives the same model\n")
        if len(measured) > 1:
            first, *larger = sorted(measured)
            lines += ["", *(_compared(measured, first, W) for W in larger)]
        elif measured:
            lines.append("\nsamples/s is that of an earlier run here.")
        if work:
            lines.append(_padding(work))
        lines += _advice(config, world_sizes)
    elif scaling == "weak":
        lines.insert(0, f"weak scaling, micro-batches of {micro} samples: every row is another model\n")
    return "\n".join(lines)


def _compared(measured: dict[int, earlier.Earlier], first: int, W: int) -> str:
    found = measured[W]
    share = earlier.efficiency(W, found.samples_per_s, first, measured[first])
    text = earlier.compared(W, found.samples_per_s, first, measured[first])
    return f"{found.folder.name}, {W} ranks: {text}; efficiency {share:.2f}"


def _most_speed_up(work: Sequence[Work], world_size: int) -> float:
    """The largest possible speed-up: all tokens, divided by the tokens of the slowest rank of each step."""
    slowest = 0
    for step in work:
        blocks = (rank_block(len(step.micro_batches), world_size, r) for r in range(world_size))
        slowest += max(sum(step.micro_batches[block.start : block.stop]) for block in blocks)
    return sum(sum(step.micro_batches) for step in work) / slowest


def _padding(work: Sequence[Work]) -> str:
    computed, real = sum(sum(step.micro_batches) for step in work), sum(step.tokens for step in work)
    return (
        f"\n{1 - real / computed:.1%} of the computed tokens are padding (texts of about the same length share a "
        "micro-batch). The speed-up counts tokens: the rank with the most of them decides."
    )


# From this many samples on, larger micro-batches are rarely faster.
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
