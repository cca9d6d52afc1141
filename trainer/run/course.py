"""A run under way: everything that its loop works with, prepared for the first step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..engine.zero_step import ZeroStep
from ..errors import UserError
from ..exact.batch_norm import RunningStatistics
from ..exact.checks import audit
from ..exact.checks.guard import compare_ranks
from ..exact.checks.non_finite import non_finite
from ..exact.gradient_noise import NoiseScale
from ..exact.micro_batches import MicroBatches, ignore_phase
from ..exact.optional.graphs import Graphs
from ..exact.packs.packs import Packs
from ..exact.step import ExactStep
from ..ranks.collectives import message_device
from ..ranks.watch import Watch
from ..record.checkpoints import Snapshot, refuse_unstorable
from ..record.console import DeepSpeedLog, say
from ..record.folder import OutputFolder
from ..record.window import Window
from ..rehearsal.flops import ModelFlops
from ..rehearsal.rehearse import rehearse
from ..rehearsal.stage import Subject
from ..tasks.first_look import BUILT_IN
from .banner import banner
from .best import BestModel
from .build import Pieces, measures_norms, refuse_inexact
from .recorder import Recorder, Tell, tell_nobody
from .resume import Saver, as_written

if TYPE_CHECKING:
    from ..config.keys import TrainerOptions
    from ..engine.deepspeed_engine import Engine

# Called after every step with (steps made, engine, loss sums of all micro-batches). `verify` and the benchmarks use it
# to watch a run.
Trace = Callable[[int, "Engine", Tensor], None]


@dataclass
class Course:
    """A run under way.

    Attributes:
        pieces: the parts of the run.
        step: makes a step.
        window, record: the numbers of the latest steps, and the files that they go to.
        saver: writes checkpoints.
        best: the best model on validation; None if the last one is kept.
        noise: the gradient noise scale; None if it is not measured.
        watch: watches the ranks and the signals.
        folder: rank 0's; None on the others.
        first_step: steps made before this process began.
        done: steps made so far, those of earlier processes included.
        trace: called after every step.
        started_at_s: time.time() at which this process began: a stamp.
        began_s: time.monotonic() at that moment, for durations: the clock may be set.
        owes_validation: the checkpoint was the last one of a shorter run. That run made this step's validation after
            the checkpoint, so this one has to make it now.
        time_to_first_step_s: seconds from `began_s` to the end of the first step; nan before that.
        rehearsal_s: the seconds that the rehearsal took.
        flops: the model's operations in a step; or why they are not known.
    """

    pieces: Pieces
    step: ExactStep | ZeroStep
    window: Window
    record: Recorder
    saver: Saver
    best: BestModel | None
    noise: NoiseScale | None
    watch: Watch
    folder: OutputFolder | None
    first_step: int
    done: int
    trace: Trace | None
    started_at_s: float
    began_s: float
    owes_validation: bool
    time_to_first_step_s: float = math.nan
    rehearsal_s: float = 0.0
    flops: ModelFlops | str = "no step was made"

    def check_window(self) -> None:
        """Raises NonFiniteError for the window's first step that is not finite, if the host learns of it only now."""
        if not self.step.deferred:
            return
        bad = self.window.first_non_finite()  # waits for the device
        if bad is not None:
            offset, losses, norm = bad
            raise non_finite(
                self.done - self.window.filled + offset, losses, norm, statistics=self.step.statistics.size
            )

    def tell(self) -> None:
        """Prints the notes of packs, such as that memory ran out. Rank 0."""
        if isinstance(self.step, ExactStep) and self.step.own_block.packs is not None and self.pieces.ranks.first:
            notes, self.step.own_block.packs.notes = self.step.own_block.packs.notes, []
            say(*[f"note: {note}" for note in notes])

    def compare_ranks(self) -> None:
        """Raises RanksDifferError unless all ranks hold the same model. Collective: every rank."""
        if self.pieces.engine.zero_stage == 0:
            compare_ranks(self.pieces.common_state(), self.done)

    def checkpoint(self, ended: bool = False) -> None:
        """Starts a checkpoint; training continues while it is written. Collective: every rank.

        Args:
            ended: it is the run's last one. A longer run continues from it as if this one had never ended.
        """
        self.check_window()
        self.record.flush()
        self.record.checkpointed(self.saver.save(self.done, self.record.lines, ended, self.record.time_s))


