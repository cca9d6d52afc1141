"""Budgets in epochs, and runs with as few updates. What contradicts itself is in test_declaration.py."""

from __future__ import annotations

from pathlib import Path

from tests.study.made_up import planned, write
from trainer.study.arms import EQUAL_UPDATES
from trainer.study.budgets import budget_variants, work


def test_the_epochs_of_the_base_are_no_variant_of_their_own() -> None:
    assert budget_variants([60, 20, 180], 20) == {
        "60 epochs": {"trainer.epochs": 60},
        "180 epochs": {"trainer.epochs": 180},
    }
    assert budget_variants([], 20) == {}


def test_every_budget_is_a_study_of_its_own(tmp_path: Path) -> None:
    """With sequential runs, controls and searches of its own; a comparison with a control counts as one."""
    arms = ["weak", "weak_tuned", EQUAL_UPDATES]
    study = {"seeds": 5, "arms": arms, "world_sizes": [2, 4], "epochs": [20, 60], "tuning": {"searches": 5}}
    _, plan = planned(write(tmp_path, study))
    assert list(plan.variants) == ["", "60 epochs"]
    configs = {str(c.place): plan.configs[c.id] for c in plan.cells if c.id is not None}
    assert configs["60 epochs: sequential"].trainer.epochs == configs["60 epochs: weak, W = 4"].trainer.epochs == 60
    control = configs["60 epochs: sequential_equal_updates, W = 4"]
    assert (control.train_batch_size, control.trainer.max_steps) == (32, 60 * 10)
    # In each of two budgets: sequential runs, and at two W the weak ones, the tuned ones and their control.
    searched = {(s.place.variant, s.place.arm, s.place.world_size) for s in plan.searches.values()}
    assert len(searched) == 2 * (1 + 2 + 2)
    # Four arms at two W, and two arms against their controls.
    assert plan.comparisons() == 2 * (4 * 2 + 2 * 2)


def test_a_control_has_the_micro_batches_of_one_rank(tmp_path: Path) -> None:
    """Also where statistics are synchronised over W ranks: it stands for one."""
    variants = {"synchronised": {"synchronised_batch_norm": True}}
    study = {"seeds": 2, "arms": ["weak", EQUAL_UPDATES], "world_sizes": [16], "variants": variants}
    _, plan = planned(write(tmp_path, study))
    sizes = {c.arm: plan.config(c.place, 0).train_micro_batch_size_per_gpu for c in plan.cells if c.variant}
    assert sizes == {"sequential": 8, "weak": 128, EQUAL_UPDATES: 8}


def test_work_follows_the_samples(tmp_path: Path) -> None:
    path = write(tmp_path, {"budgets": ["epochs", "updates"], "world_sizes": [2], "arms": ["weak"]}, epochs=3)
    _, plan = planned(path)
    efforts = {(c.arm, c.budget): work(plan.configs[c.id], 1200) for c in plan.cells if c.id is not None}
    assert efforts == {
        ("sequential", "epochs"): 3600,
        ("weak", "epochs"): 3600,
        ("weak", "updates"): 7200,
    }  # 6 epochs of 19
