"""One run from top to bottom: claim a folder, build, restore, rehearse, train, finish.

Every rank calls `run` with the same config. The loop is `loop.train`. Its step is `exact.step.ExactStep`: there the
promise is kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..engine.device import linear_kept
from ..errors import NonFiniteError, TrainerError, UserError
from ..exact.plan import BatchPlan
from ..ranks.collectives import broadcast_object, raise_together
from ..ranks.place import Ranks
from ..ranks.stopping import heed, raised
from ..ranks.watch import Watch
from ..record.checkpoints import way_on
from ..record.console import DeepSpeedLog, say
from ..record.folder import OutputFolder
from .build import build
from .claim import Finished, Resume, claim, finished
from .course import Course, Trace, set_out
from .failures import explained, of_a_collective
from .finish import finish, rescue
from .loop import train
from .resume import restore
from .same_run import goes_on

NO_RESUME = Resume()
# Called on rank 0: first with ("folder", {"path": the output folder}), then with each record, as `recorder.Tell`. It
# gets copies, so nothing that it does to them reaches the run. It returns why the run has to stop, or None.
Listener = Callable[[str, dict[str, Any]], str | None]


def nobody(kind: str, values: dict[str, Any]) -> None:
    """For a run to which nobody listens."""


def run(
    config: Config,
    ranks: Ranks,
    *,
    config_name: str,
    started_at_s: float,
    began_s: float | None = None,
    trace: Trace | None = None,
    resume: Resume = NO_RESUME,
    listener: Listener = nobody,
    guest: bool = False,
    tested: bool = True,
) -> dict[str, Any]:
    """Runs a config to its end. Collective: every rank.

    Args:
        config: checked already.
        ranks: this rank's place.
        config_name: names the output folder if the config does not.
        started_at_s: time.time() at which this process began.
        began_s: time.monotonic() at that moment, for durations: the clock may be set; None for now.
        trace: called after every step.
        resume: whether to continue from a checkpoint.
        listener: hears of every record, on rank 0.
        guest: the process belongs to somebody's program and goes on after the run, so it must never be ended.
        tested: whether the last evaluation is of the test split, too. A search leaves it alone in its trials.

    Returns:
        The summary, as in summary.json, on every rank (only rank 0 writes files).

    Raises:
        TrainerError: an error for the user; `agreed` if every rank raises it. `Stopped` if the run was asked to stop.
    """
    with raised(ranks.first), linear_kept():
        return _run(config, ranks, config_name, started_at_s, began_s, trace, resume, listener, guest, tested)


def _run(
    config: Config,
    ranks: Ranks,
    config_name: str,
    started_at_s: float,
    began_s: float | None,
    trace: Trace | None,
    resume: Resume,
    listener: Listener,
    guest: bool,
    tested: bool,
) -> dict[str, Any]:
    plan = config.plan(ranks.world_size)
    budget_s, began_s = config.trainer.max_wall_time_s, time.monotonic() if began_s is None else began_s
    folder, source, failed = _claimed(config, ranks, config_name, resume, listener)
    log = DeepSpeedLog(keep=ranks.first)
    log.install()
    watch: Watch | None = None

    def met() -> None:
        """Starts the watching. Only now: the heartbeat needs the store in which the ranks have met."""
        nonlocal watch
        deadline_s = None if budget_s is None else began_s + budget_s
        watch = Watch(ranks, config.trainer.hang_timeout_s, deadline_s, guest=guest)

    def tell(kind: str, record: dict[str, Any]) -> None:
        reason = listener(kind, record)
        if reason is not None and watch is not None:
            watch.ask(reason)

    try:
        pieces = build(config, ranks, plan, log, met, failed)
        assert watch is not None
        if not tested:
            pieces.splits.pop("test", None)  # what is not on the device is not evaluated
        before = _finished(folder if resume.wanted else None)
        if before is not None and not goes_on(pieces, before, resume):
            if folder is not None:
                say(f"The run in {folder.path} has finished already, so there is nothing to do.")
            return before.summary
        snapshot = restore(pieces, source, resume)
        if before is not None and snapshot is None:
            raise _without_checkpoint(before, pieces.total_steps)
        heed()
        watch.begin()
        path, resumed = broadcast_object(None if folder is None else folder.path), snapshot is not None
        assert path is not None
        watch.way_on = lambda: way_on(path, resumed=resumed)
        course = set_out(pieces, folder, log, watch, snapshot, trace, started_at_s, began_s, tell)
        watch.way_on = lambda: way_on(path, began=course.saver.began, resumed=resumed)
        summary = _train(course)
        if guest and watch.stop_reason == "SIGINT":  # too late for this run, but the program behind it has to hear it
            raise KeyboardInterrupt(f"the run had finished already, in {path}")
        return summary
    except TrainerError as error:
        if watch is not None and not error.agreed and error.speaks is None:
            watch.tell_failure(error)
        _release(folder)
        raise
    except BaseException as error:
        # Removes the folder of a run that ends before its first step. Later it is not empty, and stays.
        _release(folder)
        known = _explained_and_told(error, plan, folder, watch)
        if known is not None:
            raise known from error
        raise
    finally:
        if watch is not None:
            watch.close()
            watch.way_on = str  # refers to the whole run, which frames of an exception would keep
        log.close()
        if folder is not None:
            folder.unlock()


def _claimed(
    config: Config, ranks: Ranks, config_name: str, resume: Resume, listener: Listener
) -> tuple[OutputFolder | None, Path | None, TrainerError | None]:
    """Rank 0's output folder, the checkpoints to go on from, and why rank 0 could not claim it; None on other ranks."""
    folder: OutputFolder | None = None
    source: Path | None = None
    try:
        if ranks.first:
            folder, source = claim(resume, config, config_name)
            listener("folder", {"path": str(folder.path)})
    except TrainerError as error:
        return folder, source, error  # raised when the ranks meet: the others must not wait for this one
    return folder, source, None


def _without_checkpoint(before: Finished, total_steps: int) -> UserError:
    return UserError(
        f"The run in {before.path} has finished without a checkpoint, so it cannot go on to "
        f"{total_steps:,} steps.\nStart the longer run with another --output_dir.",
        agreed=True,
    )


def _explained_and_told(
    error: BaseException, plan: BatchPlan, folder: OutputFolder | None, watch: Watch | None
) -> TrainerError | None:
    """What an error means to the user, if that is known. Tells the other ranks, unless they know it already."""
    known = explained(error, plan, folder)
    if known is None and watch is not None and of_a_collective(error):
        known = watch.explain(error)
    if watch is not None and (known is None or known.speaks is None):
        watch.tell_failure(known or error)
    return known


def _finished(folder: OutputFolder | None) -> Finished | None:
    """The run in rank 0's folder, if it has finished already. Collective: every rank."""
    before, error = None, None
    try:
        before = None if folder is None else finished(folder)
    except TrainerError as own:
        error = own
    raise_together(error)
    return broadcast_object((before,))[0]


def _train(course: Course) -> dict[str, Any]:
    try:
        train(course)
    except NonFiniteError as failure:
        rescue(course, failure)
        raise
    except BaseException:
        course.record.end_loggers()
        raise
    finally:
        course.record.progress.close()
    return finish(course)


def _release(folder: OutputFolder | None) -> None:
    if folder is not None:
        folder.release()
