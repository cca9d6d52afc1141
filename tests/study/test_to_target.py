"""Updates and epochs to a target, of runs made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.study.made_up import results
from trainer.study.arms import WEAK, Place
from trainer.study.declaration import Cell
from trainer.study.results import Results
from trainer.study.sentences import verdicts
from trainer.study.to_target import ToTarget, first_reached, scaling, target_sentences, way_of, ways

INF = math.inf


def test_the_first_value_that_is_as_good_counts() -> None:
    curve = {"step": [10, 20, 30], "epoch": [1, 2, 3], "value": [0.8, 0.9, 0.7]}
    assert first_reached(curve, 0.9, True) == (20, 2)
    assert first_reached(curve, 0.91, True) == (INF, INF)
    assert first_reached(curve, 0.75, False) == (30, 3)
    assert first_reached({"step": [], "epoch": [], "value": []}, 0.5, True) == (INF, INF)


def line(*numbers: tuple[int, float, float]) -> list[ToTarget]:
    """(W, updates, epochs) of typical runs."""
    return [ToTarget(Place("", "weak", "epochs", W), 32 * W, [u] * 3, [e] * 3, 1.0) for W, u, e in numbers]


def test_what_larger_batches_bring() -> None:
    """Perfect as long as no more samples are needed; ragged batches at the end of an epoch do not count."""
    found = scaling(line((1, 380, 10), (2, 190, 10), (4, 120, 12), (8, 100, 20), (16, 100, 34), (32, INF, INF)), 1.25)
    assert found == {
        "perfect scaling": [2, 4],
        "diminishing returns": [8],
        "no fewer updates than at a smaller W": [16],
        "target not reached by the typical run": [32],
    }
    assert scaling(line((1, 380, 10), (4, 120, 12)), 1.1) == {"diminishing returns": [4]}
    assert scaling(line((1, INF, INF), (2, 190, 10)), 1.25) == {
        "target reached, which the typical run at W = 1 does not": [2]
    }
    # Each W is listed: one that needs as few updates as a smaller one is no progress, whatever follows.
    assert scaling(line((1, 100, 2), (2, 90, 4), (4, 95, 8), (8, 60, 10)), 1.25) == {
        "diminishing returns": [2, 8], "no fewer updates than at a smaller W": [4],
    }  # fmt: skip


def test_runs_that_never_reach_it_are_infinite() -> None:
    way = ToTarget(Place("", "weak", "epochs", 2), 64, [10, 20, INF, INF, 30], [1, 2, INF, INF, 3], 1.0)
    assert (way.never, way.typical("updates", 0.25)[0]) == (2, 30)
    assert way.typical("epochs", 0.25) == (3, 2, INF)


def curves(cell: Cell) -> dict[str, Any]:
    """Validation every two epochs: the target is reached in epoch 6 up to W = 2, and at W = 8 in epoch 14, or never."""
    W = cell.world_size if cell.arm in WEAK else 1
    every, epochs = -(-1200 // (32 * W)), range(2, 21, 2)
    need = 6 if W < 8 else 14 if cell.seed % 3 else 99
    values = [0.96 if epoch >= need else 0.5 for epoch in epochs]
    curve = {"step": [every * epoch for epoch in epochs], "epoch": list(map(float, epochs)), "value": values}
    return {"eval/validation/accuracy": curve}


def made(folder: Path, **more: Any) -> Path:
    out = results(folder, seeds=6, curves=curves, target=0.95, arms=["weak"], **more)
    for file in (out / "runs").iterdir():
        run = json.loads(file.read_text())
        file.write_text(json.dumps(run | {"global_batch_size": 32 * run["world_size"]}))
    return out


def test_a_study_says_how_far_scaling_goes(tmp_path: Path) -> None:
    folder = made(tmp_path)
    first, said = target_sentences(Results(folder))
    assert "a description, and no verdict" in first and "validate every 2 epochs" in first
    assert said == (
        "weak, learning rate unchanged, equal epochs: perfect scaling at W = 2; diminishing returns at W = 8. "
        "W = 1: 228 updates, 6 epochs; W = 2: 114 updates, 6 epochs; W = 8: 70 updates, 14 epochs (2 of 6 runs never)."
    )
    assert {first, said} <= set(verdicts(folder))
    (way,) = (way for way in ways(Results(folder), "", "epochs")["weak"] if way.place.world_size == 8)
    assert way.batch == 256


def test_without_a_target_or_a_history_nothing_is_said(tmp_path: Path) -> None:
    assert target_sentences(Results(results(tmp_path, seeds=2, curves=curves))) == []
    (tmp_path / "b").mkdir()
    old = {"eval/validation/accuracy": {"epoch": [1.0], "value": [0.99]}}  # records of earlier versions have no steps
    read = Results(results(tmp_path / "b", seeds=2, curves=old, target=0.9))
    assert way_of(read, Place("", "weak", "epochs", 2)) is None
    assert target_sentences(read) == ["Updates to the target are not known: too few runs have validation/accuracy."]


def test_a_run_that_broke_off_early_never_reaches_it(tmp_path: Path) -> None:
    folder = made(tmp_path)
    file = next(f for f in (folder / "runs").iterdir() if json.loads(f.read_text())["world_size"] == 2)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"curves": {}, "status": "not finite", "metrics": {}}))
    way = way_of(Results(folder), Place("", "weak", "epochs", 2))
    assert way is not None and (way.never, len(way.updates)) == (1, 6)


def test_the_figure_has_both_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e .[study]")
    from tests.study.test_album import made as figures

    monkeypatch.setattr("trainer.study.album._draw_block", lambda *_: None)  # the other figures
    noise = {"trace": 100.0, "gradient_squared": 1.0, "scale_samples": 100.0}
    text = figures(made(tmp_path, noise=noise))["to-target-epochs"]
    for needed in ("updates to the target", "epochs to the target", "perfect scaling", "gradient noise scale", "256"):
        assert needed in text
    assert "not reached" not in text
