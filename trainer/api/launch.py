"""Starts a run on ranks of this machine: in this process, or in new processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..errors import LostRankError, UserError
from ..ranks.place import Ranks
from ..ranks.workers import Died, run_ranks, worker_context

_ALONE = Ranks()
# As `run.run.Listener`.
Listener = Callable[[str, dict[str, Any]], str | None]


def _nobody(kind: str, values: dict[str, Any]) -> None:
    """The listener of a run to which nobody listens."""


@dataclass(frozen=True)
class Order:
    """A run that is wanted.

    Attributes:
        config: checked already.
        name: names the output folder if the config does not.
        resume, allow_changed_config: as of `run.claim.Resume`. It is not imported here, because its module loads torch.
        started_at_s, began_s: time.time() and time.monotonic() when the order was given.
    """

    config: Config
    name: str
    resume: str
    allow_changed_config: bool
    started_at_s: float
    began_s: float

    @staticmethod
    def of(config: Config, name: str, resume: str = "none", allow_changed_config: bool = False) -> Order:
        """An order that is given now."""
        return Order(config, name, resume, allow_changed_config, time.time(), time.monotonic())


def refuse_launchers(called: str) -> None:
    """Raises UserError in a process that a launcher has started as one of several ranks.

    Args:
        called: what the user has called, for the message.
    """
    ranks = Ranks.from_environment()
    if ranks.world_size > 1:
        raise UserError(
            f"{called} starts its ranks itself, but a launcher has started this process as rank {ranks.rank} of "
            f"{ranks.world_size}.\nStart it once, without a launcher. With a launcher, start trainer/main.py."
        )


def on_this_rank(
    order: Order, ranks: Ranks = _ALONE, listener: Listener = _nobody, *, guest: bool = False
) -> dict[str, Any]:
    """Makes a run in this process, and returns its summary. Collective: every rank. See `run.run` for all else."""
    from ..ranks.rendezvous import close
    from ..run.claim import Resume
    from ..run.run import run

    summary = run(
        order.config,
        ranks,
        config_name=order.name,
        started_at_s=order.started_at_s,
        began_s=order.began_s,
        resume=Resume(order.resume, order.allow_changed_config),
        listener=listener,
        guest=guest,
    )
    if not guest:  # for a guest, `guest.hosted` closes it
        close()
    return summary


def on_ranks(order: Order, world_size: int, listener: Listener = _nobody, *, quiet: bool = False) -> dict[str, Any]:
    """Makes a run in `world_size` new processes, and returns its summary.

    The listener is called in this process and thread. Signals are passed on to the ranks.

    Args:
        order: the run.
        world_size: how many ranks.
        listener: as of `run.run`.
        quiet: whether to hide what the ranks print.

    Raises:
        TrainerError: as of `run.run`.
        WorkerError: a rank has failed otherwise. It holds the traceback, and perhaps the exception.
        KeyboardInterrupt, EndedBySignal: a signal has ended the run before its first step.
    """
    from ..engine.gpus import usable_gpus

    if order.config.trainer.device == "cpu" or not list(Path("/dev").glob("nvidia[0-9]*")):
        # Started early: the server of the ranks does its imports while this process imports torch to look for GPUs.
        worker_context(cuda=False)
    try:
        summaries = run_ranks(
            _rank,
            world_size,
            order,
            cuda=usable_gpus(order.config.trainer.device) > 0,
            quiet=quiet,
            environment=os.environ,
            timeout_s=float("inf"),
            hear=lambda event: listener(*event),
        )
    except Died as died:  # before the ranks have met. Afterwards the other ranks notice, and say more
        raise LostRankError(
            f"R{str(died)[1:]} (as by the system, if memory runs out). The other ranks were ended."
        ) from None
    summary: dict[str, Any] = summaries[0]
    return summary


def _rank(ranks: Ranks, order: Order, tell: Callable[[Any], str | None]) -> dict[str, Any]:
    """One rank of `on_ranks`."""
    return on_this_rank(order, ranks, lambda kind, values: tell((kind, values)))
