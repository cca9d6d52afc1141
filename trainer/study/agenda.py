"""Which run of a study comes next: trials of searches first, then the runs with the settings that were found."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..files import write_json
from .arms import Place, run_id
from .cells import Cell
from .declaration import Plan
from .results import metric_of
from .tuning import Search


class Agenda:
    """The runs that are left. Trials come first, because the later ones have to wait for them."""

    def __init__(self, plan: Plan, folder: Path, results: dict[str, dict[str, Any]]) -> None:
        self._plan, self._file, self._results = plan, folder / "tuning" / "found.json", results
        self.configs = dict(plan.configs)
        self.labels: dict[str, tuple[Place, int]] = {}
        self._fixed: collections.deque[str] = collections.deque()
        self._trials: collections.deque[str] = collections.deque()
        self._known: set[str] = set()
        study = plan.study
        self._searches = {
            name: Search(
                name,
                # `of=search` keeps this turn's search: without it, all would use that of the last turn.
                lambda settings, seed, of=search: plan.config(of.place, seed, settings, of.seed),  # type: ignore[misc]
                search.centre,
                study.tuning,
                study.direction == "max",
            )
            for name, search in plan.searches.items()
        }
        self._search_of = {this: name for name, search in self._searches.items() for this in search.configs}
        self._cells: dict[str, list[Cell]] = {name: [] for name in plan.searches}
        self._found: dict[str, dict[str, Any]] = {}
        for cell in plan.cells:
            if cell.id is None:
                self._cells[plan.tuned[cell.place, cell.seed]].append(cell)
            else:
                self._add(cell.id, plan.configs[cell.id], cell.place, cell.seed, self._fixed)
        for repeat in plan.repeats:
            self._add(repeat.id, plan.configs[repeat.id], repeat.place, repeat.seed, self._fixed)
        # Results of earlier calls move a search on, so an interrupted study continues where it was.
        for name in list(self._searches):
            self._advance(name)

    def _add(self, this: str, config: Config, place: Place, seed: int, queue: collections.deque[str]) -> None:
        # Places can share a run: where a search finds the base's own rate, for example.
        if this in self._known:
            return
        self._known.add(this)
        self.configs[this], self.labels[this] = config, (place, seed)
        if this not in self._results:
            queue.append(this)

    def _advance(self, name: str) -> None:
        """Continues a search as far as there are results."""
        search, at = self._searches[name], self._plan.searches[name].place
        metric = self._plan.study.tuning_metric
        while wanted := search.next_runs():
            for this in wanted:
                self._search_of[this] = name
                self._add(this, search.configs[this], at, search.configs[this].trainer.seed, self._trials)
            known = [this for this in wanted if this in self._results]
            if not known:
                return
            for this in known:
                result = self._results[this]
                search.take(this, metric_of(result, metric), metric_of(result, f"{metric.split('/')[0]}/loss"))
        if name not in self._found:
            ids = {}
            for cell in self._cells[name]:
                config = self._plan.config(cell.place, cell.seed, search.best)
                this = run_id(config)
                ids[f"{cell.place} seed {cell.seed}"] = this
                self._add(this, config, cell.place, cell.seed, self._fixed)
            plan = self._plan.searches[name]
            about = {"place": dataclasses.asdict(plan.place), "seed": plan.seed, "centre": plan.centre, "ids": ids}
            self._found[name] = search.record() | about
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._found)

    def next(self) -> str | None:
        """The next run to start; None if all remaining runs wait for others."""
        queue = self._trials or self._fixed
        return queue.popleft() if queue else None

    def take(self, this: str) -> None:
        """Must be called when a run has ended and is in the results: its search moves on."""
        if this in self._search_of:
            self._advance(self._search_of[this])

    def left(self) -> list[str]:
        """Runs that wait to be started, as far as their configs are known."""
        return [*self._trials, *self._fixed]

    def done(self) -> int:
        """Runs of this study that are finished."""
        return len(self._known & self._results.keys())

    def unknown(self) -> int:
        """Runs whose configs are not known yet."""
        asked = {this for search in self._searches.values() for this in search.configs}
        later = sum(search.left() for search in self._searches.values()) - len(asked - self._results.keys())
        return later + sum(len(self._cells[name]) for name in self._searches if name not in self._found)
