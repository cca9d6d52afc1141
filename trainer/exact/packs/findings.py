"""What the trials of a rank's packs have found out. Later packs rely on it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

Key = tuple[Any, ...]
ALONE = -1  # in place of a rule's number: computed one micro-batch at a time


class Way(NamedTuple):
    """What trials have found out about a call.

    Attributes:
        together: whether the function is called once for all micro-batches.
        scaled: places of numbers that stand for all samples.
        numbers: these numbers.
    """

    together: bool
    scaled: frozenset[int]
    numbers: tuple[Any, ...]


@dataclass
class Findings:
    """What trials add to, and packs follow.

    Attributes:
        sites: the key of a layer -> which of its rules is taken; the key of a layer or function that is computed one
            micro-batch at a time -> ALONE.
        checked: keys of layers and functions that trials have compared.
        calls: what is known about each call, named by the form that it makes, see `pack.Pack`.
        outside: arguments of calls in trials that packs have not seen being made, by their ids.
    """

    sites: dict[Key, int] = field(default_factory=dict)
    checked: set[Key] = field(default_factory=set)
    calls: dict[int, Way] = field(default_factory=dict)
    outside: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)

    def alone(self) -> list[Key]:
        """Layers and functions that are computed one micro-batch at a time."""
        return [key for key, chosen in self.sites.items() if chosen == ALONE]
