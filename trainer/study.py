"""`python -m trainer study`: the runs of a study, many in one process, finished ones never again.

The output folder holds `study.json`, which is what was declared and planned, and one file a finished run in `runs/`.
Everything else is made of these (see study_report).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .arms import (
    NAMES,
    SEQUENTIAL,
    STRONG,
    WEAK,
    Budget,
    ImpossibleError,
    check_base,
    check_strong,
    run_id,
    values_of,
)
from .config import Config, parse
from .console import say, table
from .errors import Stopped, UserError
from .inference import Rules, seeds_needed
from .output import to_json
from .schema import build, lay_over, near, option, read_json
from .slots import Slots
from .workers import WorkerError

# What a run of a study does without: it is alone, short, and its files are not kept. Inexact runs are refused,
# because only an exact run on one rank is the run on W.
_OPERATION = {
    "tensorboard.enabled": False,
    "trainer.guard_every_steps": 0,
    "trainer.checkpoint.every_steps": 0,
    "trainer.exactness": "bitwise",
}


@dataclass(frozen=True)
class Study:
    """`study`: what is compared, and by which rules it is judged. Declared before the runs, and then fixed."""

    output_dir: str = option("", "the folder of this study")
    arms: list[str] = option(list(NAMES), "what is compared; sequential is always part of it")
    world_sizes: list[int] = option([2, 4, 8, 16, 32], "W of the other arms")
    seeds: list[int] = option([], "of every arm; in the file also a count n, for 0 to n - 1")
    budgets: list[str] = option(["epochs"], "what a weak run has in common with the sequential: epochs, updates")
    max_epochs: int | None = option(None, "the most epochs that equal updates may take", minimum=1)
    metric: str = option("test/accuracy", "<split>/<metric> of the model that a run keeps")
    direction: Literal["max", "min"] = option("max", "whether more or less of it is better")
    margin: float = option(0.01, "the smallest loss of the metric that matters", above=0)
    target: float | None = option(None, "what a run must reach to have converged; null for one made of sequential")
    target_deviations: float = option(3.0, "the target lies so many standard deviations from its mean", above=0)
    deviation_floor: float = option(0.005, "none of them taken as smaller than this", above=0)
    alpha: float = option(0.05, "family-wise error rate; intervals have level 1 - alpha", above=0, below=1)
    max_parallel: int | None = option(None, "runs at a time; null for one a GPU, or one a core", minimum=1)

    @property
    def rules(self) -> Rules:
        """What `inference.judge` goes by."""
        return Rules(
            self.direction == "max", self.alpha, self.margin, self.target, self.target_deviations, self.deviation_floor
        )


@dataclass(frozen=True)
class Cell:
    """One arm, budget, W and seed; cells with the same id are the same run."""

    arm: str
    budget: Budget
    world_size: int
    seed: int
    id: str


@dataclass
class Plan:
    """What a study consists of, on a training set of so many samples.

    Attributes:
        cells: one for each arm, budget, W and seed; sequential first, and seed by seed, so that a study that is
            interrupted has whole pairs.
        configs: run id -> config.
        impossible, strong: (arm, budget, W, why) and (W, M) or (W, why not).
    """

    cells: list[Cell]
    configs: dict[str, Config]
    impossible: list[tuple[str, str, int, str]]
    strong: list[tuple[int, int | str]]

    def comparisons(self) -> int:
        """Weak arm, budget and W: what is compared with the sequential runs."""
        return len({(c.arm, c.budget, c.world_size) for c in self.cells if c.arm != SEQUENTIAL})


def load(path: str) -> tuple[Study, dict[str, Any], Config]:
    """The study in a file, its base config's values, and the base config checked. Raises UserError."""
    values = read_json(Path(path))
    block = values.pop("study", None)
    if not isinstance(block, dict):
        raise UserError(f'{path}: a study needs a "study" block {{...}} beside the config that it varies.')
    try:
        study = _checked(block)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    base = check_base(values, path)
    if study.max_epochs is not None and study.max_epochs < base.trainer.epochs:
        raise UserError(f'{path}: "study.max_epochs" ({study.max_epochs}) is less than trainer.epochs.')
    for key, value in _OPERATION.items():
        lay_over(values, key, value)
    return study, values, base


