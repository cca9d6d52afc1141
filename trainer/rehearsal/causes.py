"""Why micro-batches differ, when a rehearsal has found that they do: the cause is looked for, and named.

Everything here is computed by one rank alone, from a state that is put back before each attempt. Time matters little:
it is spent only where a run would have been called exact wrongly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from ..exact.hashes import hash_each
from .python_state import NUMPYS, PYTHONS, Key, PythonState, State, changes, is_generator

# Values that are tried one by one.
_MOST_CAUSES = 16


class Finding(NamedTuple):
    """Something that is not exact: what, as a clause after "because"; and what to do, as a sentence."""

    what: str
    remedy: str


# What is compared of a micro-batch, in the order in which it comes to be: name -> hash.
Hashes = dict[str, int]
# Of each call of a module, in the order in which calls end: (name, hash of the inputs, hash of the outputs).
Calls = list[tuple[str, int, int]]


def differs(one: Hashes, other: Hashes) -> str | None:
    """The first part in which two results of one micro-batch differ; None if they are the same."""
    return next((name for name in [*one, *other] if one.get(name) != other.get(name)), None)


def source_of(part: str) -> str:
    """The function of the task that makes a part of `Hashes`."""
    kind, _, name = part.partition(" ")
    if kind == "data":
        return "augment()"
    if kind == "output":
        return "forward()"
    if kind == "gradient":
        return f"the gradient of {name}"
    return {"loss": "loss()", "statistics": "a normalisation layer's statistics"}[kind]


def changed_tensor(model: nn.Module, kind: str, name: str) -> Finding:
    """The finding for a "parameter" or "buffer" that a task's forward changes by itself."""
    if kind == "buffer":
        return Finding(
            f"the model's buffer {name} changes in its forward, so micro-batches depend on one another",
            "After each step every rank takes over rank 0's, which is saved. Of such buffers only the running "
            "statistics of BatchNorm and InstanceNorm layers are the same at every number of ranks.",
        )
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.max_norm is not None:
        return Finding(
            f"the parameter {name} changes in the forward: {type(owner).__name__} with max_norm rescales the rows "
            "that it looks up, and each rank looks up others",
            "Leave max_norm out, and scale the embedded vectors in the forward instead. As it is, every rank takes "
            "over rank 0's after each step.",
        )
    return Finding(
        f"the parameter {name} changes in the forward, before the gradients of all micro-batches are there",
        "Leave it to the optimizer, or compute with a changed copy. As it is, every rank takes over rank 0's after "
        "each step.",
    )


class Stage(Protocol):
    """What computes micro-batches for the search: `rehearsal` has one."""

    python: PythonState
    before: State

    @property
    def items(self) -> range:
        """The numbers of the micro-batches."""
        ...

    @property
    def model(self) -> nn.Module:
        """Whose modules may be the cause."""
        ...

    def from_the_start(self, *numbers: int, leave: Key | None = None, stirred: bool = False) -> tuple[Hashes, Calls]:
        """The last of some micro-batches, computed in turn from the state before the rehearsal, but for `leave`.

        With `stirred`, generators are advanced before the last one.
        """
        ...


def explain(stage: Stage) -> Finding | None:
    """The cause of a difference, as far as this rank sees one; None if it agrees with itself."""
    return _unseen(stage) or _state(stage) or _rank(stage)


def _unseen(stage: Stage) -> Finding | None:
    """Randomness that no seed reaches, or state that is out of sight."""
    for number in stage.items:
        (one, calls), (other, again) = stage.from_the_start(number), stage.from_the_start(number)
        part = differs(one, other)
        if part is not None:
            return Finding(
                f"{_culprit(stage.model, part, calls, again)} gives another result when the same micro-batch "
                "is computed again from the same state and seed",
                "It draws from a source that no seed reaches, keeps state out of sight (in a closure, a cache, "
                "another package), or uses a kernel that is not deterministic. Draw from torch's default "
                "generator, which is seeded for each micro-batch, and keep no state.",
            )
    return None


def _state(stage: Stage) -> Finding | None:
    """State in Python that a micro-batch changes and a later one depends on."""
    for number in stage.items:
        # Itself among them: what it counts or draws may be its own affair.
        before = [*(n for n in stage.items if n != number), number]
        alone, calls = stage.from_the_start(number)
        later, calls_later = stage.from_the_start(*before, number, stirred=True)
        part = differs(alone, later)
        if part is None:
            continue
        source = _culprit(stage.model, part, calls, calls_later)
        evolved = _evolved(stage, before)
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
    """Computes some micro-batches, draws from every generator, and leaves it at that. Returns the state now."""
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
            f"{source} draws from a generator of its own ({called}), which runs on from one micro-batch to the next",
            "Draw from torch's default generator (torch.rand and the like), which is seeded for each micro-batch.",
        )
    return Finding(
        f"{called} changes from one micro-batch to the next, and {source} depends on it",
        _NO_STATE,
    )


def _rank(stage: Stage) -> Finding | None:
    """Numbers that would be others on another rank."""
    here, calls = stage.from_the_start(0)
    try:
        with another_rank():
            there, calls_there = stage.from_the_start(0)
    except Exception:  # as in the rehearsal
        return None
    part = differs(here, there)
    if part is None:
        return None
    source = _culprit(stage.model, part, calls, calls_there)
    return Finding(
        f"{source} depends on the rank: torch.distributed.get_rank(), get_world_size() or the variables RANK and "
        "WORLD_SIZE change its numbers",
        "Numbers may depend on samples, parameters, seed and progress alone.",
    )


_NO_STATE = (
    "Each rank computes other micro-batches, so state between them depends on the number of ranks. For annealing, take "
    "the keyword `progress` in forward, loss or augment (step, epoch, total_steps, fraction): it is the same on every "
    "rank."
)


def _culprit(model: nn.Module, part: str, one: Calls, other: Calls) -> str:
    """The innermost module with equal inputs and different outputs, else the task's function that made a part."""
    if not part.startswith("data"):
        for (name, inputs, outputs), (name_there, inputs_there, outputs_there) in zip(one, other):
            if name != name_there:
                break  # other modules were called: nothing can be said of them
            if inputs == inputs_there and outputs != outputs_there:
                module = model.get_submodule(name)
                return (
                    f"the module {name} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
                )
    return source_of(part)


@contextlib.contextmanager
def another_rank() -> Iterator[None]:
    """What asks torch.distributed or the environment is told that this is the next rank, of one more than there are."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank, dist.get_world_size
    next_rank, more = rank() + 1, world_size() + 1
    variables = {"RANK": str(next_rank), "LOCAL_RANK": str(next_rank), "WORLD_SIZE": str(more)}
    before = {name: os.environ.get(name) for name in variables}
    dist.get_rank, dist.get_world_size = lambda group=None: next_rank, lambda group=None: more
    os.environ.update(variables)
    try:
        yield
    finally:
        dist.get_rank, dist.get_world_size = rank, world_size
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def watched(model: nn.Module, calls: Calls | None) -> Iterator[None]:
    """Notes every call of the model's modules in `calls`, unless that is None."""
    if calls is None:
        yield
        return

    def hashed(value: object) -> int:
        return hash(tuple(sorted(hash_each(dict(_tensors_in(value))).items())))

    handles = [
        module.register_forward_hook(
            lambda _, inputs, named, outputs, name=name: calls.append((name, hashed([inputs, named]), hashed(outputs))),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_in(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors_in(item, f"{path}.{number}")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _tensors_in(item, f"{path}.{name}")
