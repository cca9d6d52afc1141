"""`python -m trainer verify`: runs a config at several world sizes, and sizes of packs, and compares every bit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.keys import Config
from ..engine.gpus import sharing, usable_gpus
from ..errors import NonFiniteError, RanksDifferError, TrainerError, UserError
from ..ranks.place import Ranks
from ..ranks.workers import run_ranks
from ..record.console import say, table

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.deepspeed_engine import Engine


Pack = int | str | None  # as trainer.pack; None for what the config says


@dataclass(frozen=True)
class Traced:
    """One run that finished, or stopped at a loss that is not finite.

    Attributes:
        trace: rank 0's file, with a line of digests for each step.
        summary: as in summary.json. For a stopped run: the steps before the bad one, and the reason under "stopped".
            In both cases with "seconds", the time from the start of the run.
        refused: size of packs -> reason -> the ranks on which such packs were not exact.
    """

    world_size: int
    pack: Pack
    trace: Path
    summary: dict[str, Any]
    refused: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps whose bits count."""
        return int(self.summary["steps"])

    @property
    def stopped(self) -> str | None:
        """Why it stopped before its end; None if it did not."""
        return self.summary.get("stopped")

    @property
    def title(self) -> str:
        """What was run, for messages."""
        return _title(self.world_size, self.pack)

    @property
    def label(self) -> str:
        """What the table adds for a run that is not labelled bitwise."""
        return " (labelled tolerance)" if self.summary.get("inexact") else ""


def run_traced(ranks: Ranks, config: Config, folder: str) -> dict[str, Any]:
    """Makes one run, and returns its summary. Collective: every rank. Rank 0 writes a line of digests for each step."""
    from ..exact.checks.hashes import digest
    from ..run.run import run

    with contextlib.ExitStack() as files:
        trace_file = files.enter_context((Path(folder) / "trace.jsonl").open("w")) if ranks.first else None

        def trace(step: int, engine: Engine, losses: Tensor) -> None:
            state = engine.state()
            if trace_file is not None:
                line = {"loss": digest(losses), **{name: digest(tensor) for name, tensor in state.items()}}
                trace_file.write(json.dumps(line) + "\n")

        return run(config, ranks, config_name="verify", started_at_s=time.time(), trace=trace)


def run_to_a_stop(ranks: Ranks, config: Config, folder: str) -> dict[str, Any]:
    """As `run_traced`, but a loss that is not finite is a result: verify then checks that all world sizes stop there.

    Returns:
        `Traced.summary`.
    """
    from ..exact.packs import packs

    # A short run looks for no packs, because that would not pay. But verify is to compare them. This is not set back,
    # because the process ends with this run.
    packs.FEWEST_STEPS = 1
    # Imported before the clock starts: in a new process, as on GPUs, the imports take seconds.
    importlib.import_module("trainer.run.run")
    began_s = time.perf_counter()
    try:
        summary = run_traced(ranks, config, folder)
    except NonFiniteError as error:
        manifest = Path(str(config.trainer.output_dir)) / "manifest.json"
        inexact = json.loads(manifest.read_text())["inexact"] if manifest.exists() else []
        why = str(error).splitlines()[0]
        summary = {"steps": error.good_steps, "stopped": why, "metrics": {}, "inexact": inexact}
    return summary | {"seconds": time.perf_counter() - began_s}


def first_difference(one: Path, other: Path, steps: int | None = None) -> tuple[int, str] | None:
    """The first step, and in it the first tensor, whose digests differ between two trace files; None if none do.

    Tensors are compared in the order loss, parameters, buffers, optimizer state.

    Args:
        one, other: the files. Steps that only one of them has are not compared.
        steps: how many to compare at most; None for all.
    """
    with one.open() as ours, other.open() as theirs:
        for step, (left, right) in enumerate(itertools.islice(zip(ours, theirs, strict=False), steps), start=1):
            if left == right:
                continue
            a, b = json.loads(left), json.loads(right)
            return step, next(name for name in [*a, *b] if a.get(name) != b.get(name))
    return None


