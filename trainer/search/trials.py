"""The trials of a search, one after the other: what to run next, what came out, and a line about each."""

from __future__ import annotations

import math
import time
from typing import Any

from ..errors import UserError
from ..files import write_json
from ..record.console import say
from ..study.arms import run_id
from .declaration import Plan
from .ledger import Ledger, State
from .places import How, Job
from .results import best_of, trial_file, trials_in
from .trial import PRUNED

# This many failures before any success end a search: the other trials would fail, too.
_HOPELESS = 3
# This many draws in a row that were tried before end a search: there may be no other configuration left.
_REPEATED = 100


class Trials:
    """The trials of one search.

    Args:
        plan: of the search.
        ledger: Optuna's part.
        metric, mode: what decides.
        samples: of the validation split. A trial with another number of them cannot be compared.

    Attributes:
        hopeless: why the search had to end without any result; None if it did not.
    """

    def __init__(self, plan: Plan, ledger: Ledger, metric: str, mode: str, samples: int) -> None:
        self._plan, self._ledger, self._metric, self._mode, self._samples = plan, ledger, metric, mode, samples
        self._known = {result["run"]: result for result in trials_in(plan.folder) if result.get("run")}
        self._again = ledger.unfinished()
        self._points: dict[str, tuple[int, dict[str, Any]]] = {}  # job -> trial
        self._pruned: set[str] = set()
        self._began_s, self._used_s = time.monotonic(), ledger.used_s
        self._repeated = self._broken = 0
        self.hopeless: str | None = None
        ended = ledger.count() - len(self._again)
        if ledger.count():
            say(f"{ended:,} trial{'s' * (ended != 1)} ended before; the search continues")

    # ---- what is left ------------------------------------------------------------------------------------------------

    def left(self) -> int | None:
        """How many trials are to be made; None if only the time decides."""
        if self._plan.trials is None:
            return None if self._time_left() else len(self._again)
        return max(0, self._plan.trials - self._ledger.count()) + len(self._again)

    def _time_left(self) -> bool:
        budget_s = self._plan.search.max_wall_time_s
        return budget_s is None or self._spent_s() < budget_s

    def _spent_s(self) -> float:
        return self._used_s + time.monotonic() - self._began_s

    def _budget_is_used(self) -> bool:
        if self._plan.trials is not None and self._ledger.count() >= self._plan.trials:
            return True
        return self._repeated >= _REPEATED or not self._time_left()

    def next(self) -> Job | None:
        """The next run; None if there is none."""
        while self.hopeless is None:
            if self._again:
                number, point = self._again.pop(0)
            elif self._budget_is_used():
                return None
            else:
                number, point = self._ledger.ask()
            try:
                config = self._plan.config_of(point)
                config.plan(1)
            except UserError as error:
                self._failed(number, point, None, f"the values contradict one another: {error}")
                continue
            this = run_id(config)
            known = self._known.get(this)
            # Its file is written before Optuna is told. So a call that was killed in between has left only the file.
            if known is not None and known["number"] == number:
                self._finish(known)
                continue
            if known is not None:  # the same bits again
                self._repeat(number, point, known)
                continue
            self._repeated = 0
            name = f"trial-{number:04d}"
            self._points[name] = (number, point)
            return Job(name, config)
        return None

    # ---- what comes out ----------------------------------------------------------------------------------------------

    def report(self, job: Job, event: dict[str, Any] | None) -> str | None:
        """Notes a validation; `event` is None if there is nothing new. Returns why the run has to stop, or None."""
        if event is not None and job.name not in self._pruned:
            value, (number, _) = event["metrics"].get(self._metric), self._points[job.name]
            if value is not None and math.isfinite(value) and self._ledger.report(number, event["epoch"], float(value)):
                self._pruned.add(job.name)
        return PRUNED if job.name in self._pruned else None

    def done(self, job: Job, how: How, value: Any) -> None:
        """Notes how a run has ended."""
        number, point = self._points.pop(job.name)
        this = run_id(job.config)
        if how != "done":
            text = str(value).strip()
            self._broken += 1
            self._failed(number, point, None, text.splitlines()[-1] if how == "traceback" else text)
            if self._broken >= _HOPELESS and not self._known:
                self.hopeless = f"The first {self._broken} trials could not be made. The last one: {text}"
            return
        metric = value["metrics"].get("validation", {}).get(self._metric)
        reason, state = value.get("reason"), "complete"
        if value["status"] == "pruned":
            state = "pruned"
        elif value["status"] == "not finite":
            state = "failed"
        elif value["validation_samples"] != self._samples:
            state = "failed"
            reason = f"its validation split has {value['validation_samples']} samples, others have {self._samples}"
        elif metric is None or not math.isfinite(metric):
            state, reason = "failed", f"validation {self._metric} is not a finite number, or not measured"
        facts = {"status": value["status"], "exactness": value.get("exactness"), "steps": value.get("steps")}
        kept = ("wall_time_s", "started_at_s", "parameters_sha256", "metrics", "curves", "best", "world_size")
        facts |= {name: value.get(name) for name in kept}
        result = self._write(number, point, this, state, metric if state == "complete" else None, reason, facts)
        self._known[this] = result
        self._finish(result)

    def _failed(self, number: int, point: dict[str, Any], run: str | None, reason: str) -> None:
        self._finish(self._write(number, point, run, "failed", None, reason, {"metrics": {}, "curves": {}}))

    def _repeat(self, number: int, point: dict[str, Any], other: dict[str, Any]) -> None:
        """Notes a trial with the config of another one. Equal configs give equal bits, so it is not run again."""
        self._repeated += 1
        facts = {name: other.get(name) for name in other if name not in ("number", "point", "state", "value", "reason")}
        facts |= {"as": other.get("as", other["number"]), "wall_time_s": 0.0}
        for epoch, value in _reports(other, self._metric):
            self._ledger.report(number, epoch, value)
        state = other["state"]
        self._finish(self._write(number, point, other["run"], state, other["value"], other["reason"], facts))

    def _write(
        self, number: int, point: dict[str, Any], run: str | None, state: str, value: float | None, reason: str | None,
        facts: dict[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        epochs = [epoch for epoch, _ in _reports(facts, self._metric)]
        own = {"number": number, "point": point, "run": run, "state": state, "value": value, "reason": reason}
        result = facts | own | {"epoch": max(epochs, default=0)}
        write_json(trial_file(self._plan.folder, number), result)
        return result

    def _finish(self, result: dict[str, Any]) -> None:
        """Tells Optuna of a trial that has ended, and prints a line about it."""
        state: State = result["state"]
        self._ledger.finish(result["number"], state, result["value"], run=result["run"], reason=result["reason"])
        self._ledger.spend(self._spent_s())
        say(self._line(result))

    def _line(self, result: dict[str, Any]) -> str:
        total = "" if self._plan.trials is None else f" of {self._plan.trials:,}"
        best = best_of(trials_in(self._plan.folder), self._mode)
        told = {
            "complete": f"validation {self._metric} {result['value'] or 0.0:.4f}",
            "pruned": f"ended early after epoch {result['epoch']}",
            "failed": f"failed: {str(result['reason']).splitlines()[0]}",
        }[result["state"]]
        parts = [told, self._plan.space.text(result["point"])]
        if "as" in result:
            parts.append(f"the same as trial {result['as'] + 1}")
        elif result.get("wall_time_s"):
            parts.append(f"{result['wall_time_s']:.1f} s")
        if best is not None:
            parts.append("the best" if best["number"] == result["number"] else f"best {best['value']:.4f}")
        return f"trial {result['number'] + 1:,}{total}  {'  '.join(parts)}"


def _reports(result: dict[str, Any], metric: str) -> list[tuple[int, float]]:
    """(epoch, value) of the validations of a result."""
    curve = (result.get("curves") or {}).get(metric, {})
    return [(int(e), v) for e, v in zip(curve.get("epoch", ()), curve.get("value", ())) if v is not None]
