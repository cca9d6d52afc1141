"""`python -m trainer verify`: runs a config at several world sizes and compares every step, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Config
from .console import say, table
from .distributed import Ranks
from .errors import RanksDifferError, TrainerError, UserError
from .workers import run_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from .engine import Engine


def run_traced(ranks: Ranks, config: Config, folder: str) -> dict[str, Any]:
    """One rank of one run; rank 0 writes a line of digests after every step."""
    from .guard import digest
    from .run import run

    trace_file = (Path(folder) / "trace.jsonl").open("w") if ranks.first else None

    def trace(step: int, engine: Engine, losses: Tensor) -> None:
        state = engine.state()
        if trace_file is not None:
            line = {"loss": digest(losses), **{name: digest(tensor) for name, tensor in state.items()}}
            trace_file.write(json.dumps(line) + "\n")

    summary = run(config, ranks, config_name="verify", started_at_s=time.time(), trace=trace)
    if trace_file is not None:
        trace_file.close()
    return summary


def first_difference(one: Path, other: Path) -> tuple[int, str] | None:
    """The first step, and in it the first tensor, whose digests differ between two trace files; None if none do.

    Tensors are compared in the order loss, parameters, buffers, optimizer state.
    """
    with one.open() as ours, other.open() as theirs:
        for step, (left, right) in enumerate(zip(ours, theirs, strict=True), start=1):
            if left == right:
                continue
            a, b = json.loads(left), json.loads(right)
            return step, next(name for name in [*a, *b] if a.get(name) != b.get(name))
    return None


def verify(config: Config, world_sizes: Sequence[int]) -> int:
    """Runs the config at each world size, compares with the first and prints a table.

    Every step's loss sums, parameters, buffers and optimizer state are compared, and within a run the
    ranks' parameters after every step.

    Returns:
        0 if everything is the same bit for bit, else 1.

    Raises:
        UserError: a world size is impossible, or the config is weak scaling; before anything starts.
    """
    plans = [config.plan(world_size) for world_size in world_sizes]
    if plans[0].scaling == "weak":
        raise UserError(
            "This config is weak scaling: its global batch, and so its model, changes with the number of ranks.\n"
            "Give train_batch_size for strong scaling, which is what verify compares."
        )
    trainer = dataclasses.replace(config.trainer, guard_every_steps=1, evaluate_every_epochs=0)
    quiet = dataclasses.replace(config, tensorboard=dataclasses.replace(config.tensorboard, enabled=False))
    rows: list[Sequence[str]] = []
    verdicts: list[str] = []
    reference: tuple[Path, dict[str, Any]] | None = None
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        for plan in plans:
            W = plan.world_size
            folder = Path(scratch) / f"{len(rows)}-ranks-{W}"
            folder.mkdir()
            this = dataclasses.replace(quiet, trainer=dataclasses.replace(trainer, output_dir=str(folder / "run")))
            say(f"{W} rank{'s' * (W > 1)}: {plan.equation()} ...")
            began_s = time.perf_counter()
            try:
                summary = run_ranks(run_traced, W, this, str(folder), cuda=_uses_cuda(config), timeout_s=86_400.0)[0]
            except RanksDifferError as error:
                verdicts.append(f"NO: {str(error).splitlines()[0]}")
                rows.append((str(W), plan.per_rank(), "-", "-", "-", verdicts[-1]))
                continue
            except TrainerError as error:
                raise type(error)(f"at {W} rank{'s' * (W > 1)}: {error}") from error
            seconds = time.perf_counter() - began_s
            reference = reference or (folder / "trace.jsonl", summary)
            verdicts.append(_verdict(reference, (folder / "trace.jsonl", summary)))
            digits = summary["parameters_sha256"][:16]
            rows.append((str(W), plan.per_rank(), str(summary["steps"]), f"{seconds:.1f}", digits, verdicts[-1]))
    header = ("ranks", "micro-batches per rank", "steps", "seconds", "parameters sha256", "the same bits")
    say("", table(rows, header), "")
    if any(verdict.startswith("NO") for verdict in verdicts):
        say("NOT the same bits at every world size.")
        return 1
    assert reference is not None
    steps = reference[1]["steps"]
    say(f"The same bits at every world size, in each of {steps} steps: loss, parameters, buffers, optimizer state.")
    return 0


def _verdict(reference: tuple[Path, dict[str, Any]], this: tuple[Path, dict[str, Any]]) -> str:
    """What a table says of one run: (trace file, summary) against the reference's."""
    if this is reference or this[0] == reference[0]:
        return "reference"
    difference = first_difference(reference[0], this[0])
    if difference is not None:
        return f"NO: first at step {difference[0]}, in {difference[1]}"
    if this[1]["metrics"] != reference[1]["metrics"]:
        return "NO: the final metrics, though every step is the same"
    return "yes"


def _uses_cuda(config: Config) -> bool:
    if config.trainer.device == "cpu":
        return False
    import torch

    return torch.cuda.is_available()
