"""The rehearsal: before its first step, a run checks that its micro-batches do not depend on rank or order.

The same bits at every number of ranks need one thing of a task: a micro-batch's loss, gradient and statistics must
depend only on its samples, its seed and the parameters. To check this, a few micro-batches of this very run, one of
each size, are computed twice, the second time in another order. With several ranks, each rank computes them once, and
each begins with another one. Every bit is compared. If anything differs, the cause is searched for and named.
Afterwards everything is restored: parameters, buffers, random numbers and Python's state.

A rehearsal cannot see what begins later, such as a penalty from step 1,000 on. With one rank, it sees a dependence on
the rank only through torch.distributed and the variables RANK, LOCAL_RANK and WORLD_SIZE. The audit looks for both
during the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import TrainerError, UserError
from ..ranks.collectives import gather_objects, raise_together
from .causes import explain
from .flops import ModelFlops, count
from .probes import moved_values, refuse_collectives, refuse_use_of_running_statistics, under_moved_weights
from .python_state import changes, is_number
from .refused import Watch, refusal, sentence
from .results import Finding, Hashes, changed_tensor, differs, source_of
from .stage import Stage, Subject, another_rank, generators_kept
from .sums import refuse_means


@dataclass
class Found:
    """The results of a rehearsal, the same on every rank.

    Attributes:
        findings: why the run is not bitwise; empty if nothing differed.
        notes: messages for the person who starts the run.
        changing: parameters and buffers that the task's forward changes by itself.
        kept: values of Python's state that micro-batches change, whether or not anything depends on them.
        counters: those of `kept` that are numbers.
        flops: the operations of a step; or why they could not be counted.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)
    flops: ModelFlops | str = "not rehearsed"

    def note_changes(self, changed: dict[str, Finding]) -> None:
        """Notes parameters and buffers that the task's code has changed: name -> finding."""
        self.changing += changed
        self.findings += changed.values()


def rehearse(subject: Subject, first_step: int) -> Found:
    """Rehearses a run. Collective: every rank.

    Args:
        subject: the run; its state is that of `first_step` steps.
        first_step: steps made so far.

    Raises:
        UserError: on every rank: the task does not keep the protocol (see `tasks.contract`).
    """
    found, error = Found(), None
    hashes: dict[int, list[Hashes]] = {}
    stage = Stage(subject, first_step)
    # This comes first because it decides how micro-batches are computed, here and in the run.
    objections = [reason for reason in gather_objects(stage.objection_to_chunks()) if reason is not None]
    if objections:
        subject.micro_batches.augments_in_chunks = False
    try:
        hashes, found = _perform(stage)
    except TrainerError as own:
        error = own
    except RuntimeError as own:
        if refusal(own) is None:
            raise
        error = _with_its_module(stage, own)
    raise_together(error)
    if objections:
        found.notes.append(
            "the task says augment_in_chunks, but its augment() is called for one micro-batch at a time, because "
            f"{objections[0]}"
        )
    everyone = gather_objects((hashes, found))
    _unite(found, [other for _, other in everyone])
    if not found.findings and subject.engine.zero_stage == 0:
        views = [hashes for hashes, _ in everyone] if subject.alike else [hashes]
        difference = _first_difference(views)
        if any(gather_objects(difference is not None)):
            # Only now time is spent on the cause: each rank searches by itself, then the findings are gathered.
            own_finding = _explain_difference(stage)
            found.findings = _agreed(gather_objects((own_finding, difference)))
    return found


def _with_its_module(stage: Stage, error: RuntimeError) -> UserError | None:
    """The message for an operation that torch has refused, with the module that uses it."""
    for item in stage.items:
        watch = Watch(stage.model)
        try:
            with watch.modules():
                stage.visit(item)
        except RuntimeError as again:
            if refusal(again) is not None and watch.last is not None:
                return refusal(again, watch.last.where)
    return refusal(error)


def refused_on_gpus(stage: Stage) -> list[str]:
    """What torch would refuse on a GPU in this rank's micro-batches, as sentences. Restores everything."""
    watch = Watch(stage.model)
    with generators_kept(stage.subject.device), watch.modules():
        for item in stage.items:
            stage.visit(item)
    stage.put_back()
    return [sentence(operation) for operation in watch.refused]


def _unite(found: Found, everyone: list[Found]) -> None:
    findings = {finding: None for other in everyone for finding in other.findings}
    found.findings = list(findings)
    found.changing = sorted({name for other in everyone for name in other.changing})
    found.flops = everyone[0].flops


def _first_difference(views: list[dict[int, list[Hashes]]]) -> str | None:
    """The first part, as in `Hashes`, in which two results of one micro-batch differ; None if none does."""
    results: dict[int, list[Hashes]] = {}
    for view in views:
        for item, hashes in view.items():
            results.setdefault(item, []).extend(hashes)
    for alternatives in results.values():
        one = alternatives[0]
        for other in alternatives[1:]:
            part = differs(one, other)
            if part is not None:
                return part
    return None