def _checked(block: Mapping[str, Any]) -> Study:
    count = block.get("seeds")
    if isinstance(count, int) and not isinstance(count, bool):
        block = {**block, "seeds": list(range(min(count, 10_000)))}
    study: Study = build(Study, dict(block), "study.")
    if len(study.seeds) < 2:
        raise UserError('"study.seeds" must be at least 2: one run says nothing of what another seed would give.')
    for name, given, known in (("arms", study.arms, NAMES), ("budgets", study.budgets, ("epochs", "updates"))):
        for value in given:
            if value not in known:
                raise UserError(f'"study.{name}" holds {value!r}. {near(str(value), known)}')
    for name, numbers, least in (("seeds", study.seeds, 0), ("world_sizes", study.world_sizes, 1)):
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number < 1 << 63:
                raise UserError(f'"study.{name}" holds {number!r}. It must hold whole numbers of at least {least}.')
    for name in ("arms", "budgets", "seeds", "world_sizes"):
        values = getattr(study, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f'"study.{name}" is {values}. It must name at least one, and each of them once.')
    if study.max_epochs is not None and "updates" not in study.budgets:
        raise UserError('"study.max_epochs" has no effect without the budget "updates".')
    if study.metric.count("/") != 1:
        raise UserError(f'"study.metric" is "{study.metric}". It must be <split>/<metric>, such as test/accuracy.')
    if not study.output_dir:
        raise UserError('"study.output_dir" is missing: the folder for the results, where a stopped study goes on.')
    return study


def expand(study: Study, base: Mapping[str, Any], samples: int) -> Plan:
    """All runs of a study on a training set of so many samples. Raises UserError where an arm makes no sense."""
    plan = Plan([], {}, [], [])
    config = parse(dict(base))

    def add(arm: str, budget: Budget, world_size: int, seed: int) -> None:
        this = parse(values_of(base, arm, world_size, budget, seed, samples, study.max_epochs))
        cell = Cell(arm, budget, world_size, seed, run_id(this))
        plan.cells.append(cell)
        plan.configs[cell.id] = this

    if STRONG in study.arms:
        for world_size in study.world_sizes:
            try:
                plan.strong.append((world_size, check_strong(config, world_size, samples)))
            except ImpossibleError as reason:
                plan.strong.append((world_size, str(reason)))
    budgets: list[Budget] = ["updates" if budget == "updates" else "epochs" for budget in study.budgets]
    groups = [(a, b, W) for b in budgets for a in WEAK if a in study.arms for W in study.world_sizes if W > 1]
    possible = []
    for arm, budget, world_size in groups:
        try:
            values_of(base, arm, world_size, budget, 0, samples, study.max_epochs)
            possible.append((arm, budget, world_size))
        except ImpossibleError as reason:
            plan.impossible.append((arm, budget, world_size, str(reason)))
    for seed in study.seeds:
        add(SEQUENTIAL, "epochs", 1, seed)
        for group in possible:
            add(*group, seed)
    return plan


def work(config: Config, samples: int) -> int:
    """Samples that a run goes through: what its time follows, as all runs have the same micro-batches."""
    trainer = config.trainer
    whole = trainer.epochs * samples
    return whole if trainer.max_steps is None else min(whole, trainer.max_steps * config.plan(1).global_batch_size)


