"""Whole cross-validations, small ones: what they leave, what is not repeated, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import train
from tests.folds.small import STRONG, overrides
from tests.standing import run_ranks
from trainer.errors import UserError
from trainer.folds.declaration import Place, load
from trainer.folds.runner import cross_validate


def test_finished_runs_stay_and_what_is_missing_is_made_again(made: Path, capsys: Any) -> None:
    """As after a kill: one run is gone, one has only its checkpoints."""
    before, stamps = (made / "predictions.csv").read_bytes(), {}
    shutil.rmtree(made / "runs" / "repeat-0-fold-0")
    for name in ("summary.json", "fold_predictions.csv"):
        (made / "runs" / "repeat-0-fold-1" / name).unlink()
    kept = made / "runs" / "repeat-0-fold-2" / "summary.json"
    stamps[kept] = kept.stat().st_mtime_ns
    assert cross_validate(STRONG, overrides(made)) == 0
    assert (made / "predictions.csv").read_bytes() == before
    assert kept.stat().st_mtime_ns == stamps[kept]
    printed = capsys.readouterr().out
    assert "1 of 3 runs were finished before" in printed
    assert printed.rstrip().endswith("report.html")


def test_another_declaration_is_refused(made: Path) -> None:
    with pytest.raises(UserError, match=r"another cross-validation. These differ: trainer\."):
        cross_validate(STRONG, overrides(made, **{"trainer.epochs": 2}))
    with pytest.raises(UserError, match=r"cross_validation\.seed"):
        cross_validate(STRONG, overrides(made, **{"cross_validation.seed": 2}))
    # Folds of two versions of a task would be one mean.
    state = made / "cross_validation.json"
    before = state.read_text()
    known = json.loads(before)["known"] | {"task_code_sha256": "of another version"}
    state.write_text(json.dumps(json.loads(before) | {"known": known}))
    with pytest.raises(UserError, match="These differ: the code of the task"):
        cross_validate(STRONG, overrides(made))
    state.write_text(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_validation.metric": "acuracy"}, 'Did you mean "accuracy"'),
        ({"cross_validation.folds": 175}, "the smallest has 174"),
        ({"trainer.task_options": {"modl": "mlp"}}, 'Did you mean "model"'),
        ({"train_batch_size": 1200}, "less than the global batch of 1,200"),
    ],
)
def test_bad_input_costs_no_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cross_validate(STRONG, overrides(tmp_path / "cv", **change))
    assert not (tmp_path / "cv").exists()


def test_a_fold_has_the_same_bits_at_two_ranks_and_in_another_slot(made: Path, tmp_path: Path) -> None:
    import dataclasses

    fraction = json.loads((made / "cross_validation.json").read_text())["known"]["validation_fraction"]
    config = load(STRONG, overrides(made)).run_config(Place(0, 1), fraction)
    trainer = dataclasses.replace(config.trainer, output_dir=str(tmp_path / "two"))
    run: Callable[..., Any] = run_ranks
    summary = run(train, 2, dataclasses.replace(config, trainer=trainer))[0]
    own = json.loads((made / "runs" / "repeat-0-fold-1" / "summary.json").read_text())
    assert summary["parameters_sha256"] == own["parameters_sha256"]
    first = (made / "runs" / "repeat-0-fold-1" / "fold_predictions.csv").read_bytes()
    assert (tmp_path / "two" / "fold_predictions.csv").read_bytes() == first


def test_a_stopped_dry_run_claims_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.folds.runner._examined", stopped)
    for dry_run, said in ((True, "stopped: nothing was started"), (False, "0 of 3 runs are finished and kept")):
        assert cross_validate(STRONG, overrides(tmp_path / "cv"), dry_run) == 75
        assert said in capsys.readouterr().out
