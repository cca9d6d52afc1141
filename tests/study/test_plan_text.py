"""What a dry run prints: the runs, what cannot be run, and what so many seeds can decide."""

from __future__ import annotations

import re
from pathlib import Path

from tests.study.made_up import planned, write
from trainer.study.plan_text import plan_text, power_lines


def test_the_table_says_what_is_impossible_and_what_no_seeds_can_decide(tmp_path: Path) -> None:
    arms = ["strong", "weak", "weak_linear", "weak_sqrt", "weak_tuned", "weak_lars"]
    _, plan = planned(write(tmp_path, {"seeds": 6, "budgets": ["epochs"], "world_sizes": [2, 64], "arms": arms}))
    text = plan_text(plan)
    assert re.search(r"weak_linear +epochs +2 +64 +20 +380 +6\n", text)
    assert "weak, W = 64: impossible, the global batch 64 x 32 = 2,048 is larger" in text
    assert "strong, W = 64: impossible, 64 ranks are more than the 4 micro-batches" in text
    # Tuned at W = 1 and 2, and LARS at W = 1: six searches of each. Of 24 runs six are sequential and 18 follow a rule.
    assert (
        "18 searches of 59 runs each, by validation/accuracy: 1,062 runs, for 24 runs with what they find; 24 runs "
        "have given settings" in text
    )
    impossible = "no verdict is possible in 5 comparisons at alpha 0.05; at least 7 are needed"
    assert f"note: 6 seeds: {impossible}" in text and f"note: searched arms, 6 searches: {impossible}" in text
    assert "power" not in text


def test_the_power_is_printed(tmp_path: Path) -> None:
    """By the deviation that is declared, or by that of differences, in margins; of tuned arms by their searches."""
    study = {"seeds": 40, "budgets": ["epochs"], "arms": ["weak", "weak_tuned"], "world_sizes": [2]}
    _, plan = planned(write(tmp_path, study | {"expected_deviation": 0.008, "tuning": {"searches": 8}}))
    rules, tuned = power_lines(plan)
    assert re.match(
        r"power: 40 seeds, 2 comparisons: if nothing is lost, a loss of 0.01 is ruled out with probability 0.9\d", rules
    )
    assert "would make it" not in rules
    assert tuned.startswith("power: searched arms, 8 searches, 2 comparisons: ")
    assert re.search(r"; about \d\d would make it 0.8$", tuned)
    _, plan = planned(write(tmp_path, study | {"expected_deviation": None, "tuning": {"searches": 5}}))
    rules, tuned = power_lines(plan)
    assert re.search(r"probability 1.00 \(of 0.5 margins\), 1.00 \(of 1 margins\), 0.66 \(of 2 margins\)", rules)
    assert tuned.startswith("note: searched arms, 5 searches: no verdict is possible")


def test_comparisons_with_controls_are_counted(tmp_path: Path) -> None:
    arms = ["weak", "weak_lars", "sequential_equal_updates"]
    _, plan = planned(write(tmp_path, {"seeds": 9, "budgets": ["epochs"], "world_sizes": [2, 4], "arms": arms}))
    text = plan_text(plan)
    assert "8 comparisons: 6 with sequential runs, and 2 of weak runs with sequential runs of as few updates" in text
    assert re.search(r"sequential_equal_updates +- +4 +32 +6 +200 +9\n", text)
    assert "9 seeds, 8 comparisons: " in text


def test_the_table_names_variants_and_runs_that_may_be_shorter(tmp_path: Path) -> None:
    study = {"seeds": 8, "budgets": ["updates"], "world_sizes": [4], "arms": ["weak_adascale"], "dataset_sizes": [400]}
    _, plan = planned(write(tmp_path, study))
    text = plan_text(plan)
    assert re.search(r"weak_adascale +- +updates +4 +128 +at most \d+ +at most \d+ +8\n", text)
    assert re.search(r"weak_adascale +400 samples +updates +4 +128 ", text)
    assert "note: " not in text and "searches" not in text