def _agreed(everyone: list[tuple[Finding | None, str | None]]) -> list[Finding]:
    """The causes that ranks have found. If there is none: that the ranks differ from one another."""
    causes = {finding: None for finding, _ in everyone if finding is not None}
    if causes:
        return list(causes)
    part = next(part for _, part in everyone if part is not None)
    if len(everyone) == 1:
        return [
            Finding(
                f"{source_of(part)} gave another result the second time, but not in every attempt",
                "It draws from a source that no seed reaches, or keeps hidden state. Draw from torch's default "
                "generator, which is seeded for each micro-batch, and keep no state.",
            )
        ]
    return [
        Finding(
            f"{source_of(part)} depends on the rank: each rank agrees with itself, but for the same micro-batch ranks "
            "find different numbers",
            "Look for torch.distributed.get_rank(), environment variables, files, host names and the clock. "
            "If there are none, the ranks' devices compute differently.",
        )
    ]


def _perform(stage: Stage) -> tuple[dict[int, list[Hashes]], Found]:
    """This rank's part. Returns the results by number of the micro-batch, and what else it found."""
    ranks, found = stage.subject.ranks, Found()
    results: dict[int, list[Hashes]] = {}
    if not stage.exact:
        turns = [0]
    elif ranks.world_size > 1 and stage.subject.alike:
        turns = [ranks.rank]  # the other orders are on the other ranks
    else:
        turns = [0, 1]
    with generators_kept(stage.subject.device):
        stage.check_augmented()
        found.note_changes(stage.put_back())
        if stage.exact:
            refuse_means(stage, refuse_collectives(stage))
            _probe(stage, found)
        else:
            with torch.no_grad():
                refuse_means(stage, stage.compute(0))
            found.note_changes(stage.put_back())
        for turn in turns:
            order = _order(stage, turn)
            stage.python.stir(turn)
            # Before the second turn the generators are advanced. So a draw from one of them changes the result.
            began = stage.python.take() if turn else stage.before
            elsewhere = turn > 0 and ranks.world_size == 1
            visited = _in_turn(stage, order[:1], elsewhere)
            early = stage.python.take() if len(order) > 1 else began
            visited += _in_turn(stage, order[1:], elsewhere)
            for number, hashes in zip(order, visited):
                results.setdefault(number, []).append(hashes)
            after = stage.python.take()
            found.note_changes(stage.put_back())
            if stage.exact and ranks.world_size > 1:
                # Each rank also computes one micro-batch as another rank of a larger world.
                results[order[0]] += _in_turn(stage, order[:1], elsewhere=True, instead=False)
                found.note_changes(stage.put_back())
            if turn == turns[0]:
                moved = changes(began, after)
                # A value that only the first micro-batch changes is not a counter. It may be a table, made on demand.
                kept = changes(early, after)
                found.kept = [stage.python.name_of(key) for key in kept]
                found.counters = [stage.python.name_of(key) for key in kept if is_number(key, began, after)]
                if stage.exact and not found.findings:
                    finding = moved_values(stage, moved, after)
                    found.findings += [finding] if finding is not None else []
                found.note_changes(stage.put_back())
        if ranks.first:  # one count is enough, and ranks that share a processor need not wait for one another
            found.flops = count(stage)
            found.note_changes(stage.put_back())
    stage.check_what_is_not_the_tasks()
    return results, found


def _order(stage: Stage, turn: int) -> list[int]:
    """The order in which a rank computes the micro-batches: each turn begins with another one."""
    count, items = len(stage.items), stage.items
    order = [(k + turn) % count for k in range(count)]
    # The first two have the same size. Every other size comes twice: it may change state that no other size changes.
    return order + [number for number in order if items[number].samples != items[0].samples]


def _in_turn(stage: Stage, order: list[int], elsewhere: bool, instead: bool = True) -> list[Hashes]:
    """Computes micro-batches. `elsewhere`: as on another rank; if that fails, `instead` as on this one, else none."""
    if elsewhere:
        try:
            with another_rank():
                return [stage.visit(stage.items[number]) for number in order]
        except Exception:  # the task may need the true rank, for example to find a file
            stage.put_back()
        if not instead:
            return []
    return [stage.visit(stage.items[number]) for number in order]


def _probe(stage: Stage, found: Found) -> None:
    if stage.statistics.size:
        stage.python.put_back(stage.before)
        refuse_use_of_running_statistics(stage)
    found.note_changes(stage.put_back())
    written = under_moved_weights(stage, stage.numbers[:2], {n: q for q, n in stage.engine.names.items()})
    stage.model_state.put_back_parameters()
    found.note_changes({name: changed_tensor(stage.model, "parameter", name) for name in written})
    found.note_changes(stage.put_back())


def _explain_difference(stage: Stage) -> Finding | None:
    """The cause of a difference that this rank can find alone; None if its own results agree."""
    with generators_kept(stage.subject.device):
        try:
            return explain(stage)
        finally:
            stage.python.put_back(stage.before)
