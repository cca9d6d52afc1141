"""`python -m trainer study`: makes the runs of a study, many in one process; finished runs are not repeated.

The output folder holds `study.json`, which is what was declared and planned, one file a finished run in `runs/`, what
the searches found in `tuning/`, and the runs on real ranks in `timing/`. Everything else is made of these (see `page`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..config.schema import near, read_json
from ..errors import Stopped, UserError
from ..exact.plan import steps_per_epoch
from ..files import to_json, write_json
from ..ranks.workers import WorkerError
from ..record.console import say
from ..wording import counted
from .agenda import Agenda
from .arms import WEAK
from .budgets import work
from .cells import Cell
from .declaration import Plan, Study, Variant, expand
from .load import load_study
from .many_runs import begin, check_code, devices_for, duration, interruptible, locked
from .plan_text import plan_text
from .results import declared_otherwise, digest_of, finished, metric_of
from .sentences import verdicts
from .slots import Slots
from .splits import check_probes, on_split, splits_of


class _Display:
    """A progress bar on a terminal; elsewhere a plain line every tenth of the runs."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._next = total, 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="run", dynamic_ncols=True)

    def finished(self, done: int, label: str, shown: str, left_s: float) -> None:
        text = f"{label}: {shown}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{text}; {duration(left_s)} left", refresh=False)
            self._bar.update(done - self._bar.n)
        elif done >= self._next:
            say(f"run {done:,} of {self._total:,}  {text}  {duration(left_s)} left")
            self._next = done + max(1, self._total // 10)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def study(path: str, dry_run: bool = False, overrides: Mapping[str, Any] | None = None) -> int:
    """Plans and runs a study, or continues it, and writes its report. Overrides as in `load.load_study`.

    Returns:
        The exit code: 0; 1 if runs could not be made; 75 if it was stopped, to be started again.

    Raises:
        UserError: something is wrong that has to be changed first. Most are raised before any run.
    """
    declared, variants = load_study(path, overrides)
    _check_packages(declared)
    folder = Path(declared.output_dir)
    begin(folder, "study.json", variants[0].config.trainer.task)
    cuda, parallel = devices_for(variants[0].config, declared.max_parallel)
    slots = Slots(cuda)
    total = 0
    try:
        with interruptible():
            # One process looks at the data, and makes the first run later: torch is loaded once.
            slots.grow(1)
            probe, variants = _probed(slots, declared, variants)
            _check_split(declared, probe)
            plan = expand(declared, variants)
            say(plan_text(plan), "")
            total = plan.runs()
            if dry_run:
                say(f"{counted(total, 'run')}, {parallel} at a time; nothing was started")
                return 0
            with locked(folder):
                _declare(folder, plan, probe)
                shutil.rmtree(folder / "running", ignore_errors=True)  # what a killed study left
                return _make(plan, probe, folder, slots, parallel, cuda)
    except KeyboardInterrupt:
        if dry_run:
            say("", "stopped: nothing was started")
            return Stopped.exit_code
        done = len(finished(folder))
        say("", f"stopped: {done:,} of {total:,} runs are finished and kept. The same command continues from there.")
        return Stopped.exit_code
    finally:
        slots.close()


def _check_packages(declared: Study) -> None:
    """Raises UserError where a package of the extra `study` is missing. Called before the runs, not after them."""
    arms = [WEAK[arm] for arm in declared.arms if arm in WEAK]
    needed = {"matplotlib": "the figures"}
    needed |= {"pytorch_optimizer": "LARS and LAMB"} if any(arm.optimizer for arm in arms) else {}
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"A study needs {' and '.join(f'{name} (for {needed[name]})' for name in missing)}. "
            'They come with pip install "strong-scaling-trainer[study]".'
        )


def _probed(slots: Slots, declared: Study, variants: Sequence[Variant]) -> tuple[dict[str, Any], list[Variant]]:
    """Samples, hashes and facts of the base's data; and the variants, with the number of their training samples.

    Where each judged run has a split of its own, every split is looked at. Those of the first run are returned.

    Raises:
        UserError: the task, its data or their splits are not what the study needs.
        WorkerError: the code of the task fails.
    """
    seen: dict[str, dict[str, Any]] = {}

    def probe(base: Config, split: int | None) -> dict[str, Any]:
        config = on_split(base, split)
        trainer = config.trainer
        # Variants often share their data, and reading them may take long.
        key = to_json([trainer.task, trainer.task_options, trainer.train_samples])
        if key not in seen:
            slots.send(0, "probe", config)
            (answer,) = slots.wait([0])
            if answer[1] == "error" and split is not None:
                probe(base, None)  # raises a mistake that is there without the split, too
                raise UserError(
                    f'"study.splits" gives a judged run trainer.task_options.split_seed {split}. With it the task '
                    f"{trainer.task} says: {answer[2]}"
                )
            if answer[1] != "done":
                raise UserError(answer[2]) if answer[1] == "error" else WorkerError(answer[2])
            seen[key] = answer[2]
        return seen[key]

    probes = []
    for variant in variants:
        by_split = {split: probe(variant.config, split) for split in splits_of(declared.splits, declared.seeds)}
        if declared.splits is not None:
            check_probes(by_split, declared.metric, variant.name)
        probes.append(next(iter(by_split.values())))
    # By task, because a variant may train another task than the base.
    codes = {v.config.trainer.task: found["task_code_sha256"] for v, found in zip(variants, probes)}
    known = [dataclasses.replace(v, samples=found["samples"]["train"]) for v, found in zip(variants, probes)]
    return probes[0] | {"task_code_sha256": codes}, known


