"""The order of a study's runs, with made-up results: searches first, then the runs with what they found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.study.made_up import planned, write
from trainer.study.agenda import Agenda
from trainer.study.declaration import Plan


def plan_of(folder: Path) -> Plan:
    study = {
        "seeds": 6, "arms": ["weak", "weak_tuned"], "world_sizes": [2],
        "tuning": {"searches": 5, "spread": 2, "warmup_epochs": [], "momentum": [0.7, 0.9], "seeds": 2},
    }  # fmt: skip
    return planned(write(folder, study))[1]


def result_of(config: Any) -> dict[str, Any]:
    """The higher the rate, the better."""
    value = 0.5 + config.optimizer.params["lr"]
    return {"metrics": {"validation": {"accuracy": value, "loss": 1 - value}}}


def made(agenda: Agenda, results: dict[str, Any], most: int = 10_000) -> list[str]:
    runs: list[str] = []
    while len(runs) < most and (this := agenda.next()) is not None:
        results[this] = result_of(agenda.configs[this])
        agenda.take(this)
        runs.append(this)
    return runs


def test_searches_come_first_and_their_runs_after_them(tmp_path: Path) -> None:
    """Ten searches of 4 + 2 runs: two places, five seeds each. Then 12 given runs, and 10 with what was found."""
    plan, results = plan_of(tmp_path), dict[str, Any]()
    agenda = Agenda(plan, tmp_path / "out", results)
    assert plan.runs() == 10 * 6 + 12 + 10
    assert len(agenda.left()) + agenda.unknown() == plan.runs()
    runs = made(agenda, results)
    assert len(set(runs)) == len(runs) == agenda.done() == plan.runs()
    assert agenda.unknown() == 0
    seeds = [agenda.configs[this].trainer.seed for this in runs]
    assert min(seeds[:60]) > 1_000_000 > max(seeds[60:])
    found = json.loads((tmp_path / "out" / "tuning" / "found.json").read_text())
    assert len(found) == 10
    for search in found.values():
        assert search["best"]["lr"] == max(trial["lr"] for trial in search["trials"])
        for this in search["ids"].values():
            config = agenda.configs[this]
            assert config.trainer.seed == search["seed"]
            assert config.optimizer.params["lr"] == search["best"]["lr"]
            assert config.optimizer.params["betas"][0] == search["best"]["momentum"]
    # Each judged run has a search of its own.
    assert len({search["best"]["lr"] for search in found.values()}) == 10


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    plan, results, alone = plan_of(tmp_path), dict[str, Any](), dict[str, Any]()
    whole = made(Agenda(plan, tmp_path / "whole", alone), alone)
    first = made(Agenda(plan, tmp_path / "out", results), results, 37)
    again = Agenda(plan, tmp_path / "out", results)
    assert again.done() == 37
    assert len(again.left()) + again.unknown() == plan.runs() - 37
    assert sorted(first + made(again, results)) == sorted(whole)