def make_step(p: Pieces, mark: Callable[[str], None] = ignore_phase) -> ExactStep | ZeroStep:
    """The object that makes the steps: exact, or DeepSpeed's with ZeRO. `mark` is called at the end of each phase."""
    micro_batches = MicroBatches(
        p.task,
        p.engine.forward_module,
        p.splits["train"],
        device=p.device,
        seed=p.config.trainer.seed,
        micro_batch_size=p.plan.micro_batch_size,
        autocast=p.engine.autocast,
        mark=mark,
    )
    statistics = RunningStatistics(p.engine.model)
    if p.engine.zero_stage > 0:
        return ZeroStep(p.engine, micro_batches, statistics, ranks=p.ranks, device=p.device, mark=mark)
    return ExactStep(
        p.engine,
        micro_batches,
        statistics,
        ranks=p.ranks,
        leaves=p.batches.micro_batch_counts(),
        device=p.device,
        max_norm=p.config.gradient_clipping,
        measures_norms=measures_norms(p.config),
        bucket_bytes=_bucket_bytes(p),
        mark=mark,
    )


def _bucket_bytes(p: Pieces) -> int | None:
    """The size of the parts in which the ranks exchange the gradient; None for one piece. Raises UserError."""
    mib = p.config.trainer.exchange_bucket_mib
    if mib is not None and p.ranks.world_size > 1 and message_device(p.device) != p.device:
        raise UserError(
            f'"trainer.exchange_bucket_mib" is {mib:g}, but ranks that share a GPU exchange the gradient over the '
            "CPU, in one piece.\nLeave it out, or use one rank per GPU.",
            agreed=True,
        )
    return None if mib is None else max(1, int(mib * (1 << 20)))


def subject_of(p: Pieces, step: ExactStep | ZeroStep) -> Subject:
    """The parts of a run that a rehearsal needs."""
    return Subject(
        task=p.task,
        engine=p.engine,
        batches=p.batches,
        micro_batches=step.micro_batches,
        statistics=step.statistics,
        host_split=p.host_splits["train"],
        split=p.splits["train"],
        plan=p.plan,
        device=p.device,
        ranks=p.ranks,
        alike=p.alike,
    )


def set_out(
    p: Pieces,
    folder: OutputFolder | None,
    log: DeepSpeedLog,
    watch: Watch,
    snapshot: Snapshot | None,
    trace: Trace | None,
    started_at_s: float,
    began_s: float,
    tell: Tell = tell_nobody,
) -> Course:
    """Prepares the first step of a run: restores, rehearses, prints the banner. Collective: every rank.

    Args:
        p: of the run.
        folder: rank 0's.
        log: takes DeepSpeed's messages.
        watch: watches the ranks.
        snapshot: the checkpoint from which it continues. The engine has its state already.
        trace: called after every step.
        started_at_s, began_s: time.time() and time.monotonic() at which this process began.
        tell: called with every new record, on rank 0.

    Raises:
        UserError: the task does not keep the protocol, or is not exact although the config asks for "bitwise".
    """
    options = p.config.trainer
    # First: otherwise a model that no checkpoint can hold would show only when the first one is written.
    refuse_unstorable(p.engine.model_state())
    noise = NoiseScale(len(p.splits["train"])) if options.gradient_noise else None
    # If the run is shorter than a window: one step more than the run. So the window does not end with the run, and
    # continues in a longer one.
    window = Window(
        min(options.log_every_steps, p.total_steps + 1), max(p.batches.micro_batch_counts()), p.device, noise=noise
    )
    step = make_step(p, window.timer.mark)
    best = _best_model(p)
    first_step, history, time_s = 0, [], 0.0
    if snapshot is not None:
        first_step, history = snapshot.step, snapshot.facts["history"]
        time_s = _restore(p, window, best, snapshot)
    history.append({"started_at_s": started_at_s, "from_step": first_step, "world_size": p.plan.world_size})
    record = Recorder(p, window, first_step, history, tell, time_s)
    saver = Saver(p, window, best, history, folder, first_step)
    rehearsal_s, notes, flops = 0.0, list[str](), Course.flops
    if first_step < p.total_steps:
        rehearsal_s, notes, flops = _rehearse(p, step, first_step)
    rate = p.engine.set_learning_rate(p.rates.factor(first_step))
    if p.ranks.first:
        say(*banner(p, step.audit, rate, first_step), *(f"note: {note}" for note in notes))
        if first_step:
            before = history[-2]["world_size"]
            say(f"continuing after step {first_step:,} from a checkpoint of {before} rank{'s' * (before > 1)}")
    if best is not None and options.best.metric != "auto":
        # Finds a misspelt metric, or one that validation does not have, before any training.
        best.check(record.evaluate("validation", 0, quiet=True), lambda name: _why_without(p, name))
    if folder is not None:
        # A checkpoint of an earlier version does not say how many lines there were.
        record.open(
            folder, log, snapshot.facts.get("records") if snapshot is not None else None
        )  # only now: the rehearsal has shown that the task works
    record.begin()
    return Course(
        pieces=p,
        step=step,
        window=window,
        record=record,
        saver=saver,
        best=best,
        noise=noise,
        watch=watch,
        folder=folder,
        first_step=first_step,
        done=first_step,
        trace=trace,
        started_at_s=started_at_s,
        began_s=began_s,
        owes_validation=snapshot is not None and bool(snapshot.facts.get("ended")),
        rehearsal_s=rehearsal_s,
        flops=flops,
    )