def declaration(plan: Plan, probe: Mapping[str, Any]) -> dict[str, Any]:
    """What study.json holds, as JSON values.

    Args:
        plan: of the study.
        probe: {"samples", "data_sha256"} of the base's splits.
    """
    fixed = dataclasses.asdict(plan.study)
    for name in plan.study.timed_apart:
        del fixed[name]
    values = {
        "study": fixed,
        "base": plan.variants[""].values,
        "samples": probe["samples"],
        "variant_samples": {name: variant.samples for name, variant in plan.variants.items()},
        "data_sha256": probe["data_sha256"],
        "task_code_sha256": probe.get("task_code_sha256"),
        "cells": [dataclasses.asdict(cell) for cell in plan.cells],
        "searches": {name: dataclasses.asdict(search) for name, search in plan.searches.items()},
        "tuned": [[*dataclasses.astuple(place), seed, name] for (place, seed), name in plan.tuned.items()],
        "repeats": [dataclasses.asdict(repeat) for repeat in plan.repeats],
        "impossible": [[str(place), why] for place, why in plan.impossible],
        "strong": plan.strong,
        "command": shlex.join(["python", "-m", "trainer", *sys.argv[1:]]),
        "declared_at_s": time.time(),
    }
    return dict(json.loads(to_json(values)))


def _declare(folder: Path, plan: Plan, probe: Mapping[str, Any]) -> None:
    """Writes study.json, or compares with it. Raises UserError if the study was declared in another way."""
    values = declaration(plan, probe)
    file = folder / "study.json"
    (folder / "runs").mkdir(exist_ok=True)
    if not file.exists():
        write_json(file, values)
        return
    before = read_json(file)
    if not any((folder / "runs").glob("*.json")):
        write_json(file, values)  # nothing has been made of the older declaration
        return
    for part in ("study", "base", "data_sha256"):
        if before.get(part) != values[part]:
            was = before.get(part) or {}
            keys = [k for k in values[part] if k not in was or was[k] != values[part][k]]
            raise UserError(
                f"{folder} holds a study with another declaration: {part} differs in {', '.join(keys)}.\n"
                "What is judged, and how, is declared before the runs. Undo the change to continue, or choose another "
                "study.output_dir."
            )
    check_code(folder, before, values, "study.output_dir")
    if before.get("cells") != values["cells"]:
        raise UserError(
            f"{folder} holds a study that another version of the trainer has planned. Choose another study.output_dir, "
            "or use that version."
        )