def plan_text(study: Study, plan: Plan, samples: int) -> str:
    """The plan as a table, with what cannot be run and why."""
    rows: list[Sequence[str]] = []
    seeds = str(len(study.seeds))
    for cell in [c for c in plan.cells if c.seed == study.seeds[0]]:
        trainer = plan.configs[cell.id].trainer
        B = plan.configs[cell.id].plan(1).global_batch_size
        updates = trainer.epochs * (samples // B if trainer.drop_last else -(-samples // B))
        updates = min(updates, trainer.max_steps or updates)
        rows.append(
            (
                cell.arm,
                "-" if cell.arm == SEQUENTIAL else cell.budget,
                str(cell.world_size),
                f"{B:,}",
                str(trainer.epochs),
                f"{updates:,}",
                seeds,
            )
        )
    header = ("arm", "equal", "W", "global batch", "epochs", "updates", "seeds")
    lines = [table(rows, header)]
    for W, answer in plan.strong:
        if isinstance(answer, int):
            lines.append(f"strong, W = {W}: the sequential run; its {answer} micro-batches are dealt to {W} ranks")
        else:
            lines.append(f"strong, W = {W}: impossible, {answer}")
    lines += [f"{arm}, equal {budget}, W = {W}: impossible, {why}" for arm, budget, W, why in plan.impossible]
    tests, n = plan.comparisons(), len(study.seeds)
    if tests and 2.0**-n * tests > study.alpha:
        lines.append(
            f"note: with {n} seeds no verdict is possible on {tests} comparisons at alpha {study.alpha:g}; "
            f"at least {seeds_needed(tests, study.alpha)} are needed"
        )
    return "\n".join(lines)


class _Display:
    """A bar on a terminal, a plain line every tenth of the runs elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._next = total, 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="run", dynamic_ncols=True)

    def finished(self, done: int, cell: Cell, shown: str, left_s: float) -> None:
        text = f"{cell.arm} W={cell.world_size} seed {cell.seed}: {shown}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{text}; {duration(left_s)} left", refresh=False)
            self._bar.update(done - self._bar.n)
        elif done >= self._next:
            say(f"run {done:,} of {self._total:,}  {text}  {duration(left_s)} left")
            self._next = done + max(1, self._total // 10)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def study(path: str, dry_run: bool = False) -> int:
    """Plans and runs a study, or goes on with it, and writes its report.

    Returns:
        The exit code: 0; 1 if runs could not be made; 75 if it was stopped, to be started again.

    Raises:
        UserError: something has to change first; before any run.
    """
    declared, base, config = load(path)
    folder = Path(declared.output_dir)
    parallel = _parallel(config, declared.max_parallel)
    slots = Slots(cuda=parallel[0])
    total = 0
    try:
        with _interruptible():
            slots.grow(1)
            slots.send(0, "probe", config)
            (answer,) = slots.wait([0])
            if answer[1] != "done":
                raise UserError(answer[2]) if answer[1] == "error" else WorkerError(answer[2])
            probe = answer[2]
            samples = probe["samples"]["train"]
            plan = expand(declared, base, samples)
            say(plan_text(declared, plan, samples), "")
            total = len(plan.configs)
            if dry_run:
                say(f"{total:,} runs, {parallel[1]} at a time; nothing was started")
                return 0
            with _locked(folder):
                _declare(folder, declared, base, plan, probe)
                shutil.rmtree(folder / "running", ignore_errors=True)
                return _make(declared, plan, probe, folder, slots, parallel[1])
    except KeyboardInterrupt:
        done = len(finished(folder))
        say("", f"stopped: {done:,} of {total:,} runs are finished and kept. The same command goes on from there.")
        return Stopped.exit_code
    finally:
        slots.close()


def _parallel(config: Config, wanted: int | None) -> tuple[bool, int]:
    """Whether runs use GPUs, and how many there are at a time."""
    gpus = 0
    if config.trainer.device != "cpu":
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cores = len(os.sched_getaffinity(0)) // config.trainer.cpu_threads
    return gpus > 0, min(wanted or 10**6, gpus or max(1, cores))


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM then means what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made and held against a second study. Raises UserError."""
    from filelock import FileLock, Timeout

    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder} is in use: another study runs there.") from None


def _declare(folder: Path, declared: Study, base: Mapping[str, Any], plan: Plan, probe: Mapping[str, Any]) -> None:
    """Writes study.json, or finds that it says the same. Raises UserError if a study was declared otherwise."""
    fixed = dataclasses.asdict(declared)
    del fixed["max_parallel"], fixed["output_dir"]
    values = {
        "study": fixed,
        "base": base,
        "samples": probe["samples"],
        "data_sha256": probe["data_sha256"],
        "cells": [dataclasses.asdict(cell) for cell in plan.cells],
        "impossible": plan.impossible,
        "strong": plan.strong,
        "command": shlex.join(["python", "-m", "trainer", *sys.argv[1:]]),
        "declared_at_s": time.time(),
    }
    values = json.loads(to_json(values))
    file = folder / "study.json"
    if not file.exists():
        _write(file, values)
        return
    before = read_json(file)
    for part in ("study", "base", "data_sha256"):
        if before.get(part) != values[part]:
            keys = [k for k in values[part] if (before.get(part) or {}).get(k) != values[part][k]]
            raise UserError(
                f"{folder} holds a study that was declared otherwise: {part} differs in {', '.join(keys)}.\n"
                "What is judged, and how, is declared before the runs. Choose another study.output_dir."
            )
    if before.get("cells") != values["cells"]:
        raise UserError(
            f"{folder} holds a study that was planned by other code. Choose another study.output_dir, or that version."
        )


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file at once: it is there whole, or not at all."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(to_json(values, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Run id -> result, of all runs that have come to their end."""
    results = {}
    for file in sorted((folder / "runs").glob("*.json")):
        result = read_json(file)
        results[str(result["id"])] = result
    return results


