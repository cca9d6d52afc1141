"""The rehearsal: before its first step a run shows that its micro-batches do not depend on who computes them, or when.

The same bits at every number of ranks need one thing of a task: a micro-batch's loss, gradient and statistics follow
from its samples, its seed and the parameters, and from nothing else. So a few micro-batches of this very run, one of
each size, are computed twice, in another order the second time (where there are several ranks: once on each, each
beginning with another one), and every bit is compared. What changes in between, or with the order or the rank, is
looked for and named. Afterwards everything is as it was: parameters, buffers, random numbers and Python's state.

What a rehearsal cannot see: what begins later (a penalty that sets in at step 1,000), and with one rank what depends
on the rank through anything but torch.distributed. The audit looks for that while the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import TrainerError
from ..ranks.collectives import gather_objects, raise_together
from .causes import explain
from .probes import moved_values, refuse_collectives, refuse_use_of_running_statistics, under_moved_weights
from .python_state import changes, is_number
from .results import Finding, Hashes, changed_tensor, differs, source_of
from .stage import Stage, Subject, another_rank, generators_kept
from .sums import refuse_means


@dataclass
class Found:
    """What a rehearsal found, the same on every rank.

    Attributes:
        findings: why the run is not bitwise; empty if nothing differed.
        notes: for the person who starts the run.
        changing: parameters and buffers that the task's forward changes by itself.
        kept: what micro-batches change of Python's state, whether or not anything depends on it.
        counters: the numbers among it.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changing: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)

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
    # First, as it decides how the micro-batches are computed, here and later.
    objections = [reason for reason in gather_objects(stage.objection_to_chunks()) if reason is not None]
    if objections:
        subject.micro_batches.augments_in_chunks = False
    try:
        hashes, found = _perform(stage)
    except TrainerError as own:
        error = own
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
            # Only now is time spent on causes: on every rank by itself, then together.
            own_finding = _explain_difference(stage)
            found.findings = _agreed(gather_objects((own_finding, difference)))
    return found


def _unite(found: Found, everyone: list[Found]) -> None:
    findings = {finding: None for other in everyone for finding in other.findings}
    found.findings = list(findings)
    found.changing = sorted({name for other in everyone for name in other.changing})


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
    """The findings of all ranks: those with a cause, else that ranks differ from one another."""
    causes = {finding: None for finding, _ in everyone if finding is not None}
    if causes:
        return list(causes)
    part = next(part for _, part in everyone if part is not None)
    if len(everyone) == 1:
        return [
            Finding(
                f"{source_of(part)} gave another result the second time, though not each time that it was tried",
                "It draws from a source that no seed reaches, or keeps state out of sight. Draw from torch's default "
                "generator, which is seeded for each micro-batch, and keep no state.",
            )
        ]
    return [
        Finding(
            f"{source_of(part)} depends on the rank: each rank agrees with itself, but for the same micro-batch ranks "
            "find different numbers",
            "Look for torch.distributed.get_rank(), variables of the environment, files, names of hosts and the clock. "
            "If there are none, the ranks' devices compute differently.",
        )
    ]


def _perform(stage: Stage) -> tuple[dict[int, list[Hashes]], Found]:
    """This rank's part. Returns number of the micro-batch -> its results, and what else it found."""
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
                # Each rank sees itself as the next one of one more, besides.
                results[order[0]] += _in_turn(stage, order[:1], elsewhere=True, instead=False)
                found.note_changes(stage.put_back())
            if turn == turns[0]:
                moved = changes(began, after)
                # What only the first micro-batch changes is made once and kept, as a table of constants is.
                kept = changes(early, after)
                found.kept = [stage.python.name_of(key) for key in kept]
                found.counters = [stage.python.name_of(key) for key in kept if is_number(key, began, after)]
                if stage.exact and not found.findings:
                    finding = moved_values(stage, moved, after)
                    found.findings += [finding] if finding is not None else []
                found.note_changes(stage.put_back())
    stage.check_what_is_not_the_tasks()
    return results, found


def _order(stage: Stage, turn: int) -> list[int]:
    """In which order a rank computes the micro-batches: each turn begins with another one."""
    count, items = len(stage.items), stage.items
    order = [(k + turn) % count for k in range(count)]
    # Of the first two sizes are alike. What only another size counts or draws shows when it comes again.
    return order + [number for number in order if items[number].samples != items[0].samples]


def _in_turn(stage: Stage, order: list[int], elsewhere: bool, instead: bool = True) -> list[Hashes]:
    """Computes some micro-batches; `elsewhere`, as on another rank, or as on this one `instead` if that fails."""
    if elsewhere:
        try:
            with another_rank():
                return [stage.visit(stage.items[number]) for number in order]
        except Exception:  # it may need the rank for something else
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
    """The cause of a difference that this rank sees by itself; None if it agrees with itself."""
    with generators_kept(stage.subject.device):
        try:
            return explain(stage)
        finally:
            stage.python.put_back(stage.before)
