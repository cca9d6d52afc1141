"""What stands on the page as declared: the numbers of this study, in words."""

from __future__ import annotations

import json
from pathlib import Path

from tests.study.made_up import results
from trainer.study.definitions import definitions
from trainer.study.results import Results


def test_the_rules_that_were_declared(tmp_path: Path) -> None:
    lines = "\n".join(definitions(Results(results(tmp_path, seeds=2))))
    assert "Metric: test/accuracy of the model that a run keeps; more is better." in lines
    assert "above the margin of 0.01; small if" in lines
    assert "Collapsed: not finite, or a loss of 0.1 or more" in lines
    assert "would miss with a probability of 0.01, by the sequential runs of the other seeds" in lines
    assert "over all 4 comparisons of the study" in lines
    # Of arms that the study does not have, nothing is said.
    assert "square root (Hoffer" in lines
    for absent in ("independent searches", "LARS", "AdaScale (", "synchronised_batch_norm"):
        assert absent not in lines
    (tmp_path / "min").mkdir()
    changed = results(tmp_path / "min", seeds=2, direction="min", metric="test/loss", target=0.4, collapse=0.3)
    lines = "\n".join(definitions(Results(changed)))
    assert "Metric: test/loss of the model that a run keeps; less is better." in lines
    assert "Target: 0.4, as given. A run that is worse misses it." in lines
    assert "a loss of 0.3 or more" in lines


def test_budgets_and_controls_are_explained(tmp_path: Path) -> None:
    folder = results(tmp_path, seeds=2, arms=["weak", "sequential_equal_updates"], epochs=[60], target=0.9)
    lines = "\n".join(definitions(Results(folder)))
    assert "over all 12 comparisons of the study" in lines
    assert "Budgets of 20, 60 epochs: each has its own sequential runs" in lines
    assert "Sequential, as few updates: the batch of one rank" in lines
    assert "the first validation at which validation/accuracy is 0.9 or better" in lines
    (tmp_path / "plain").mkdir()
    lines = "\n".join(definitions(Results(results(tmp_path / "plain", seeds=2))))
    assert (
        "Budgets of" not in lines and "as few updates:" not in lines and "Shallue et al. 2019): the first" not in lines
    )


def test_how_arms_were_tuned(tmp_path: Path) -> None:
    tuning = {"searches": 5, "spread": 8, "warmup_epochs": [1, 3], "momentum": [], "seeds": 2}
    folder = results(tmp_path, seeds=6, arms=["weak", "weak_tuned"], tuning=tuning)
    lines = "\n".join(definitions(Results(folder)))
    assert "5 independent searches for each W" in lines
    assert "LARS" not in lines and "square root (Hoffer" not in lines
    assert "rates within a factor of 8 around a centre, at most a factor of 2 apart" in lines
    assert "with warm-ups of 1, 3 epochs; one of 3 settings gets the next seed, up to 2 seeds" in lines
    declared = json.loads((folder / "study.json").read_text())
    assert declared["study"]["tuning"]["searches"] == 5
