"""`python -m trainer search`: trials on validation, the choice, and the test of the chosen configuration, once.

The output folder holds `search.json` (what was declared), Optuna's journal, and one file for each trial in `trials/`.
At the end it also holds `choice.json`, `best.json`, and one file for each fresh seed in `test/`. Everything else in it
is made from these.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..config.directions import DIRECTIONS
from ..config.schema import near, read_json
from ..errors import Stopped, TrainerError, UserError
from ..files import to_json, write_json
from ..ranks.workers import WorkerError
from ..record.console import say
from ..study.many_runs import begin, check_code, devices_for, interruptible, locked
from ..study.slots import Slots
from ..tasks.first_look import look as look_first
from .declaration import Plan, load_search
from .finals import test_best
from .ledger import JOURNAL, Ledger
from .places import Places, Times, choose, measure
from .results import BEST, CHOICE, TESTS, TIMES, TRIALS, best_of, counts, sentences, trials_in
from .trial import look
from .trials import Trials


def search(path: str, overrides: Mapping[str, Any] | None = None) -> int:
    """Makes a search, or continues it, and tests what it finds. Overrides as in `declaration.load_search`.

    Returns:
        The exit code: 0; 1 if nothing was found, or a run could not be made; 75 if it was stopped, to be started again.

    Raises:
        UserError: something has to change first.
    """
    plan = load_search(path, overrides)
    _check_packages()
    look_first(plan.base.trainer.task, plan.base.trainer.task_options)
    begin(plan.folder, "search.json", plan.base.trainer.task)
    cuda, devices = devices_for(plan.base, plan.search.max_parallel)
    slots = Slots(cuda)
    try:
        with interruptible():
            slots.grow(1)
            told = _looked(slots, plan)
            plan = dataclasses.replace(plan, space=plan.space.with_fractions(told["numbers"]))
            metric, mode = _metric_of(plan, told)
            with locked(plan.folder, "search"):
                _declare(plan, told, metric, mode)
                running = plan.folder / "running"
                shutil.rmtree(running, ignore_errors=True)
                try:
                    return _make(plan, told, metric, mode, Places(slots, devices, cuda, running))
                finally:
                    # Processes end first: they write into this folder, and once it is unlocked another call may use it.
                    slots.close()
                    shutil.rmtree(running, ignore_errors=True)
    except KeyboardInterrupt:
        done = counts(trials_in(plan.folder))
        say("", f"stopped. What has ended is kept ({done}). The same command continues from there.")
        return Stopped.exit_code
    except WorkerError as error:
        say("", f"{error}. What has ended is kept; the same command continues from there.")
        return 1
    finally:
        slots.close()


def _check_packages() -> None:
    """Raises UserError if a package of the extra `search` is missing. The user learns it now, not after the trials."""
    missing = [name for name in ("optuna", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'A search needs {" and ".join(missing)}. Install it: pip install "strong-scaling-trainer[search]"'
        )


def _looked(slots: Slots, plan: Plan) -> dict[str, Any]:
    """What `trial.look` has found out in another process. Raises UserError."""
    slots.send(0, look, plan.base, plan.space, plan.values)
    ((_, kind, value),) = slots.wait([0])
    if kind != "done":
        raise UserError(value) if kind == "error" else WorkerError(value)
    found: dict[str, Any] = value
    return found


def _metric_of(plan: Plan, told: Mapping[str, Any]) -> tuple[str, str]:
    """The metric that decides, and whether a low or a high one is better.

    Args:
        plan: of the search.
        told: what `look` has found out.

    Raises:
        UserError: the task does not measure it, or nothing says whether low or high is better.
    """
    name, mode = told["best_metric"] or ("loss", "min")
    kept = plan.base.trainer.best
    known = {**DIRECTIONS, name: mode}
    if kept.metric not in ("auto", None):
        name = str(kept.metric)
        known |= {name: kept.mode} if kept.mode != "auto" else {}
    if plan.search.metric != "auto":
        name = plan.search.metric
    if name not in told["metrics"]:
        raise UserError(
            f'"search.metric" is "{name}", which this task does not measure on validation. '
            f"{near(name, told['metrics'])}"
        )
    if plan.search.mode != "auto":
        return name, plan.search.mode
    if name not in known:
        raise UserError(f'"search.mode" is needed: is a low or a high {name} better? Set it to "min" or "max".')
    return name, known[name]


def _declare(plan: Plan, told: Mapping[str, Any], metric: str, mode: str) -> None:
    """Writes search.json, or compares with it if it is there. Raises UserError if it declares another search."""
    fixed = dataclasses.asdict(plan.search)
    for name in plan.search.free:
        del fixed[name]
    values = {
        "search": fixed,
        "base": plan.values,
        "metric": metric,
        "mode": mode,
        "samples": told["samples"],
        "data_sha256": told["data_sha256"],
        "task_code_sha256": told["task_code_sha256"],
        "facts": told["facts"],
        "command": shlex.join(["python", "-m", "trainer", *sys.argv[1:]]),
        "declared_at_s": time.time(),
    }
    values = json.loads(to_json(values))  # as they would be read back: a tuple is a list then, and equal to one
    file = plan.folder / "search.json"
    # Until a trial has ended, nothing is lost if another search takes the folder.
    if not file.exists() or not (trials_in(plan.folder) or (plan.folder / CHOICE).exists()):
        (plan.folder / JOURNAL).unlink(missing_ok=True)
        for name in (TRIALS, TESTS):
            (plan.folder / name).mkdir(exist_ok=True)
        (plan.folder / TIMES).unlink(missing_ok=True)
        write_json(file, values)
        return
    before = read_json(file)
    for part in ("search", "base", "data_sha256", "metric", "mode"):
        if before.get(part) != values[part]:
            now, old = values[part], before.get(part)
            keys = [k for k in now if (old or {}).get(k) != now[k]] if isinstance(now, dict) else [str(now)]
            raise UserError(
                f"{plan.folder} holds another search: {part} differs in {', '.join(keys)}. Its trials cannot be "
                "compared with those of this one.\nChoose another search.output_dir."
            )
    check_code(plan.folder, before, values, "search.output_dir")


def _make(plan: Plan, told: Mapping[str, Any], metric: str, mode: str, places: Places) -> int:
    ledger = Ledger(plan.folder, plan.search, plan.space, plan.values, mode)
    if not (plan.folder / CHOICE).exists():
        trials = Trials(plan, ledger, metric, mode, told["samples"]["validation"])
        if trials.left() != 0:
            together = _together(plan, told, places, trials.left())
            places.run(together, trials.next, trials.report, trials.done)
        if trials.hopeless is not None:
            raise TrainerError(trials.hopeless)
        if not _choose(plan, metric, mode):
            return 1
    elif (plan.trials or 0) > len(trials_in(plan.folder)):
        say(
            "note: the best configuration of this search has been chosen, and tested. It makes no more trials, because "
            "a new choice would know the test metric. For more, start a search with another search.output_dir."
        )
    choice = read_json(plan.folder / CHOICE)
    failed = test_best(plan, choice, places, lambda count: _together(plan, told, places, count, quiet=True))
    if failed is not None:
        say("", f"The best configuration could not be tested: {failed}", "The same command tries it again.")
        return 1
    from .page import write_page

    page = write_page(plan, ledger)
    train = f"python -m trainer train --ds_config {shlex.quote(str(plan.folder / BEST))}"
    say(
        "",
        *sentences(plan.folder, choice, trials_in(plan.folder), plan.space.text(choice["point"])),
        "",
        f"config: {plan.folder / BEST}   ({train})",
        f"page: {page}",
        f"TensorBoard: {plan.folder / 'tensorboard'}",
    )
    return 0


def _together(plan: Plan, told: Mapping[str, Any], places: Places, runs: int | None, *, quiet: bool = False) -> bool:
    """Whether all devices work on one run. Says why, unless quiet. The times are measured once, and kept in a file."""
    if places.devices == 1 or plan.search.devices_per_trial == "one":
        return False
    if plan.search.devices_per_trial == "all":
        return True
    config, file = plan.config_of(plan.space.own_point(plan.values)), plan.folder / TIMES
    before = read_json(file) if file.exists() else {}
    if before.get("devices") == places.devices:
        times = Times(**before)
    else:
        say(f"measuring: short runs on one of {places.devices} devices, and on all of them")
        times = measure(places, config, told["samples"]["train"], plan.search.timed_steps)
        write_json(file, dataclasses.asdict(times))
    together, line = choose(times, runs)
    if not quiet:
        say(line)
    return together


def _choose(plan: Plan, metric: str, mode: str) -> bool:
    """Writes choice.json and best.json. Returns whether there was any trial to choose from."""
    trials = trials_in(plan.folder)
    best = best_of(trials, mode)
    if best is None:
        why = next((t["reason"] for t in trials if t.get("reason")), "there was no time for any")
        say("", f"No trial has come to its end, so there is nothing to choose from. The first reason: {why}")
        return False
    values = plan.values_of(best["point"])
    # choice.json is written last: once it is there, no more trials are made, and best.json has to be there, too.
    write_json(plan.folder / BEST, values)
    choice = {"metric": metric, "mode": mode, "seeds": plan.seeds(), "trials": len(trials)}
    choice |= {name: best[name] for name in ("number", "point", "value", "run", "parameters_sha256")}
    write_json(plan.folder / CHOICE, choice)
    return True