def verify(config: Config, world_sizes: Sequence[int], packs: Sequence[Pack] = (None,)) -> int:
    """Runs the config at each world size and with each size of packs, compares with the first and prints a table.

    Every step's loss sums, parameters, buffers and optimizer state are compared. Within a run, the ranks' parameters
    are compared after every step. A run that stops because its loss is not finite is compared up to that step.

    Args:
        config: of the run.
        world_sizes: numbers of ranks.
        packs: values of `trainer.pack`.

    Returns:
        0 if no run differs from the first in any bit, else 1.

    Raises:
        UserError: a world size is impossible, or the config is weak scaling. It is raised before anything starts.
        TrainerError: a run failed. The rows of the runs before it are printed first.
    """
    plans = [config.plan(world_size) for world_size in world_sizes]
    if plans[0].scaling == "weak":
        raise UserError(
            "This config is weak scaling: its global batch, and so its model, changes with the number of ranks.\n"
            "verify compares runs of strong scaling: give train_batch_size."
        )
    gpus = usable_gpus(config.trainer.device)
    shared = [W for W in world_sizes if gpus and gpus * config.trainer.ranks_per_gpu < W]
    if shared:
        say(
            f"note: this machine has {gpus} GPU{'s' * (gpus > 1)}, which {_listed(shared)} ranks share, over gloo "
            "(trainer.ranks_per_gpu). This changes no bit. Their seconds do not show the speed of as many GPUs."
        )
    unsaved = dataclasses.replace(config.trainer.checkpoint, every_steps=0)
    trainer = dataclasses.replace(config.trainer, guard_every_steps=1, evaluate_every_epochs=0, checkpoint=unsaved)
    quiet = config.unlogged()
    rows: list[Sequence[str]] = []
    verdicts: list[str] = []
    runs: list[Traced] = []
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        for pack, plan in itertools.product(packs, plans):
            W = plan.world_size
            folder = Path(scratch) / f"{len(rows)}-ranks-{W}"
            folder.mkdir()
            own = dataclasses.replace(trainer, output_dir=str(folder / "run"))
            if pack is not None:
                own = dataclasses.replace(own, pack=pack)
            this = sharing(dataclasses.replace(quiet, trainer=own), W, gpus)
            say(f"{_title(W, pack)}: {plan.equation()} ...")
            try:
                own_of = run_ranks(run_to_a_stop, W, this, str(folder), cuda=gpus > 0, timeout_s=86_400.0)
            except RanksDifferError as error:
                verdicts.append(f"NO: {str(error).splitlines()[0]}")
                rows.append((str(W), str(pack), plan.per_rank(), "-", "-", "-", verdicts[-1]))
                continue
            except TrainerError as error:
                if rows:
                    _show(rows, packs)
                raise type(error)(f"at {_title(W, pack)}: {error}") from error
            summary = own_of[0]
            run = Traced(W, pack, folder / "trace.jsonl", summary, _refused(own_of))
            runs.append(run)
            verdicts.append(("reference" if run is runs[0] else _verdict(runs[0], run)) + run.label)
            steps = f"{run.steps}, stopped at {run.steps + 1}" if run.stopped else str(run.steps)
            digits = summary.get("parameters_sha256", "-")[:16]
            shown = _packs_used(pack, summary)
            rows.append((str(W), shown, plan.per_rank(), steps, f"{summary['seconds']:.1f}", digits, verdicts[-1]))
    _show(rows, packs)
    say(*[f"{run.title}, stopped: {run.stopped}" for run in runs if run.stopped])
    say(*_refusals(runs))
    labelled = [run for run in runs if run.label]
    say(*[f"{r.title}, labelled tolerance: {'; '.join(r.summary['inexact'])}." for r in labelled])
    if labelled:
        say("verify compares bits, but a run that is labelled tolerance need not have the same bits as another.")
    if any(verdict.startswith("NO") for verdict in verdicts):
        say(f"NOT the same bits {_everywhere(packs)}.")
        return 1
    if len(rows) == 1:
        say("A single run: there was nothing to compare. Give --world_sizes at least two numbers.")
        return 0
    say(_same(runs[0], _everywhere(packs)))
    return 0


