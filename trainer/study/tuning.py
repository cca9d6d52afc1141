"""The search for a learning rate, a warm-up and a momentum: the same for every tuned arm (Shallue et al. 2019).

One search is one draw: another one, with other seeds, finds other settings. So an arm is searched as often as it is
judged. Each search gives the settings of one judged run, and what searches add to the spread is part of what is judged.

A search tries all combinations of rates, warm-ups and momenta. The rates lie evenly on a logarithmic scale, at most a
factor of two apart. All of them are moved by a random part of this factor. Otherwise the best rate of one arm, such as
the base's, could lie on a point more often than another's.

Successive halving (Karnin, Koren and Somekh 2013; Jamieson and Talwalkar 2016) decides which settings get more runs:
every setting gets one seed, the best third of them a second one, the best third of those a third. A run is never
shortened, because a schedule that ends earlier has another best rate. Everything follows from the declaration and the
results of the runs, so an interrupted search continues as if it had not been interrupted.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config.keys import Config
from ..config.schema import option
from .arms import Settings, run_id

# Trials have seeds from here on. They are so large that no study would declare them for judged runs.
FIRST_SEED = 1_000_003
_SEEDS = 2**30


@dataclass(frozen=True)
class Tuning:
    """`study.tuning`: how settings are searched, in the same way for every tuned arm."""

    searches: int = option(
        12, "independent searches of each tuned arm and W; each gives the settings of one judged run", minimum=5
    )
    spread: float = option(32.0, "rates from centre / spread to centre x spread", above=1)
    spacing: float = option(2.0, "the largest factor between neighbouring rates", above=1, maximum=2)
    warmup_epochs: list[float] = option([1.0, 5.0], "warm-ups to try with each rate; [] for the base's own")
    momentum: list[float] = option(
        [0.7, 0.9], "momenta (of Adam and LAMB the first beta) to try with each rate; [] for the base's own"
    )
    seeds: int = option(3, "seeds of a setting that comes to the end of its search", minimum=1)
    reduction: int = option(3, "one of this many settings, the best, gets the next seed; 1 for no selection", minimum=1)
    metric: str = option("", "<split>/<metric> that decides; without it, that of validation named as study.metric")


def settings_of(tuning: Tuning, centre: float, name: str) -> list[Settings]:
    """All settings that a search tries, from the lowest rate to the highest.

    Args:
        tuning: as declared.
        centre: of the range of rates.
        name: of the search; the random shift of its rates follows from it.
    """
    octaves = 2 * math.log(tuning.spread)
    count = math.ceil(octaves / math.log(tuning.spacing) - 1e-9)  # ten octaves of a factor of two are ten, not eleven
    shift = _hash(name) / 2**64
    rates = [float(f"{centre / tuning.spread * math.exp(octaves * (k + shift) / count):.4g}") for k in range(count)]
    warmups: Sequence[float | None] = tuning.warmup_epochs or [None]
    momenta: Sequence[float | None] = tuning.momentum or [None]
    return [Settings(*values) for values in itertools.product(rates, warmups, momenta)]


def runs_of_search(tuning: Tuning) -> int:
    """How many runs one search makes."""
    settings = len(settings_of(tuning, 1.0, ""))
    return sum(_rungs(settings, tuning))


def _rungs(settings: int, tuning: Tuning) -> list[int]:
    """How many settings get their first, second, ... seed."""
    rungs = [settings]
    for _ in range(tuning.seeds - 1):
        rungs.append(-(-rungs[-1] // tuning.reduction))
    return rungs


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


@dataclass
class Trial:
    """One setting: its runs so far, one per seed, and their (metric, loss); None where a run is not finite."""

    settings: Settings
    ids: list[str] = field(default_factory=list)
    values: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The mean of the metric; None if a run was not finite, or is missing."""
        known = [v for v, _ in self.values.values() if v is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(self.ids) else None

    @property
    def loss(self) -> float:
        """The mean of the loss. It decides between settings of equal metric."""
        known = [loss for _, loss in self.values.values() if loss is not None]
        return math.fsum(known) / len(known) if known and len(known) == len(self.ids) else math.inf


class Search:
    """One search.

    Args:
        name: of the search; its seeds and its rates follow from it.
        configure: (settings, seed) -> the config of a trial's run.
        centre: of the range of rates.
        tuning: as declared.
        higher_is_better: of the metric.

    Attributes:
        configs: run id -> config, of the runs that it has asked for.
    """

    def __init__(
        self,
        name: str,
        configure: Callable[[Settings, int], Config],
        centre: float,
        tuning: Tuning,
        higher_is_better: bool,
    ) -> None:
        self.name, self._configure, self._tuning, self._higher = name, configure, tuning, higher_is_better
        self.trials = [Trial(settings) for settings in settings_of(tuning, centre, name)]
        self.configs: dict[str, Config] = {}
        self._rungs = _rungs(len(self.trials), tuning)
        self._first_seed = FIRST_SEED + _hash(name) % _SEEDS
        # The first climb gives every setting its first seed.
        self._rung = -1
        self._left = self.trials
        self._climb()

    def next_runs(self) -> list[str]:
        """The ids of all runs that the search waits for; their configs are in `configs`. Empty when it has ended."""
        while not (missing := [i for trial in self._left for i in trial.ids if i not in trial.values]):
            if self._rung == len(self._rungs) - 1:
                return []
            self._left = sorted(self._left, key=self._rank)[: self._rungs[self._rung + 1]]
            self._climb()
        return missing

    def take(self, run: str, value: float | None, loss: float | None) -> None:
        """Takes the metric and loss of a run, None where it stopped being finite. Ignores runs of other searches."""
        for trial in self.trials:
            if run in trial.ids:
                trial.values[run] = (value, loss)

    @property
    def best(self) -> Settings | None:
        """The best settings; None before the search has ended. Where no run was finite, the lowest rate."""
        return None if self.next_runs() else min(self._left, key=self._rank).settings

    def left(self) -> int:
        """How many of its runs have no result yet, with those that it has not asked for."""
        return sum(self._rungs) - sum(len(trial.values) for trial in self.trials)

    def record(self) -> dict[str, Any]:
        """The search in plain values: {"name", "trials": [settings and "value", "loss", "runs"], "best"}."""
        trials = [
            {**asdict(t.settings), "value": t.value, "loss": t.loss if math.isfinite(t.loss) else None, "runs": t.ids}
            for t in self.trials
        ]
        return {"name": self.name, "trials": trials, "best": asdict(self.best) if self.best else None}

    def _climb(self) -> None:
        """Gives every setting that is left one more seed."""
        self._rung += 1
        for trial in self._left:
            config = self._configure(trial.settings, self._first_seed + self._rung)
            trial.ids.append(run_id(config))
            self.configs[trial.ids[-1]] = config

    def _rank(self, trial: Trial) -> tuple[float, float, float]:
        """A key to sort by, the best first: by the metric, then the loss, then the lowest rate."""
        value = trial.value
        worth = math.inf if value is None else (-value if self._higher else value)
        return worth, trial.loss, trial.settings.lr


def edges_of(trials: Sequence[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    """The edges of its range at which a search ended, in words. Something better may lie beyond each."""
    found = []
    for key, name in (("lr", "rate"), ("warmup_epochs", "warm-up"), ("momentum", "momentum")):
        tried = {trial[key] for trial in trials} - {None}
        if len(tried) > 1:
            short, long = ("shortest", "longest") if key == "warmup_epochs" else ("lowest", "highest")
            found += [f"{word} {name}" for word, end in ((short, min(tried)), (long, max(tried))) if best[key] == end]
    return found