def metric_of(result: Mapping[str, Any], metric: str) -> float | None:
    """The declared metric of a result; None where the run stopped being finite."""
    split, name = metric.split("/")
    value = result["metrics"].get(split, {}).get(name)
    return None if value is None else float(value)


def _make(declared: Study, plan: Plan, probe: dict[str, Any], folder: Path, slots: Slots, parallel: int) -> int:
    """Makes the runs that are missing, the first alone to time it, then as many at a time as there are slots."""
    from .study_report import verdicts, write_report

    samples = probe["samples"]["train"]
    results = finished(folder)
    cells = {cell.id: cell for cell in reversed(plan.cells)}
    waiting = [i for i in dict.fromkeys(cell.id for cell in plan.cells) if i not in results]
    effort = {i: work(plan.configs[i], samples) for i in waiting}
    total, made_s, made = len(plan.configs), 0.0, 0
    done = total - len(waiting)
    say(f"{total:,} runs, {done:,} of them finished before; {min(parallel, max(1, len(waiting)))} at a time")
    idle, busy, failed = [0], dict[int, str](), dict[str, str]()
    display = _Display(total, done)
    try:
        while waiting or busy:
            while waiting and idle:
                slot, this = idle.pop(), waiting.pop(0)
                slots.send(slot, "run", plan.configs[this], str(folder / "running" / this))
                busy[slot] = this
            for slot, kind, value in slots.wait(list(busy)):
                this = busy.pop(slot)
                idle.append(slot)
                cell = cells[this]
                if kind != "done":
                    failed[this] = f"{cell.arm}, W = {cell.world_size}, seed {cell.seed}: {value}"
                    continue
                result = _result(cell, plan.configs[this], value, probe)
                _check_metric(declared.metric, result)
                _write(folder / "runs" / f"{this}.json", result)
                is_first = not made
                done, made, made_s = done + 1, made + effort[this], made_s + result["wall_time_s"]
                left_s = sum(effort[i] for i in [*waiting, *busy.values()]) * made_s / made / parallel
                if is_first and waiting:
                    say(f"the first run took {made_s:.1f} s; the {total - done:,} others will take {duration(left_s)}")
                    slots.grow(parallel)
                    idle += range(1, parallel)
                value = metric_of(result, declared.metric)
                shown = result["status"] if value is None else f"{declared.metric} {value:.4f}"
                display.finished(done, cell, shown, left_s)
            if len(failed) > 2 and not made:
                break
    except WorkerError as error:
        say("", f"{error}. {done:,} of {total:,} runs are finished and kept; the same command goes on from there.")
        return 1
    finally:
        display.close()
        slots.close()
        shutil.rmtree(folder / "running", ignore_errors=True)
    if failed:
        say(f"{len(failed):,} runs could not be made, and are tried again by the same command. The first:")
        say(next(iter(failed.values())))
        return 1
    say("", *verdicts(folder), "", f"report: {write_report(folder)}")
    return 0


def _result(cell: Cell, config: Config, summary: Mapping[str, Any], probe: Mapping[str, Any]) -> dict[str, Any]:
    facts = probe["facts"]
    kept = ("parameters_sha256", "model_sha256", "exactness", "samples_per_s", "step_time_s", "time_to_first_step_s")
    return {
        **dataclasses.asdict(cell),
        "status": summary["status"],
        "reason": summary.get("reason"),
        "global_batch_size": config.plan(1).global_batch_size,
        "micro_batch_size": config.plan(1).micro_batch_size,
        "epochs": config.trainer.epochs,
        "steps": summary["steps"],
        "metrics": summary["metrics"],
        "best": summary.get("best"),
        **{name: summary.get(name) for name in kept},
        "started_at_s": summary["started_at_s"],
        "wall_time_s": summary["wall_time_s"],
        "code_sha256": facts["code_sha256"],
        "device_model": facts["device_model"],
        "facts": facts,
        "config": config.as_dict(),
    }


def _check_metric(metric: str, result: Mapping[str, Any]) -> None:
    split, name = metric.split("/")
    metrics = result["metrics"]
    if metrics and name not in metrics.get(split, {}):
        known = [f"{s}/{m}" for s, values in metrics.items() for m in values]
        raise UserError(f'"study.metric" is "{metric}", which this task does not measure. {near(metric, known)}')