def _show(rows: Sequence[Sequence[str]], packs: Sequence[Pack]) -> None:
    """Prints the table; its column for the size of packs only if sizes were asked for."""
    header = ("ranks", "packs of", "micro-batches per rank", "steps", "seconds", "parameters sha256", "the same bits")
    kept = [i for i in range(len(header)) if i != 1 or list(packs) != [None]]
    say("", table([[row[i] for i in kept] for row in rows], [header[i] for i in kept]), "")


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _ranks(world_size: int) -> str:
    return f"{world_size} rank{'s' * (world_size > 1)}"


def _title(world_size: int, pack: Pack) -> str:
    return _ranks(world_size) if pack is None else f"{_ranks(world_size)}, packs of {pack}"


def _everywhere(packs: Sequence[Pack]) -> str:
    return "at every world size" if len(packs) == 1 else "at every world size and with all packs"


def _packs_used(pack: Pack, summary: dict[str, Any]) -> str:
    """The size of packs that was asked for, and what became of it on rank 0."""
    if pack in (None, 1):
        return str(pack)
    found = summary.get("pack")
    if found is None:
        return f"{pack} (none)"
    return f"{pack} ({found['size']})" if found["size"] != pack else str(pack)


def _refused(summaries: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """`Traced.refused`, from the summaries of all ranks: each finds out what is exact for its own micro-batches."""
    found: dict[str, dict[str, list[int]]] = {}
    for rank, summary in enumerate(summaries):
        for size, why in summary.get("pack", {}).get("refused", {}).items():
            found.setdefault(size, {}).setdefault(why, []).append(rank)
    return found


def _refusals(runs: Sequence[Traced]) -> list[str]:
    """Sentences about packs that were refused: their size, the reason, the numbers of ranks, and the ranks."""
    where: dict[tuple[str, str], dict[int, list[int]]] = {}
    for run in runs:
        for size, reasons in run.refused.items():
            for why, ranks in reasons.items():
                where.setdefault((size, why), {}).setdefault(run.world_size, ranks)
    sentences = []
    for (size, why), found in where.items():
        some = [f"at {_ranks(W)} only on {_those(ranks)}" for W, ranks in found.items() if len(ranks) < W]
        at = f"at {_listed(list(found))} rank{'s' * (list(found) != [1])}"
        inner = f" ({', '.join(some)})" if some else ""
        sentences.append(f"Packs of {size} were refused {at}{inner}: {why}.")
    return sentences


def _those(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_listed(ranks)}"


def _same(run: Traced, where: str) -> str:
    """The last line, if every run agrees with the reference."""
    compared = f"in each of {run.steps} steps: loss, parameters, buffers, optimizer state."
    if not run.stopped:
        return f"The same bits {where}, {compared}"
    stop = f"Every run stopped at step {run.steps + 1} for the same reason"
    if not run.steps:
        return f"{stop}, so no update was made that could differ."
    return f"{stop}. Before it, the same bits {where}, {compared}"


def _verdict(reference: Traced, run: Traced) -> str:
    """The table's verdict on one run against the reference: "yes", or "NO: " and what differs first."""
    difference = first_difference(reference.trace, run.trace, min(reference.steps, run.steps))
    if difference is not None:
        return f"NO: first at step {difference[0]}, in {difference[1]}"
    if run.steps != reference.steps:
        return f"NO: {run.steps} steps, but the reference made {reference.steps}"
    if run.stopped != reference.stopped:
        return "NO: it stopped for another reason than the reference"
    # Compared as text, because nan is not equal to itself as a number.
    if json.dumps(run.summary["metrics"]) != json.dumps(reference.summary["metrics"]):
        return "NO: the final metrics differ, although every step is the same"
    return "yes"
