"""What the command does around its runs: what it checks before them, and what it writes of them. Made of no real run.

Whole studies are in tests/distributed/test_study.py.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_up import planned, write
from trainer.errors import UserError
from trainer.study.cells import Cell
from trainer.study.load import load_study
from trainer.study.results import digest_of
from trainer.study.runner import _check_packages, _check_split, _declare, _probed, _result, declaration

PROBE = {"samples": {"train": 1200, "validation": 297, "test": 300}, "data_sha256": {"test": "a" * 64}}


class Probing:
    """A process that looks at data, in a runner's place; `says` is its answer to a config."""

    def __init__(self, says: Any) -> None:
        self._says, self._config = says, None

    def send(self, slot: int, kind: str, config: Any) -> None:
        self._config = config

    def wait(self, slots: list[int]) -> list[tuple[int, str, Any]]:
        return [(0, *self._says(self._config.trainer.task_options))]


def test_a_mistake_that_has_nothing_to_do_with_the_split_is_not_blamed_on_it(tmp_path: Path) -> None:
    study, variants = load_study(str(write(tmp_path, {"seeds": 3, "splits": {}, "arms": ["weak"]})))
    with pytest.raises(UserError, match=r'^unknown key "target"'):
        _probed(Probing(lambda options: ("error", 'unknown key "target"')), study, variants)  # type: ignore[arg-type]
    of_splits = Probing(lambda o: ("error", "no split_seed here") if "split_seed" in o else ("done", {"samples": {}}))
    with pytest.raises(UserError, match=r"split_seed 0\. With it the task digits says: no split_seed here"):
        _probed(of_splits, study, variants)  # type: ignore[arg-type]


def test_a_declaration_may_be_mended_until_there_is_a_run(tmp_path: Path) -> None:
    """After that, what is judged stays as it was declared; the message names the key that differs."""
    (folder := tmp_path / "study").mkdir()
    few = {"seeds": 3, "arms": ["weak"], "world_sizes": [2]}
    _declare(folder, planned(write(tmp_path, few))[1], PROBE)
    _, mended = planned(write(tmp_path, few | {"margin": 0.5}))
    _declare(folder, mended, PROBE)
    assert json.loads((folder / "study.json").read_text())["study"]["margin"] == 0.5
    (folder / "runs" / "one.json").write_text("{}")
    _declare(folder, mended, PROBE)  # the same again is no change
    # Nor is what changes no result.
    _declare(folder, planned(write(tmp_path, few | {"margin": 0.5, "max_parallel": 1, "timing": None}))[1], PROBE)
    before = (folder / "study.json").read_text()
    with pytest.raises(UserError, match="with another declaration: study differs in margin"):
        _declare(folder, planned(write(tmp_path, few))[1], PROBE)
    with pytest.raises(UserError, match="with another declaration: base differs in trainer"):
        _declare(folder, planned(write(tmp_path, few | {"margin": 0.5}, epochs=3))[1], PROBE)
    with pytest.raises(UserError, match="with another declaration: data_sha256 differs in test"):
        _declare(folder, mended, PROBE | {"data_sha256": {"test": "b" * 64}})
    assert (folder / "study.json").read_text() == before


def test_the_time_and_the_command_are_no_part_of_what_is_declared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest that each run keeps is the same when the study is started again."""
    _, plan = planned(write(tmp_path, {"seeds": 2, "arms": ["weak"], "world_sizes": [2]}))
    first = declaration(plan, PROBE)
    monkeypatch.setattr("sys.argv", ["trainer", "study", "other.json", "--set", "a b=1"])
    monkeypatch.setattr("time.time", lambda: 7.0)
    again = declaration(plan, PROBE)
    assert again["command"] == "python -m trainer study other.json --set 'a b=1'"
    assert again["declared_at_s"] == 7.0
    assert digest_of(again) == digest_of(first)
    assert digest_of(again | {"data_sha256": {"test": "b" * 64}}) != digest_of(first)


def test_a_package_that_is_missing_is_named_before_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LARS and LAMB need one more than the others; what a study does not use is not asked for."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytorch_optimizer" else object())
    study, _ = load_study(str(write(tmp_path, {"arms": ["weak"]})))
    _check_packages(study)
    study, _ = load_study(str(write(tmp_path, {"arms": ["weak", "weak_lamb"]})))
    with pytest.raises(UserError, match=r"A study needs pytorch_optimizer \(for LARS and LAMB\)\.(?s:.*)pip install"):
        _check_packages(study)


def test_a_metric_must_be_of_a_split_that_is_evaluated(tmp_path: Path) -> None:
    study, _ = load_study(str(write(tmp_path, {"metric": "test/accuracy"})))
    _check_split(study, PROBE)
    study, _ = load_study(str(write(tmp_path, {"tuning": {"metric": "holdout/accuracy"}})))
    with pytest.raises(UserError, match=r'"study.tuning.metric" is "holdout/accuracy", but .* validation, test\.'):
        _check_split(study, PROBE)
    study, _ = load_study(str(write(tmp_path, {"metric": "train/accuracy"})))
    with pytest.raises(UserError, match=r'"study.metric" is "train/accuracy", but .* are validation, test\.'):
        _check_split(study, PROBE)


def test_a_result_tells_epochs_by_the_batch_of_its_own_arm(tmp_path: Path) -> None:
    """At W = 4 an epoch of 1,200 samples has 10 batches of 128, so its 20 epochs end with step 200."""
    _, plan = planned(write(tmp_path, {"seeds": 2, "arms": ["weak"], "world_sizes": [4]}))
    cell = next(cell for cell in plan.cells if cell.arm == "weak")
    assert cell.id is not None
    summary = {
        "status": "finished", "steps": 200, "metrics": {"test": {"accuracy": 0.9}}, "started_at_s": 1.0,
        "wall_time_s": 2.0, "curves": {"train/loss": {"step": [5, 200], "value": [2.0, 1.0]}},
    }  # fmt: skip
    probe = {"facts": {"code_sha256": "c" * 64, "device_model": "a machine"}}
    result = _result(cell, plan.configs[cell.id], summary, probe, 1200)
    assert result["curves"]["train/loss"] == {"epoch": [0.5, 20.0], "step": [5, 200], "value": [2.0, 1.0]}
    assert (result["global_batch_size"], result["epochs"], result["samples"]) == (128, 20, 1200)
    assert Cell(**{name: result[name] for name in ("arm", "budget", "world_size", "seed", "variant", "id")}) == cell
    assert json.loads(json.dumps(result)) == result  # as it is written, so it is read
