"""The search for a learning rate: the same number of trials for every arm that has one (Shallue et al. 2019).

Half of the trials lie evenly, on a logarithmic scale, over a range around a centre; from these on, Optuna's TPE sampler
(Bergstra et al. 2011) proposes. A proposal follows from the trials before it alone, so that a search that was
interrupted goes on as if it had not been. Trials have seeds of their own, which no judged run has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..config.schema import option
from ..errors import UserError
from ..files import write_json
from .arms import run_id

# The seeds of trials. They are so large that no study would declare them for judged runs.
FIRST_SEED = 1_000_003


@dataclass(frozen=True)
class Tuning:
    """`study.tuning`: how learning rates are searched, in the same way for every tuned arm."""

    trials: int = option(9, "learning rates tried in each search", minimum=3)
    seeds: int = option(1, "runs of each of them, whose mean decides", minimum=1)
    spread: float = option(32.0, "rates from centre / spread to centre x spread", above=1)
    metric: str = option("", "<split>/<metric> that decides; without it, that of validation named as study.metric")


@dataclass
class Trial:
    """One learning rate: its runs, and the mean of their metric and loss (worst possible for a run not finite)."""

    lr: float
    ids: list[str]
    values: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether all of its runs have ended."""
        return len(self.values) == len(self.ids)

    @property
    def value(self) -> float | None:
        """The mean of the metric; None if a run was not finite."""
        known = [v for v, _ in self.values.values() if v is not None]
        return math.fsum(known) / len(known) if len(known) == len(self.ids) else None

    @property
    def loss(self) -> float:
        """The mean of the loss, which decides between equals."""
        known = [loss for _, loss in self.values.values() if loss is not None]
        return math.fsum(known) / len(known) if len(known) == len(self.ids) else math.inf


class Search:
    """One search.

    Args:
        name: of its file.
        configure: (learning rate, seed) -> the config of a trial's run.
        centre: of the range.
        tuning: as declared.
        higher_is_better: of the metric.
        folder: where its file is, or will be.
    """

    def __init__(
        self,
        name: str,
        configure: Callable[[float, int], Config],
        centre: float,
        tuning: Tuning,
        higher_is_better: bool,
        folder: Path,
    ) -> None:
        self.name, self._configure, self._centre, self._tuning = name, configure, centre, tuning
        self._higher, self._file = higher_is_better, folder / f"{name}.json"
        self.trials: list[Trial] = []
        self.configs: dict[str, Config] = {}
        try:
            # What was proposed stands, whatever another version of Optuna would propose.
            for rate in json.loads(self._file.read_text(encoding="utf-8"))["proposed"]:
                self._begin(float(rate))
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self._file} is damaged. Remove it: finished runs are kept, the search is made again."
            ) from None

    def next_runs(self) -> list[str]:
        """The ids of the runs that the search waits for; their configs are in `configs`."""
        for trial in self.trials:
            if not trial.done:
                return [i for i in trial.ids if i not in trial.values]
        if len(self.trials) == self._tuning.trials:
            return []
        self._begin(self._propose())
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, {"proposed": [trial.lr for trial in self.trials]})
        return self.next_runs()

    def record(self) -> dict[str, Any]:
        """The search in plain values: {"name", "trials": [{"lr", "value", "loss", "runs"}], "best"}."""
        trials = [{"lr": t.lr, "value": t.value, "loss": _or_none(t.loss), "runs": t.ids} for t in self.trials]
        return {"name": self.name, "trials": trials, "best": self.best}

    def take(self, run: str, value: float | None, loss: float | None) -> None:
        """The metric and loss of a run, None where it stopped being finite; of other runs, nothing happens."""
        for trial in self.trials:
            if run in trial.ids:
                trial.values[run] = (value, loss)

    @property
    def best(self) -> float | None:
        """The best learning rate; None before the search has ended.

        Where no trial was finite it is the lowest rate: that its runs are not finite either is a result.
        """
        done = [trial for trial in self.trials if trial.done]
        if len(done) < self._tuning.trials:
            return None
        found = best_of(done, self._higher)
        return min(trial.lr for trial in done) if found is None else found.lr

    def _begin(self, lr: float) -> None:
        configs = [self._configure(lr, FIRST_SEED + i) for i in range(self._tuning.seeds)]
        trial = Trial(lr, [run_id(config) for config in configs])
        self.trials.append(trial)
        self.configs |= dict(zip(trial.ids, configs))

    def _propose(self) -> float:
        low, high = self._centre / self._tuning.spread, self._centre * self._tuning.spread
        first, k = first_trials(self._tuning.trials), len(self.trials)
        evenly = low * (high / low) ** (k / (first - 1))
        rate = evenly if k < first else _optuna(self.trials, low, high, self._higher)
        return float(f"{rate:.3g}")


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def first_trials(trials: int) -> int:
    """How many trials lie evenly over the range: an odd number, so that the centre is one of them."""
    return max(3, trials // 2 | 1)


def best_of(trials: list[Trial], higher_is_better: bool) -> Trial | None:
    """The best finite trial; among equals the one with the lowest loss, then the lowest rate."""
    sign = -1.0 if higher_is_better else 1.0
    finite = [(sign * t.value, t.loss, t.lr, t) for t in trials if t.value is not None]
    return min(finite, key=lambda entry: entry[:3])[3] if finite else None


def _optuna(trials: list[Trial], low: float, high: float, higher_is_better: bool) -> float:
    try:
        import optuna
    except ImportError:
        raise UserError(
            'Searching learning rates needs the package optuna: pip install "strong-scaling-trainer[study]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=len(trials), n_startup_trials=0)
    study = optuna.create_study(direction="maximize" if higher_is_better else "minimize", sampler=sampler)
    rates: dict[str, Any] = {"lr": optuna.distributions.FloatDistribution(low, high, log=True)}
    known = [t.value for t in trials if t.value is not None]
    if not known:  # nothing to learn from: as the sampler would, with no trial at all
        return float(study.ask(rates).params["lr"])
    worst = min(known) if higher_is_better else max(known)
    for trial in trials:
        value = worst if trial.value is None else trial.value
        lr = min(max(trial.lr, low), high)  # rounding may have led over the edge
        study.add_trial(optuna.trial.create_trial(params={"lr": lr}, distributions=rates, value=value))
    return float(study.ask(rates).params["lr"])
