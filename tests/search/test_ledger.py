"""Optuna's part: what is drawn does not depend on interruptions, and a journal that was cut off is mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.search.small import write
from trainer.search.declaration import load_search
from trainer.search.ledger import JOURNAL, Ledger


def opened(folder: Path, **search: Any) -> Ledger:
    plan = load_search(str(write(folder, **search)))
    return Ledger(folder, plan.search, plan.space, plan.values, "max")


def value(point: dict[str, Any]) -> float:
    return -abs(point["optimizer.params.lr"] - 0.03)


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "gp"])
def test_a_search_in_pieces_draws_what_a_whole_one_does(tmp_path: Path, sampler: str) -> None:
    """Each trial of the second search is drawn by a process of its own, and one is interrupted."""
    whole, pieces = [], []
    for folder, found in ((tmp_path / "a", whole), (tmp_path / "b", pieces)):
        folder.mkdir()
        ledger = opened(folder, sampler=sampler)
        for number in range(13):
            if found is pieces:
                ledger = opened(folder, sampler=sampler)
            this, point = ledger.ask()
            if found is pieces and number == 11:
                ledger = opened(folder, sampler=sampler)
                ((this, again),) = ledger.unfinished()
                assert again == point
            assert this == number
            found.append(point)
            ledger.finish(number, "complete", value(point))
    assert pieces == whole
    assert whole[0] == {"optimizer.params.lr": 0.1}  # the file's own
    assert len({point["optimizer.params.lr"] for point in whole}) == 13


def test_a_grid_is_walked_in_order(tmp_path: Path) -> None:
    ledger = opened(
        tmp_path, sampler="grid", parameters={"optimizer.params.lr": [0.1, 0.2], "train_batch_size": [8, 16]}
    )
    points = []
    for number in range(4):
        points.append(tuple(ledger.ask()[1].values()))
        ledger.finish(number, "failed", None)
    assert points == [(0.1, 8), (0.1, 16), (0.2, 8), (0.2, 16)]


def test_a_bad_trial_is_to_end_early(tmp_path: Path) -> None:
    ledger = opened(tmp_path, pruner={"type": "median", "first_trials": 2, "first_epoch": 2})
    for number in range(2):
        ledger.ask()
        assert not any(ledger.report(number, epoch, 0.9) for epoch in (1, 2, 3))
        ledger.finish(number, "complete", 0.9)
    ledger.ask()
    assert [ledger.report(2, epoch, 0.5) for epoch in (1, 2)] == [False, True]


def test_a_trial_that_is_made_again_is_not_judged_by_epochs_that_it_has_not_come_to(tmp_path: Path) -> None:
    """It was stopped after epoch 3. Made again, it would end at epoch 1, and its result would differ."""
    pruner = {"type": "median", "first_trials": 1}
    ledger = opened(tmp_path, pruner=pruner)
    ledger.ask()
    assert not any(ledger.report(0, epoch, accuracy) for epoch, accuracy in ((1, 0.5), (2, 0.5), (3, 0.9)))
    ledger.finish(0, "complete", 0.9)
    number, _ = ledger.ask()
    assert [ledger.report(number, epoch, 0.6) for epoch in (1, 2, 3)] == [False, False, True]
    again = opened(tmp_path, pruner=pruner)
    assert [n for n, _ in again.unfinished()] == [number]
    assert [again.report(number, epoch, 0.6) for epoch in (1, 2, 3)] == [False, False, True]


def test_half_a_line_and_a_lock_that_were_left_do_no_harm(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.ask()
    ledger.finish(0, "complete", 0.5)
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"op_code": 4, "wor')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(tmp_path / JOURNAL)
    again = opened(tmp_path)
    assert again.count() == 1
    again.ask()
    assert opened(tmp_path).count() == 2
