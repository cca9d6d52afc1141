"""Each judged run has a split of its own: what is declared, planned, searched and refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_up import planned, write
from trainer.config.keys import parse
from trainer.errors import UserError
from trainer.study.agenda import Agenda
from trainer.study.arms import SEQUENTIAL, Place
from trainer.study.load import load_study
from trainer.study.splits import Splits, check_probes, more_seeds, on_split

BASE = Place("", SEQUENTIAL, "epochs", 1)


def split_in(config: Any) -> int:
    return int(config.trainer.task_options["split_seed"])


def test_all_runs_of_a_seed_share_its_split_and_no_two_seeds_do(tmp_path: Path) -> None:
    study = {
        "seeds": [7, 3, 5], "splits": {"first": 20}, "arms": ["weak", "weak_sqrt"], "world_sizes": [2, 4],
        "variants": {"short": {"trainer.epochs": 5}}, "dataset_sizes": [400],
    }  # fmt: skip
    _, plan = planned(write(tmp_path, study))
    found: dict[int, set[int]] = {}
    for cell in plan.cells:
        assert cell.id is not None
        found.setdefault(cell.seed, set()).add(split_in(plan.configs[cell.id]))
    assert found == {7: {20}, 3: {21}, 5: {22}}


def test_a_search_uses_the_split_of_the_run_that_it_is_for(tmp_path: Path) -> None:
    """Else a rate would be chosen on samples that the judged run is tested on."""
    study = {
        "seeds": 5, "splits": {"first": 3, "repeated": 0}, "arms": ["weak_tuned"], "world_sizes": [2],
        "tuning": {"searches": 5, "spread": 2, "warmup_epochs": [], "momentum": [], "seeds": 2},
    }  # fmt: skip
    _, plan = planned(write(tmp_path, study))
    results: dict[str, Any] = {}
    agenda = Agenda(plan, tmp_path / "out", results)
    while (this := agenda.next()) is not None:
        results[this] = {"metrics": {"validation": {"accuracy": 0.9, "loss": 0.1}}}
        agenda.take(this)
    trials: dict[int, set[int]] = {}
    for name, search in plan.searches.items():
        for this in agenda._searches[name].configs:
            trials.setdefault(search.seed, set()).add(split_in(agenda.configs[this]))
    assert trials == {seed: {3 + seed} for seed in range(5)}
    judged = {(place, seed): this for this, (place, seed) in agenda.labels.items() if seed < 5}
    assert len(judged) == 3 * 5
    assert all(split_in(agenda.configs[this]) == 3 + seed for (_, seed), this in judged.items())


def test_some_splits_get_seeds_that_no_other_split_has(tmp_path: Path) -> None:
    """Their first run is the judged one, which is made once."""
    _, plan = planned(write(tmp_path, {"seeds": 12, "splits": {}, "arms": ["weak"], "world_sizes": [2]}))
    assert (len(plan.repeats), len({r.id for r in plan.repeats})) == (30, 30)
    assert {r.split for r in plan.repeats} == set(range(10))
    assert len({r.seed for r in plan.repeats}) == 30
    assert len({r.id for r in plan.repeats} & {c.id for c in plan.cells}) == 10
    assert plan.runs() == 12 * 2 + 20
    for r in plan.repeats:
        config = plan.configs[r.id]
        assert (split_in(config), config.trainer.seed) == (r.split, r.seed)
        assert (config.train_batch_size, r.place) == (32, BASE)
    agenda = Agenda(plan, tmp_path / "out", {})
    assert sorted(agenda.left()) == sorted(plan.configs)
    # A try with two seeds has no splits to compare.
    _, plan = planned(write(tmp_path, {"seeds": 2, "splits": {}, "arms": ["weak"], "world_sizes": [2]}))
    assert plan.repeats == []


def test_without_splits_nothing_changes(tmp_path: Path) -> None:
    _, plan = planned(write(tmp_path, {"seeds": 3, "arms": ["weak"], "world_sizes": [2]}))
    assert not any("split_seed" in config.trainer.task_options for config in plan.configs.values())
    assert more_seeds(None, [1, 2]) == plan.repeats == []


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"seeds": 5, "splits": {"repeated": 6}}, '"study.splits.repeated" (6) must be at most the number of'),
        ({"seeds": 5, "splits": {"repeated": 2}}, "use 3 or more, or 0 for none"),
        ({"seeds": 5, "splits": {"seeds": 1}}, "must be at least 2"),
        ({"seeds": 5, "splits": {"frist": 1}}, 'Did you mean "first"'),
        ({"seeds": [1, 2, 1_000_002], "splits": {}}, "seeds from 1000003 on belong to searches"),
        (
            {"seeds": 5, "splits": {}, "variants": {"other": {"trainer.task_options.split_seed": 4}}},
            '"trainer.task_options.split_seed" has no place beside "study.splits"',
        ),
        ({"seeds": 5, "splits": {}, "variants": {"fold": {"trainer.fold": {}}}}, '"trainer.fold" has no place beside'),
    ],
)
def test_what_is_refused_before_the_data_are_read(tmp_path: Path, study: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_study(str(write(tmp_path, study)))


def probe(test: str, train: int = 100) -> dict[str, Any]:
    return {"samples": {"train": train}, "data_sha256": {"train": f"train of {test}", "test": test}}


def test_data_that_are_never_drawn_again_are_refused() -> None:
    """A test set that the data bring with them is the same whatever split_seed is; so is the end of one text."""
    check_probes({0: probe("a"), 1: probe("b")}, "test/accuracy")
    with pytest.raises(UserError, match=r"all 2 split seeds give the same test samples of variant \"mlp\""):
        check_probes({0: probe("a"), 1: probe("a")}, "test/accuracy", "mlp")
    with pytest.raises(UserError, match="the data have no validation split"):
        check_probes({0: probe("a"), 1: probe("b")}, "validation/accuracy")
    with pytest.raises(UserError, match=r"there are 90 to 100 of them.*\"trainer\.train_samples\" to at most 90"):
        check_probes({0: probe("a"), 1: probe("b", 90)}, "test/accuracy")


def test_a_base_on_a_split_keeps_its_other_options() -> None:
    config = parse({"train_batch_size": 8, "trainer": {"task_options": {"model": "mlp"}}})
    assert on_split(config, None) is config
    assert on_split(config, 4).trainer.task_options == {"model": "mlp", "split_seed": 4}
    assert Splits().repeated_of(40) == 10
