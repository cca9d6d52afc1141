"""What a study is made of: its runs, and the searches for their settings."""

from __future__ import annotations

from dataclasses import dataclass

from .arms import SEQUENTIAL, Budget, Place


@dataclass(frozen=True)
class Cell:
    """One arm, budget, W, seed and variant; cells with the same id are the same run.

    Attributes:
        id: None for a run whose settings are to be found first.
    """

    arm: str
    budget: Budget
    world_size: int
    seed: int
    variant: str
    id: str | None

    @property
    def place(self) -> Place:
        """Its place in the study, without the seed."""
        return Place(self.variant, self.arm, self.budget, self.world_size)


@dataclass(frozen=True)
class Repeat:
    """A sequential run of a split that has several seeds: see `splits`.

    Attributes:
        split: of the data, by its split_seed.
        seed: of the run.
        id: of the run. The first run of each split is a judged one.
    """

    split: int
    seed: int
    id: str

    @property
    def place(self) -> Place:
        """Where it stands: with the sequential runs of the base."""
        return Place("", SEQUENTIAL, "epochs", 1)


@dataclass(frozen=True)
class SearchPlan:
    """A search for the settings of one judged run.

    Attributes:
        name: of the search, unique in the study.
        place: its trials are runs of this place.
        centre: the middle of its learning rates.
        seed: of the judged run that it is made for.
    """

    name: str
    place: Place
    centre: float
    seed: int
