"""Why micro-batches differ, if a rehearsal has found that they do: finds the cause and names it.

Each rank computes all of this by itself, and restores the same state before each attempt. The time matters little: it
is spent only if something differs, and the run would otherwise be called exact by mistake.
"""

from __future__ import annotations

from torch import nn

from .python_state import NUMPYS, PYTHONS, Key, State, changes, is_generator
from .results import Calls, Finding, differs, source_of
from .stage import Stage, another_rank

# At most this many values are tried one by one.
_MOST_CAUSES = 16


def explain(stage: Stage) -> Finding | None:
    """The cause of a difference that this rank can find alone; None if its own results agree."""
    # In this order: without repeatable results, the later searches could blame anything.
    return _unseen(stage) or _state(stage) or _rank(stage)


def _unseen(stage: Stage) -> Finding | None:
    """Random numbers that are not seeded, or hidden state."""
    for number in stage.numbers:
        (one, calls), (other, again) = stage.from_the_start(number), stage.from_the_start(number)
        part = differs(one, other)
        if part is not None:
            return Finding(
                f"{_culprit(stage.model, part, calls, again)} gives another result when the same micro-batch "
                "is computed again from the same state and seed",
                "It draws from a source that no seed reaches, keeps hidden state (in a closure, a cache, "
                "another package), or uses a kernel that is not deterministic. Draw from torch's default "
                "generator, which is seeded for each micro-batch, and keep no state.",
            )
    return None


def _state(stage: Stage) -> Finding | None:
    """State in Python that one micro-batch changes and a later one depends on."""
    for number in stage.numbers:
        # The others, then this one: it may change state that only micro-batches of its kind change.
        before = [*(n for n in stage.numbers if n != number), number]
        alone, calls = stage.from_the_start(number)
        later, calls_later = stage.from_the_start(*before, number, stirred=True)
        part = differs(alone, later)
        if part is None:
            continue
        source = _culprit(stage.model, part, calls, calls_later)
        evolved = _evolved(stage, before)
        # In each attempt one value stays as the other micro-batches left it, and all else is restored. If the result
        # then differs, this value is the cause.
        for key in changes(stage.before, evolved)[:_MOST_CAUSES]:
            _evolved(stage, before)
            if differs(alone, stage.from_the_start(number, leave=key)[0]) is not None:
                return finding_of(stage, key, source, evolved)
        return Finding(
            f"{source} gives another result after other micro-batches than before them: the task or the model keeps "
            "state",
            _NO_STATE,
        )
    return None


def _evolved(stage: Stage, numbers: list[int]) -> State:
    """Computes some micro-batches, and draws from every generator. Restores nothing. Returns the state then."""
    stage.from_the_start(*numbers)
    stage.python.stir(1)
    return stage.python.take()


def finding_of(stage: Stage, key: Key, source: str, evolved: State) -> Finding:
    """The finding for a value in Python that a micro-batch changes and `source` depends on."""
    called = stage.python.name_of(key)
    if key in (PYTHONS, NUMPYS):
        return Finding(
            f"{source} draws from {called}, which the trainer doesn't seed",
            "Draw from torch's default generator (torch.rand and the like), which is seeded for each micro-batch.",
        )
    if is_generator(key, stage.before, evolved):
        return Finding(
            f"{source} draws from a generator of its own ({called}), which continues from one micro-batch to the next",
            "Draw from torch's default generator (torch.rand and the like), which is seeded for each micro-batch.",
        )
    return Finding(
        f"{called} changes from one micro-batch to the next, and {source} depends on it",
        _NO_STATE,
    )


def _rank(stage: Stage) -> Finding | None:
    """Numbers that would differ on another rank."""
    here, calls = stage.from_the_start(0)
    try:
        with another_rank():
            there, calls_there = stage.from_the_start(0)
    except Exception:  # the task may need the true rank, for example to find a file
        return None
    part = differs(here, there)
    if part is None:
        return None
    source = _culprit(stage.model, part, calls, calls_there)
    return Finding(
        f"{source} depends on the rank: torch.distributed.get_rank(), get_world_size() or the variables RANK and "
        "WORLD_SIZE change its numbers",
        "Numbers may depend only on samples, parameters, seed and progress.",
    )


_NO_STATE = (
    "Each rank computes other micro-batches, so state between them depends on the number of ranks. For annealing, use "
    "the keyword `progress` in forward, loss or augment (step, epoch, total_steps, fraction): it is the same on every "
    "rank."
)


def _culprit(model: nn.Module, part: str, one: Calls, other: Calls) -> str:
    """The innermost module with equal inputs and different outputs, else the task's function that made a part."""
    # Calls are in the order in which they end, so an inner module comes before the module that contains it.
    if not part.startswith("data"):
        for (name, inputs, outputs), (name_there, inputs_there, outputs_there) in zip(one, other):
            if name != name_there:
                break  # the two forwards called different modules, so the rest cannot be compared
            if inputs == inputs_there and outputs != outputs_there:
                module = model.get_submodule(name)
                return (
                    f"the module {name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
                )
    return source_of(part)