def _restore(p: Pieces, window: Window, best: BestModel | None, snapshot: Snapshot) -> float:
    """Restores what a checkpoint holds besides the engine's state. Returns the seconds of training up to it."""
    with as_written(snapshot.step):
        window.load_state_dict(snapshot.facts["window"])
        if p.rates.adascale is not None and snapshot.facts["adascale"] is not None:
            p.rates.adascale.load_state_dict(snapshot.facts["adascale"])
        if best is not None and snapshot.facts["best"] is not None:
            best.load_state_dict(snapshot.tensors.get("best", {}), snapshot.facts["best"], p.engine)
        return float(snapshot.facts.get("time_s", 0.0))  # a checkpoint of an earlier version has none


def _best_model(p: Pieces) -> BestModel | None:
    options = p.config.trainer
    if "validation" not in p.splits:
        if options.best.patience_evaluations or options.best.metric not in ("auto", None):
            raise UserError(
                f'"trainer.best" asks for the best model on validation, but the task {options.task} has no validation '
                "split.",
                agreed=True,
            )
        return None
    if options.best.metric is None or not options.evaluate_every_epochs:
        return None
    return BestModel(p.config, getattr(p.task, "best_metric", None))


def _why_without(p: Pieces, name: str) -> str:
    say_why = getattr(p.task, "why_without", None)
    return say_why(name, p.host_splits["validation"].arrays) if callable(say_why) else ""


def size_of_packs(options: TrainerOptions) -> int | str:
    """`trainer.pack`, or its default. Packs are compared, not proven. So tasks of users must ask for them."""
    if options.pack is not None:
        return options.pack
    return "auto" if options.task in BUILT_IN else 1


def _rehearse(p: Pieces, step: ExactStep | ZeroStep, first_step: int) -> tuple[float, list[str], ModelFlops | str]:
    """Rehearses, labels or refuses the run, and begins its audits. Collective: every rank.

    Returns:
        The seconds that it took, notes for the person who started the run, and `Course.flops`.
    """
    began_s = time.perf_counter()
    found = rehearse(subject_of(p, step), first_step)
    reasons = [finding.what for finding in found.findings if finding.what not in p.inexact]
    remedies = list(dict.fromkeys(finding.remedy for finding in found.findings))
    refuse_inexact(p.config, reasons, remedies)
    p.inexact += reasons
    p.changing = found.changing
    every_steps = audit.interval(
        p.config.trainer.audit_every_steps,
        p.config.trainer.guard_every_steps,
        p.plan.micro_batches,
        p.plan.world_size,
    )
    if p.engine.zero_stage == 0 and not found.findings and every_steps:
        step.audit = audit.Audit(
            p.ranks,
            p.hosts,
            list(p.engine.names.values()),
            every_steps=every_steps,
            total_steps=p.total_steps,
            seed=p.config.trainer.seed,
            alike=p.alike,
        )
    pack = size_of_packs(p.config.trainer)
    if p.engine.zero_stage == 0 and not p.inexact and not p.config.trainer.compile and pack != 1:
        size = None if pack == "auto" else int(pack)
        assert isinstance(step, ExactStep)
        step.own_block.packs = Packs(
            step.micro_batches,
            p.engine.parameters,
            p.engine.model,
            step.statistics,
            p.device,
            size,
            p.total_steps - first_step,
        )
    if p.config.trainer.cuda_graph is not None and p.device.type == "cuda" and not p.inexact:
        assert isinstance(step, ExactStep)
        tensors = [*p.engine.model.parameters(), *p.engine.model.buffers()]
        step.own_block.graphs = Graphs(tensors, step.micro_batches.follows_progress)
    notes = found.notes + remedies
    if first_step and found.kept and not found.findings:
        notes.append(
            f"{found.kept[0]} changes with micro-batches, and checkpoints do not hold it. If numbers depend on it, "
            "this run will differ from one that was never interrupted."
        )
    return time.perf_counter() - began_s, notes, found.flops
