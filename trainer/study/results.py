"""Reads and judges a study's folder, and lays its runs out as rows. Sentences and page are made from these."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.keys import TrainerOptions
from ..config.schema import build, read_json
from ..errors import UserError
from ..record.console import say
from ..wording import counted
from .arms import COMPARED, WEAK, Place, contrasted, id_of_values
from .budgets import variant_of
from .declaration import Study
from .judgement import Comparison, Judgement, Outcome, Rules, judge
from .prediction import speed_up
from .splits import REPEATED, split_of
from .timing import Timings, read_timings

# What study.json has to hold, and of which type.
_PARTS = {"study": dict, "base": dict, "cells": list, "searches": dict, "strong": list}
# The parts of study.json that say when and how it was started. They declare nothing.
_ORIGIN = ("command", "declared_at_s")


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """Run id -> result, of all finished runs. Other files in runs/ are ignored, with a note."""
    results = {}
    for file in sorted((folder / "runs").glob("*.json")):
        try:
            result = read_json(file)
        except UserError:
            result = {}
        # The name of a copy is not the id in it, and a config that was edited has another hash.
        if _is_result(result) and result.get("id") == file.stem == id_of_values(result["config"]):
            results[file.stem] = result
        else:
            say(f"note: {file} is not the result of a run, and is ignored")
    return results


def _is_result(result: Mapping[str, Any]) -> bool:
    if result.get("status") not in ("finished", "not finite"):
        return False
    if not all(isinstance(result.get(part), dict) for part in ("metrics", "facts", "config", "curves")):
        return False
    splits = result["metrics"].values()
    return isinstance(result["config"].get("trainer"), dict) and all(
        isinstance(split, dict) and all(value is None or isinstance(value, (int, float)) for value in split.values())
        for split in splits
    )


def digest_of(declared: Mapping[str, Any]) -> str:
    """A hash of what is declared before the runs. Each run keeps it, so that a later change is noticed.

    Args:
        declared: what study.json holds.
    """
    values = {part: value for part, value in declared.items() if part not in _ORIGIN}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def declared_otherwise(runs: Mapping[str, Mapping[str, Any]], digest: str) -> int:
    """How many runs were made under a declaration with another digest. Older runs kept none, and are not counted."""
    return sum(run.get("declaration_sha256", digest) != digest for run in runs.values())


def metric_of(result: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a result, named <split>/<metric>; None if it, or the run, is not finite."""
    split, name = metric.split("/")
    value = result["metrics"].get(split, {}).get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def outcome_of(result: Mapping[str, Any], metric: str, start: float | None = None) -> Outcome:
    """How a run ended: its metric, and its training loss before the first update (see `starts`) and at the end."""
    losses = result["curves"].get("train/loss", {"value": []})["value"]
    tenth = -(-len(losses) // 10)  # rounded up, so that a short curve has an end, too
    return Outcome(metric_of(result, metric), start, statistics.fmean(losses[-tenth:]) if tenth else None)


def starts(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The training loss of each run before its first update, as far as it is known: id -> loss.

    Runs of one seed and one model start from the same parameters. A run logs means over windows of updates, and the
    windows are longer in a longer run. So the start is the median of the first windows of some runs of this seed and
    model: of those with the shortest window. Otherwise a run would start lower only because it is longer.
    """
    windows: dict[str, list[tuple[int, float]]] = {}
    keys = {}
    for this, run in runs.items():
        trainer = run["config"].get("trainer", {})
        options = trainer.get("task_options")
        keys[this] = key = json.dumps([trainer.get("seed"), trainer.get("task"), options], sort_keys=True)
        curve = run["curves"].get("train/loss")
        if curve and curve["value"] and math.isfinite(curve["value"][0]):
            windows.setdefault(key, []).append((curve["step"][0], curve["value"][0]))
    shortest = {key: min(length for length, _ in found) for key, found in windows.items()}
    first = {
        key: statistics.median(loss for length, loss in found if length == shortest[key])
        for key, found in windows.items()
    }
    return {this: first[key] for this, key in keys.items() if key in first}


class Results:
    """A study's folder, read and judged.

    Attributes:
        folder: where it is.
        declared: study.json.
        study: the declaration in it.
        runs: id -> result.
        starts: id -> its training loss before the first update, where it is known.
        cells: of the declared cells those with a result, each with its id.
        planned: place -> declared seeds, of all places that are compared with sequential runs.
        repeats: the finished sequential runs of splits that have several seeds (see `splits`).
        searches: name -> trials and best settings, of searches that have ended.
        judgement: all numbers and verdicts.
        timings: of real ranks; None if there are none.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "study.json").is_file():
            raise UserError(f"{folder} is not a study's folder: it has no study.json.")
        self.folder = folder
        self.declared = read_json(folder / "study.json")
        damaged = sorted(part for part, kind in _PARTS.items() if not isinstance(self.declared.get(part), kind))
        if damaged or not isinstance(self.declared["base"].get("trainer"), dict):
            what = ", ".join(damaged) or "base.trainer"
            raise UserError(
                f"{folder / 'study.json'} is damaged, or not a study's: {what} is missing or of another kind."
            )
        self.study: Study = build(Study, self.declared["study"], "study.")
        if self.study.metric.count("/") != 1:
            raise UserError(f'{folder / "study.json"}: "study.metric" is "{self.study.metric}", not <split>/<metric>.')
        self.runs = finished(folder)
        found = folder / "tuning" / "found.json"
        self.searches: dict[str, dict[str, Any]] = read_json(found) if found.is_file() else {}
        ids = {key: this for search in self.searches.values() for key, this in search["ids"].items()}
        self.cells: list[dict[str, Any]] = []
        sequential: dict[Place, dict[int, Outcome]] = {}
        weak: dict[Place, dict[int, Outcome]] = {}
        self.starts = starts(self.runs)
        self._declared_runs: set[str] = set()
        self.planned: dict[Place, int] = {}
        for cell in self.declared["cells"]:
            place, seed = place_of(cell), cell["seed"]
            name = f"{place} seed {seed}"
            this = cell["id"] or ids.get(name)
            self._declared_runs.add(this or name)
            values = (weak if cell["arm"] in COMPARED else sequential).setdefault(place, {})
            if cell["arm"] in COMPARED:
                self.planned[place] = self.planned.get(place, 0) + 1
            if this in self.runs:
                self.cells.append({**cell, "id": this})
                values[seed] = outcome_of(self.runs[this], self.study.metric, self.starts.get(this))
        self.repeats: list[dict[str, Any]] = [r for r in self.declared.get("repeats", []) if r["id"] in self.runs]
        self._declared_runs |= {repeat["id"] for repeat in self.declared.get("repeats", [])}
        if not self.cells:
            raise UserError(f"{folder} holds no finished run yet.")
        weak = {place: values for place, values in weak.items() if values}
        self.judgement: Judgement = judge(
            sequential, weak, self.study.rules, self.planned, more=len(contrasted(self.planned))
        )
        self.timings: Timings | None = read_timings(folder)

    @property
    def rules(self) -> Rules:
        """The rules of judgement."""
        return self.study.rules

    @property
    def task(self) -> str:
        """What the study trains."""
        return str(self.declared["base"]["trainer"].get("task", "digits"))

    @property
    def variants(self) -> list[str]:
        """Names of the variants; the base's is empty."""
        return list(dict.fromkeys(cell["variant"] for cell in self.declared["cells"]))

    def budget(self, name: str) -> str:
        """A budget in words."""
        most = self.study.max_epochs
        return f"equal {name}" + (f", at most {most} epochs" if name == "updates" and most is not None else "")

    def named(self, variant: str, what: str, between: str = ": ") -> str:
        """Something of a variant, in words; among budgets the base is named by its epochs."""
        own = f"{epochs_of(self)['']:,} epochs" if self.study.epochs and not variant else variant
        return f"{own}{between}{what}" if own else what

    @property
    def weak(self) -> list[Comparison]:
        """The comparisons of weak runs with sequential ones: controls, which are not weak, are left out."""
        return [c for c in self.judgement.comparisons if c.place.arm in WEAK]

    def missing(self) -> int:
        """Runs that are declared and not finished."""
        return len(self._declared_runs - self.runs.keys())

    def doubts(self) -> list[str]:
        """What speaks against reading the verdicts as they stand, one sentence each."""
        lines = []
        if self.missing():
            lines.append(f"{self.missing():,} declared runs are missing: nothing is decided before they are there.")
        digest = digest_of(self.declared)
        if changed := declared_otherwise(self.runs, digest):
            lines.append(
                f"study.json has been changed: {counted(changed, 'run')} of {len(self.runs):,} had another "
                "declaration. So what is judged here was not declared before the runs."
            )
        for key, what in (("code_sha256", "versions of the code"), ("device_model", "device models")):
            found = {run[key] for run in self.runs.values()}
            if len(found) > 1:
                lines.append(f"The runs come from {len(found)} {what}, which give different bits.")
        for place, reference in self.judgement.references.items():
            n, lost, stuck = len(reference.outcomes), reference.not_finite, reference.failed.get("unconverged", 0)
            if n and max(lost, stuck) > n / 4:
                what = f"{lost} are not finite" if lost > n / 4 else f"{stuck} did not converge"
                lines.append(f"{place}: of its {counted(n, 'run')} {what}. Comparisons with them say little.")
        return lines

    def results_at(self, place: Place) -> list[dict[str, Any]]:
        """The results of a place, one a seed."""
        return [self.runs[cell["id"]] for cell in self.cells if place_of(cell) == place]

    def groups(self, variant: str, budget: str) -> dict[str, list[Comparison]]:
        """Arm -> its comparisons by W, of one variant and budget."""
        groups: dict[str, list[Comparison]] = {}
        for c in self.judgement.comparisons:
            if (c.place.variant, c.place.budget) == (variant, budget):
                groups.setdefault(c.place.arm, []).append(c)
        return groups

    def blocks(self) -> list[tuple[str, str]]:
        """(variant, budget) of all comparisons, in order."""
        return list(dict.fromkeys((c.place.variant, c.place.budget) for c in self.judgement.comparisons))


def place_of(cell: dict[str, Any]) -> Place:
    """Where a cell or a result stands."""
    return Place(cell["variant"], cell["arm"], cell["budget"], cell["world_size"])


def sizes_of(results: Results) -> dict[str, int]:
    """Variant -> its training samples, of the base and its subsets; empty where none was declared."""
    if not results.study.dataset_sizes:
        return {}
    known = results.declared["variant_samples"]
    names = ["", *(f"{n:,} samples" for n in results.study.dataset_sizes)]
    return {name: int(known[name]) for name in names}


def epochs_of(results: Results) -> dict[str, int]:
    """Variant -> its epochs, of all budgets in epochs; empty where none was declared."""
    if not results.study.epochs:
        return {}
    own = int(results.declared["base"]["trainer"].get("epochs", TrainerOptions.epochs))
    return {variant_of(n, own): n for n in sorted({own, *results.study.epochs})}


# ---- rows --------------------------------------------------------------------------------------------------------


def rows_of(results: Results) -> list[dict[str, Any]]:
    """One row for each cell with a result, and for each repeat that is no cell: plain values, the same keys in all."""
    names = sorted({f"{s}/{m}" for run in results.runs.values() for s, ms in run["metrics"].items() for m in ms})
    kept = ["status", "global_batch_size", "micro_batch_size", "samples", "epochs", "steps"]
    kept += ["exactness", "parameters_sha256", "started_at_s", "wall_time_s", "step_time_s", "samples_per_s"]
    kept += ["code_sha256", "device_model"]
    rows = []
    study, known = results.study, {cell["id"] for cell in results.cells}
    # Repeats get an arm of their own, because they are no judged runs.
    more: list[dict[str, Any]] = [
        {"variant": "", "arm": REPEATED, "budget": "epochs", "world_size": 1} | repeat
        for repeat in results.repeats
        if repeat["id"] not in known
    ]
    cells = [{**cell, "split": split_of(study.splits, study.seeds, cell["seed"])} for cell in results.cells]
    for cell in cells + more:
        run = results.runs[cell["id"]]
        facts = {f"version_{name}": run["facts"].get(name) for name in ("trainer", "python", "torch", "deepspeed")}
        noise = run.get("gradient_noise") or {}
        row = {k: cell[k] for k in ("variant", "arm", "budget", "world_size", "seed")}
        row |= {"split_seed": cell["split"], "config_sha256": cell["id"]}
        row |= {"learning_rate": _peak_rate(run), "base_learning_rate": run.get("learning_rate")}
        outcome = outcome_of(run, study.metric, results.starts.get(cell["id"]))
        row |= {k: run.get(k) for k in kept} | {"noise_scale_samples": noise.get("scale_samples")}
        row |= {"first_train_loss": outcome.first_loss, "last_train_loss": outcome.last_loss}
        rows.append(row | facts | {name: metric_of(run, name) for name in names})
    return rows


def _peak_rate(run: Mapping[str, Any]) -> float | None:
    """The highest learning rate that a run logged, its rule's factor included; the same for Adam and SGD."""
    values = run["curves"].get("train/learning_rate", {"value": []})["value"]
    return max(values) if values else None


def speed_ups(results: Results) -> tuple[dict[int, float], dict[int, float]]:
    """W -> median measured and W -> predicted speed-up of strong scaling, for every W that its plan allows."""
    timings = results.timings
    if timings is None:
        return {}, {}
    measured = {W: statistics.median(ratios) for W, ratios in timings.speed_ups().items() if ratios}
    predicted: dict[int, float] = {}
    if timings.measured is not None:
        sizes = {1, *(W for W, answer in results.declared["strong"] if isinstance(answer, int)), *measured}
        predicted = {W: speed_up(timings.measured, W) for W in sorted(sizes)}
    return measured, predicted
