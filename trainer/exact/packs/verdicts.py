"""What a trial of a pack finds: the results of single micro-batches and of the pack, compared bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks.hashes import hash64


class RefusedError(Exception):
    """This pack cannot be computed as one.

    Attributes:
        parameters: of the function that refuses. Their module may be computed one micro-batch at a time instead.
        once: whether only this pack refuses. The next one may be possible.
        untried: whether the pack calls other functions than those that were compared. Then it has to be compared first.
    """

    def __init__(self, what: str, parameters: Sequence[int] = (), once: bool = False, *, untried: bool = False) -> None:
        super().__init__(what)
        # What has not been tried says nothing about the next pack.
        self.parameters, self.once, self.untried = tuple(parameters), once or untried, untried


class Packed(NamedTuple):
    """What a pack found besides gradients.

    Attributes:
        losses: (g,) summed losses.
        statistics: (g, size) of normalisation layers.
        form: names the functions that were called, in their order.
    """

    losses: Tensor
    statistics: Tensor
    form: int = 0


@dataclass
class Verdict:
    """What is known of packs of one shape.

    Attributes:
        refusal: why there are none; None if their bits are those of single micro-batches.
        random: whether a micro-batch draws random numbers.
        trials: form, see `Packed` -> steps in which they were. A task may call other functions from some step on.
        step: the last of these.
    """

    refusal: str | None
    random: bool = True
    trials: dict[int, int] = field(default_factory=dict)
    step: int = -1


@dataclass
class HashedSums:
    """A sink that keeps a hash of each gradient: `found[place][k]`, 0 for one that is not there."""

    g: int
    found: dict[int, list[Tensor | None]] = field(default_factory=dict)

    def take(self, place: int, rows: Tensor, present: list[bool] | None) -> None:
        """As `leaves.Sink`."""
        self.found[place] = [hash64([r]) if present is None or present[k] else None for k, r in enumerate(rows)]


def told(error: Exception, model: nn.Module) -> str:
    """An error of a forward or loss as one line, with the innermost module in which it was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    place, frame = "", error.__traceback__
    while frame is not None:  # from the outermost call to the innermost, so that the last module found is the innermost
        module = frame.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and names.get(id(module)):
            place = f" in {names[id(module)]} ({type(module).__name__})"
        frame = frame.tb_next
    first = str(error).splitlines()[0] if str(error) else "without a message"
    return f"{type(error).__name__}{place}: {first}"


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that there was not enough memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class Single(NamedTuple):
    """Hashes of what a micro-batch computed alone found; None where there is nothing.

    Attributes:
        loss, statistics, gradients: as in a record.
        random: whether it drew random numbers.
    """

    loss: Tensor
    statistics: Tensor | None
    gradients: list[Tensor | None]
    random: bool


def difference(
    singles: list[Single], packed: Packed, sums: HashedSums, owners: Mapping[int, Sequence[str]]
) -> str | None:
    """The first thing that differs between micro-batches computed singly and as a pack; None if nothing does.

    Args:
        singles: of the pack's micro-batches.
        packed, sums: of the pack.
        owners: place of a parameter -> the modules that have it.
    """
    g = len(singles)
    for k, single in enumerate(singles):
        if not torch.equal(single.loss, hash64([packed.losses[k]])):
            return f"another loss in packs of {g}"
        if single.statistics is not None and not torch.equal(single.statistics, hash64([packed.statistics[k]])):
            return f"other statistics in packs of {g}"
        for place, expected in enumerate(single.gradients):
            found = sums.found.get(place, [None] * g)[k]
            if (expected is None) != (found is None) or (
                expected is not None and found is not None and not torch.equal(expected, found)
            ):
                owner = (owners.get(place) or ["?"])[0]
                return f"other gradients in packs of {g}, first of {owner or 'the model'}"
    return None
