"""Optuna's study of a search, in a journal on disk: what was tried, what came out, what is tried next."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .declaration import Pruner, Search
from .space import Parameter, Space

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal.log"
_NAME = "search"
State = Literal["complete", "pruned", "failed"]


class Ledger:
    """The trials of a search. Only one process has it open at a time.

    Args:
        folder: of the search.
        search: the block.
        space: what is searched.
        values: of the config. Its own point is tried first.
        mode: "min" or "max" of the metric.
    """

    def __init__(self, folder: Path, search: Search, space: Space, values: Mapping[str, Any], mode: str) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._search, self._space, self._first = search, space, space.own_point(values)
        file = folder / JOURNAL
        _mend(file)
        self._study = optuna.create_study(
            study_name=_NAME,
            storage=JournalStorage(JournalFileBackend(str(file))),
            direction="maximize" if mode == "max" else "minimize",
            pruner=_pruner(search.pruner),
            load_if_exists=True,
        )
        self._open: dict[int, optuna.trial.Trial] = {}
        self._reached: dict[int, int] = {}  # trial -> the last epoch that it had reported when it was stopped

    @property
    def study(self) -> optuna.Study:
        """Optuna's study."""
        return self._study

    @property
    def used_s(self) -> float:
        """Seconds that earlier calls have spent on trials."""
        return float(self._study.user_attrs.get("used_s", 0.0))

    def spend(self, used_s: float) -> None:
        """Notes how many seconds were spent on trials so far."""
        self._study.set_user_attr("used_s", used_s)

    def count(self) -> int:
        """How many trials were begun."""
        return len(self._study.get_trials(deepcopy=False, states=self._begun()))

    def unfinished(self) -> list[tuple[int, dict[str, Any]]]:
        """(number, point) of the trials that were under way when an earlier call was stopped. They are made again."""
        import optuna

        found = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        points = []
        for trial in found:
            # A trial that was stopped while its values were drawn has only some of them. The others are drawn now.
            self._study.sampler = self._sampler(trial.number)
            self._reached[trial.number] = trial.last_step or 0
            self._open[trial.number] = optuna.trial.Trial(self._study, trial._trial_id)
            points.append((trial.number, self._point(self._open[trial.number])))
        return points

    def ask(self) -> tuple[int, dict[str, Any]]:
        """The next trial: its number from 0, and its point.

        What is drawn depends on the block's seed, the trial's number, and what is known of the trials before it. It
        does not depend on how often the search was interrupted.
        """
        import optuna

        waiting = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        number = self.count()
        self._study.sampler = self._sampler(number)
        if not waiting:
            fixed = self._space.grid_point(number) if self._search.sampler == "grid" else {}
            if number == 0 and self._search.sampler != "grid":
                fixed = self._first
            if fixed:
                self._study.enqueue_trial({key: self._encoded(key, value) for key, value in fixed.items()})
        trial = self._study.ask()
        self._open[trial.number] = trial
        return trial.number, self._point(trial)

    def _point(self, trial: optuna.trial.Trial) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Optuna warns of its experimental parts: nothing that our user could change
            for parameter in self._space.parameters:
                _suggest(trial, parameter)
        return self.decoded(trial.params)

    def decoded(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's values as those of the config."""
        lists = {p.key for p in self._space.parameters if p.choices}
        return {key: json.loads(value) if key in lists else value for key, value in params.items()}

    def _encoded(self, key: str, value: Any) -> Any:
        (parameter,) = (p for p in self._space.parameters if p.key == key)
        return json.dumps(next(c for c in parameter.choices if c == value)) if parameter.choices else value

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Notes a validation, and says whether the trial is to end early."""
        trial = self._open[number]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial that is made again reports the same values again
            trial.report(value, epoch)
            # A trial that is made again has its old reports, too. Optuna would judge it by the last of these, and end
            # it at an earlier epoch than the first time.
            if epoch < self._reached.get(number, 0):
                return False
            return self._search.pruner.type != "none" and bool(trial.should_prune())

    def finish(self, number: int, state: State, value: float | None, **facts: Any) -> None:
        """Notes how a trial has ended. `value` counts only for a complete one."""
        import optuna

        trial = self._open.pop(number)
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        states = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
        self._study.tell(trial, value if state == "complete" else None, optuna.trial.TrialState[states[state]])

    def _begun(self) -> tuple[Any, ...]:
        import optuna

        return tuple(state for state in optuna.trial.TrialState if state != optuna.trial.TrialState.WAITING)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        # A seed for each trial: a sampler that lives on would draw something else after an interruption. Seeds of
        # neighbouring searches lie 1,000,003 apart, so their trials do not share seeds.
        seed = (self._search.seed * 1_000_003 + number) % 2**32
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            uniform = optuna.samplers.RandomSampler(seed=seed)
            if self._search.sampler == "tpe":
                return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            if self._search.sampler == "gp":
                return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)
            if self._search.sampler == "qmc":  # the journal knows the place in its sequence, so its seed stays the same
                return optuna.samplers.QMCSampler(
                    seed=self._search.seed, scramble=True, independent_sampler=uniform,
                    warn_asynchronous_seeding=False, warn_independent_sampling=False,
                )  # fmt: skip
            return uniform

    def importances(self) -> dict[str, float]:
        """How much of the metric's variance over the finished trials each key explains (fANOVA); {} for too few."""
        import optuna

        known = self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        values = [trial.value for trial in known]
        if len(known) < 4 or len(self._space.parameters) < 2 or min(values) == max(values):  # type: ignore[type-var]
            return {}
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            return dict(optuna.importance.get_param_importances(self._study, evaluator=evaluator))
        return {}


def _mend(file: Path) -> None:
    """Removes what a killed process may leave behind: the journal's lock, and half a line at its end."""
    file.with_name(f"{file.name}.lock").unlink(missing_ok=True)  # safe: the search's own lock keeps others away
    if file.exists():
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):
            file.write_bytes(content[: content.rfind(b"\n") + 1])


def _suggest(trial: optuna.trial.Trial, p: Parameter) -> None:
    """Draws a value of a trial, unless it has one already."""
    if p.choices:  # as JSON: Optuna's choices are plain values, ours may be lists and blocks
        trial.suggest_categorical(p.key, [json.dumps(choice) for choice in p.choices])
    elif p.whole:
        trial.suggest_int(p.key, int(p.low), int(p.high), log=p.log, step=int(p.step or 1))
    else:
        trial.suggest_float(p.key, float(p.low), float(p.high), log=p.log, step=p.step)


def _pruner(options: Pruner) -> optuna.pruners.BasePruner:
    import optuna

    if options.type == "median":
        return optuna.pruners.MedianPruner(options.first_trials, options.first_epoch)
    if options.type == "successive_halving":
        return optuna.pruners.SuccessiveHalvingPruner(options.first_epoch, options.reduction)
    return optuna.pruners.NopPruner()
