"""The runs of a study, as its file names them: what was planned is found again when the results are read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tests.study.made_up import planned, write
from trainer.study.arms import SEQUENTIAL, Place
from trainer.study.results import place_of


def test_a_cell_that_is_written_and_read_stands_at_its_place(tmp_path: Path) -> None:
    """Results are put beside one another by their places, so none of its parts may be lost in study.json."""
    study = {
        "seeds": 5, "arms": ["weak", "weak_tuned"], "world_sizes": [2, 4], "budgets": ["epochs", "updates"],
        "variants": {"wide": {"trainer.task_options.width": 9}}, "tuning": {"searches": 5},
    }  # fmt: skip
    _, plan = planned(write(tmp_path, study))
    read = json.loads(json.dumps([dataclasses.asdict(cell) for cell in plan.cells]))
    assert [place_of(cell) for cell in read] == [cell.place for cell in plan.cells]
    # No two cells share a place and a seed: the later would take the earlier one's results.
    assert len({(cell.place, cell.seed) for cell in plan.cells}) == len(plan.cells)
    for search in plan.searches.values():
        assert Place(**json.loads(json.dumps(dataclasses.asdict(search)))["place"]) == search.place


def test_a_repeat_stands_with_the_sequential_runs_of_the_base(tmp_path: Path) -> None:
    """The first run of its split is the judged run itself, with the same id; the others are no cells."""
    study = {"seeds": 4, "splits": {"repeated": 3, "seeds": 3}, "arms": ["weak"], "world_sizes": [2]}
    _, plan = planned(write(tmp_path, study | {"variants": {"wide": {"trainer.task_options.width": 9}}}))
    judged = {cell.id for cell in plan.cells if cell.place == Place("", SEQUENTIAL, "epochs", 1)}
    assert {repeat.place for repeat in plan.repeats} == {Place("", SEQUENTIAL, "epochs", 1)}
    by_split: dict[int, list[bool]] = {}
    for repeat in plan.repeats:
        by_split.setdefault(repeat.split, []).append(repeat.id in judged)
    assert by_split == {split: [True, False, False] for split in (0, 1, 2)}