def _make(plan: Plan, probe: dict[str, Any], folder: Path, slots: Slots, parallel: int, cuda: bool) -> int:
    """Makes the runs that are missing, the first alone to time it, then as many at a time as there are slots."""
    from .page import write_report
    from .timing import time_ranks

    declared, results, digest = plan.study, finished(folder), digest_of(read_json(folder / "study.json"))
    if changed := declared_otherwise(results, digest):
        raise UserError(
            f"{folder / 'study.json'} has been changed: {counted(changed, 'run')} of {len(results):,} had another "
            "declaration.\nWhat is judged, and how, is declared before the runs. Undo the change, or choose another "
            "study.output_dir."
        )
    agenda = Agenda(plan, folder, results)
    total, made_s, made = plan.runs(), 0.0, 0

    def effort(this: str) -> int:
        return work(agenda.configs[this], plan.variants[agenda.labels[this][0].variant].samples)

    say(f"{counted(total, 'run')}, {agenda.done():,} of them finished before; {parallel} at a time")
    # Only slot 0 at first: the time of one run alone tells how long the others will take.
    idle, busy, failed = [0], dict[int, str](), dict[str, str]()
    display = _Display(total, agenda.done())
    try:
        while True:
            while idle and (this := agenda.next()) is not None:
                slot = idle.pop()
                slots.send(slot, "run", agenda.configs[this], str(folder / "running" / this))
                busy[slot] = this
            if not busy:
                break
            for slot, kind, value in slots.wait(list(busy)):
                this = busy.pop(slot)
                idle.append(slot)
                place, seed = agenda.labels[this]
                if kind != "done":
                    failed[this] = f"{place}, seed {seed}: {value}"
                    continue
                task, code = agenda.configs[this].trainer.task, value["task_code_sha256"]
                # Each run loads the task anew, so an edit during the study would mix two versions.
                if code is not None and code != probe["task_code_sha256"][task]:
                    raise UserError(
                        f"{task}, or what it imports, was changed while the study ran. "
                        f"{agenda.done():,} of {total:,} runs are finished and kept. Undo the change, and the same "
                        "command continues from there."
                    )
                cell = Cell(place.arm, place.budget, place.world_size, seed, place.variant, this)
                result = _result(cell, agenda.configs[this], value, probe, plan.variants[place.variant].samples)
                result["declaration_sha256"] = digest
                _check_metrics(declared, result)
                write_json(folder / "runs" / f"{this}.json", result)
                results[this] = result
                is_first = not made
                made, made_s = made + effort(this), made_s + result["wall_time_s"]
                agenda.take(this)
                # Runs that a search has yet to ask for count as long as the mean of those that are known.
                known = [effort(i) for i in [*agenda.left(), *busy.values()]]
                mean = sum(known) / len(known) if known else made / max(1, len(results))
                left_s = (sum(known) + agenda.unknown() * mean) * made_s / made / parallel
                if is_first and (known or agenda.unknown()):
                    others, took_s = total - agenda.done(), result["wall_time_s"]
                    say(f"the first run took {took_s:.1f} s; {others:,} others will take {duration(left_s)}")
                    slots.grow(parallel)
                    idle += range(1, parallel)
                shown_metric = metric_of(result, declared.metric)
                shown = result["status"] if shown_metric is None else f"{declared.metric} {shown_metric:.4f}"
                display.finished(agenda.done(), f"{place} seed {seed}", shown, left_s)
            # Three failures and no success: the others would most likely fail alike.
            if len(failed) > 2 and not made:
                break
    except WorkerError as error:
        done = agenda.done()
        say("", f"{error}. {done:,} of {total:,} runs are finished and kept; the same command continues from there.")
        return 1
    finally:
        display.close()
        slots.close()
        shutil.rmtree(folder / "running", ignore_errors=True)
    if failed:
        say(f"{counted(len(failed), 'run')} could not be made. The same command tries them again. The first:")
        say(next(iter(failed.values())))
        return 1
    if declared.timing is not None:
        time_ranks(declared.timing, plan, folder, cuda)
    say("", *verdicts(folder), "", f"report: {write_report(folder)}")
    return 0


def _result(
    cell: Cell, config: Config, summary: Mapping[str, Any], probe: Mapping[str, Any], samples: int
) -> dict[str, Any]:
    facts, B = probe["facts"], config.plan(1).global_batch_size
    kept = ("parameters_sha256", "model_sha256", "exactness", "samples_per_s", "step_time_s", "time_to_first_step_s")
    every = steps_per_epoch(samples, B, config.trainer.drop_last)
    curves = {
        name: {"epoch": [step / every for step in curve["step"]], "step": curve["step"], "value": curve["value"]}
        for name, curve in summary["curves"].items()
    }
    return {
        **dataclasses.asdict(cell),
        "status": summary["status"],
        "reason": summary.get("reason"),
        "global_batch_size": B,
        "micro_batch_size": config.plan(1).micro_batch_size,
        "learning_rate": config.optimizer.params.get("lr"),
        "warmup_epochs": config.trainer.learning_rate.warmup_epochs,
        "epochs": config.trainer.epochs,
        "samples": samples,
        "steps": summary["steps"],
        "metrics": summary["metrics"],
        "best": summary.get("best"),
        "gradient_noise": summary.get("gradient_noise"),
        "adascale": summary.get("adascale"),
        "curves": curves,
        **{name: summary.get(name) for name in kept},
        "started_at_s": summary["started_at_s"],
        "wall_time_s": summary["wall_time_s"],
        "code_sha256": facts["code_sha256"],
        "device_model": facts["device_model"],
        "facts": facts,
        "config": config.as_dict(),
    }


def _check_split(study: Study, probe: Mapping[str, Any]) -> None:
    """Raises UserError where a metric belongs to a split that does not exist or is not evaluated."""
    known = [name for name in probe["samples"] if name != "train"]
    for key, metric in (("metric", study.metric), ("tuning.metric", study.tuning.metric)):
        split = metric.split("/")[0]
        if metric and split not in known:
            raise UserError(f'"study.{key}" is "{metric}", but the splits that are evaluated are {", ".join(known)}.')


def _check_metrics(study: Study, result: Mapping[str, Any]) -> None:
    metrics = result["metrics"]
    tuned = any(arm in WEAK and WEAK[arm].tuned for arm in study.arms)
    for key, wanted in (("metric", study.metric), *([("tuning.metric", study.tuning_metric)] if tuned else [])):
        split, name = wanted.split("/")
        if metrics and name not in metrics.get(split, {}):
            known = [f"{s}/{m}" for s, values in metrics.items() for m in values]
            raise UserError(f'"study.{key}" is "{wanted}", which this task does not measure. {near(wanted, known)}')
