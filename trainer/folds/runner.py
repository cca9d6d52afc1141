"""`python -m trainer cross-validate`: makes the runs of a cross-validation; finished runs are not repeated.

The output folder holds `cross_validation.json` (what was declared, and what was known before the first run), and for
each run an ordinary output folder in `runs/`. A run that was interrupted goes on from its last checkpoint. At the end,
`predictions.csv`, `summary.json` and `report.html` are made from these.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..config.schema import near, read_json
from ..errors import Stopped, UserError
from ..files import to_json, write_json
from ..ranks.workers import WorkerError
from ..record.console import say
from ..study.many_runs import begin, devices_for, duration, interruptible, locked
from ..study.slots import Slots
from ..tasks.first_look import look
from . import work
from .declaration import Declared, Place, load
from .results import STATE, Results, chosen_metric, finished, write_predictions
from .sentences import headline, plan_lines, result_lines


def cross_validate(path: str, overrides: Mapping[str, Any] | None = None, dry_run: bool = False) -> int:
    """Plans and runs a cross-validation, or continues it, and writes its results. Overrides as in `declaration.load`.

    Returns:
        The exit code: 0; 1 if runs could not be made; 75 if it was stopped, to be started again.

    Raises:
        UserError: something has to change first. It is raised before any run.
    """
    declared = load(path, overrides)
    look(declared.config.trainer.task, declared.config.trainer.task_options)
    begin(declared.folder, STATE, declared.config.trainer.task)
    cuda, parallel = devices_for(declared.config, declared.options.max_parallel)
    slots = Slots(cuda)
    try:
        with interruptible():
            known = _examined(slots, declared)
            _check_metric(declared, known)
            say(*plan_lines(declared, known, parallel), "")
            if dry_run:
                say("nothing was started")
                return 0
            with locked(declared.folder, "cross-validation"):
                _declare(declared, known)
                return _make(declared, known, slots, parallel)
    except KeyboardInterrupt:
        if dry_run:
            say("", "stopped: nothing was started")
            return Stopped.exit_code
        done, total = len(finished(declared)), len(declared.places)
        say("", f"stopped: {done:,} of {total:,} runs are finished and kept. The same command continues from there.")
        return Stopped.exit_code
    finally:
        slots.close()


def _examined(slots: Slots, declared: Declared) -> dict[str, Any]:
    slots.grow(1)
    slots.send(0, work.examine, declared)
    ((_, kind, value),) = slots.wait([0])
    if kind != "done":
        raise UserError(value) if kind == "error" else WorkerError(value)
    known: dict[str, Any] = json.loads(to_json(value))
    return known


def _check_metric(declared: Declared, known: Mapping[str, Any]) -> None:
    wanted = declared.options.metric
    if wanted is not None and wanted not in known["metrics"]:
        raise UserError(
            f'"cross_validation.metric" is "{wanted}", which the first fold does not measure. '
            f"{near(wanted, known['metrics'])}"
        )


def _declare(declared: Declared, known: dict[str, Any]) -> None:
    """Writes cross_validation.json, or compares with it if it is there. Raises UserError if it declares other runs."""
    (declared.folder / "runs").mkdir(exist_ok=True)
    file = declared.folder / STATE
    fixed = json.loads(to_json(declared.fixed()))
    if file.exists():
        before = read_json(file)
        old = before["declared"]
        # A key that only one of two versions of the trainer knows counts only if it was set.
        names = [name for name in fixed if name in old and fixed[name] != old[name]]
        names += sorted(name for name in fixed.keys() ^ old.keys() if (fixed | old)[name] not in (None, {}))
        cuts = zip(before["known"]["fold_of"], known["fold_of"])
        if before["known"]["data_sha256"] != known["data_sha256"] or any(a != b for a, b in cuts):
            names.append("the data, or how they are cut")
        code = known["task_code_sha256"]
        if before["known"].get("task_code_sha256", code) != code:
            names.append("the code of the task")
        if names:
            raise UserError(
                f"{declared.folder} holds another cross-validation. These differ: {', '.join(names)}.\n"
                "Undo the change, or choose another --output_dir."
            )
    command = shlex.join(["python", "-m", "trainer", *sys.argv[1:]])
    write_json(file, {"declared": fixed, "known": known, "command": command, "declared_at_s": time.time()})


def _make(declared: Declared, known: Mapping[str, Any], slots: Slots, parallel: int) -> int:
    """Makes the runs that are missing, as many at a time as there are slots, and writes the results."""
    from .page import write_page

    done, places = finished(declared), declared.places
    missing, failed = [place for place in places if place not in done], dict[Place, str]()
    if done and missing:
        say(f"{len(done):,} of {len(places):,} runs were finished before")
    metric = chosen_metric(declared, known)
    parallel = max(1, min(parallel, len(missing)))
    try:
        slots.grow(parallel)
        idle, busy = list(range(parallel)), dict[int, Place]()
        began_s, made = time.monotonic(), 0
        while missing or busy:
            while idle and missing:
                place, slot = missing.pop(0), idle.pop(0)
                slots.send(slot, work.make, declared.run_config(place, known["validation_fraction"]))
                busy[slot] = place
            for slot, kind, value in slots.wait(list(busy)):
                place = busy.pop(slot)
                idle.append(slot)
                name = f"repeat {place.repeat}, fold {place.fold}" if declared.options.repeats > 1 else str(place)
                name = name.replace(f"repeat-{place.repeat}-fold-", "fold ")
                if kind != "done" or value["status"] == "not finite":
                    failed[place] = value if kind != "done" else value["reason"]
                    say(f"{name}: could not be finished")
                    continue
                made += 1
                left = len(missing) + len(busy)
                left_s = (time.monotonic() - began_s) / made * left
                measured = value["metrics"]["test"].get(metric)
                shown = f"no {metric}" if measured is None else f"{metric} {measured:.4f}"
                say(f"{name}: {shown}" + (f"  ({duration(left_s)} left)" if left else ""))
    except WorkerError as error:
        say("", f"{error}. {len(finished(declared)):,} of {len(places):,} runs are finished and kept; the same")
        say("command continues from there.")
        return 1
    finally:
        slots.close()
    if failed:
        place, why = next(iter(failed.items()))
        say("", f"{len(failed)} of {len(places)} runs could not be finished, so there is no mean.")
        say(f"{place}: {why}", "The same command tries them again.")
        return 1
    predictions, confusions = write_predictions(declared)
    results = Results(declared)
    write_json(declared.folder / "summary.json", results.summary())
    page = write_page(results, confusions)
    say("", *result_lines(results), f"predictions    {predictions}", "", headline(results, page))
    return 0
