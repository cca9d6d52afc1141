"""The runs of a case at several world sizes, all at once, in standing groups of ranks.

A rank that dies, hangs or fails in a way that the others have not agreed on ends its group, which starts again for the
next run.
"""

from __future__ import annotations

import dataclasses
import multiprocessing.connection
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.standing import GRACE_S, MOST_RUNS, Group


@dataclass
class Outcome:
    """How a run ended on one rank.

    Attributes:
        kind: "finished"; "error" for a message to the user; "traceback"; "died"; "hung".
        label, reasons: of a finished run: its exactness and what is against it.
        trace: of every step, tensor -> digest: losses, parameters, buffers, optimizer state.
        facts: of a finished run: what else has to be the same, such as metrics.
        message: of any other; error: the name of its class.
        agreed: whether all ranks raised the same error together.
    """

    kind: str
    label: str = ""
    reasons: list[str] = field(default_factory=list)
    trace: list[dict[str, str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    error: str = ""
    agreed: bool = True


def _make_run(ranks: Any, values: dict[str, Any], folder: str) -> Outcome:
    import traceback

    from trainer.config.keys import parse
    from trainer.errors import TrainerError
    from trainer.exact.checks.hashes import digest
    from trainer.exact.packs import packs
    from trainer.run.run import run

    # Runs are short: packs are used from the second step on.
    packs.FEWEST_STEPS = packs.TRIALS = packs.Choice.STEPS = 1
    trace: list[dict[str, str]] = []

    def watch(step: int, engine: Any, losses: Any) -> None:
        # The losses as text: it is exact, and it is what a person compares first.
        state = {name: digest(tensor) for name, tensor in engine.state().items()}
        trace.append({"loss": str(losses.tolist())} | state)

    try:
        config = parse(values)
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, output_dir=folder))
        summary = run(config, ranks, config_name="fuzz", started_at_s=time.time(), trace=watch)
    except TrainerError as error:
        return Outcome("error", trace=trace, message=str(error), error=type(error).__name__, agreed=error.agreed)
    except BaseException:
        return Outcome("traceback", trace=trace, message=traceback.format_exc())
    facts = {k: summary[k] for k in ("status", "steps", "metrics", "parameters_sha256", "model_sha256")}
    facts |= {k: summary[k] for k in ("best", "gradient_noise") if k in summary}
    return Outcome("finished", summary["exactness"], list(summary.get("inexact", [])), trace, facts)


class Pool:
    """Groups of ranks by world size, each started when it is first used. A context manager."""

    def __init__(self) -> None:
        self._groups: dict[int, Group] = {}
        self._place = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.restarts = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for group in self._groups.values():
            group.close()
        self._groups.clear()
        shutil.rmtree(self._place, ignore_errors=True)

    def run(self, config: dict[str, Any], world_sizes: tuple[int, ...], limit_s: float) -> dict[int, list[Outcome]]:
        """Makes the run of a config at several world sizes, all at once.

        Args:
            config: JSON values without an output folder.
            world_sizes: of the runs.
            limit_s: after so long, ranks that have not answered count as hung.

        Returns:
            W -> outcomes by rank.
        """
        folder = Path(tempfile.mkdtemp(dir=self._place))
        waiting: dict[Any, tuple[int, int]] = {}
        outcomes: dict[int, dict[int, Outcome]] = {W: {} for W in world_sizes}
        for W in world_sizes:
            if W not in self._groups:
                self._groups[W] = Group(W, self._place)
            group = self._groups[W]
            group.ask(_make_run, config, str(folder / str(W)))
            waiting |= {pipe: (W, rank) for rank, pipe in enumerate(group.pipes)}
        deadlines = dict.fromkeys(world_sizes, time.monotonic() + limit_s)
        while waiting:
            nearest_s = min(deadlines[W] for W, _ in waiting.values()) - time.monotonic()
            ready: list[Any] = multiprocessing.connection.wait(list(waiting), max(0.0, nearest_s))
            for pipe in ready:
                W, rank = waiting.pop(pipe)
                try:
                    outcomes[W][rank] = outcome = pipe.recv()[1]
                except (EOFError, OSError):
                    outcomes[W][rank] = outcome = Outcome("died", message=self._groups[W].last_words(rank))
                if outcome.kind != "finished":
                    deadlines[W] = min(deadlines[W], time.monotonic() + GRACE_S)
            for pipe, (W, rank) in list(waiting.items()):
                if time.monotonic() >= deadlines[W]:
                    waiting.pop(pipe)
                    outcomes[W][rank] = Outcome("hung", message=f"rank {rank} of {W} did not answer")
        shutil.rmtree(folder, ignore_errors=True)
        result = {W: [of_W[rank] for rank in range(W)] for W, of_W in outcomes.items()}
        for W, ranks in result.items():
            self._settle(W, ranks)
        return result

    def _settle(self, W: int, ranks: list[Outcome]) -> None:
        """Ends a group whose ranks may not be where the others are, or that is old."""
        together = all(o.kind == "finished" for o in ranks) or all(o.kind == "error" and o.agreed for o in ranks)
        # An error that each rank found by itself, such as one of the config, comes before any rank waits for another.
        together |= all(o.kind == "error" and not o.trace for o in ranks) and len({o.message for o in ranks}) == 1
        # With one rank nothing can be out of step.
        if W == 1 and ranks[0].kind in ("finished", "error", "traceback"):
            together = True
        if not together or self._groups[W].runs >= MOST_RUNS:
            self.restarts += not together
            self._groups.pop(W).close()
