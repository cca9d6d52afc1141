"""The results of a micro-batch, as hashes, and the messages for differences."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Finding(NamedTuple):
    """Something that is not exact: what, as a clause after "because", and the remedy, as a sentence."""

    what: str
    remedy: str


# The compared parts of a micro-batch, in the order in which they are computed: name -> hash.
Hashes = dict[str, int]
# The calls of modules, in the order in which they end: (name, hash of the inputs, hash of the outputs).
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
            "After each step every rank takes over rank 0's buffer, and this one is saved. Only the running "
            "statistics of BatchNorm and InstanceNorm layers are the same at every number of ranks.",
        )
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) and owner.max_norm is not None:
        return Finding(
            f"the parameter {name} changes in the forward: {type(owner).__name__} with max_norm rescales the rows "
            "that it looks up, and each rank looks up other rows",
            "Leave max_norm out, and scale the embedded vectors in the forward instead. As it is, every rank takes "
            "over rank 0's parameter after each step.",
        )
    return Finding(
        f"the parameter {name} changes in the forward, before the gradients of all micro-batches are there",
        "Leave the change to the optimizer, or compute with a changed copy. As it is, every rank takes over rank 0's "
        "parameter after each step.",
    )
