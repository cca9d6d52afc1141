"""Whether a low or a high value of a metric is better: it decides which model is kept and which trial is taken."""

from __future__ import annotations

import pytest

from trainer.config.directions import DIRECTIONS
from trainer.tasks import causal_lm, image_segmentation, problems, token_classification


@pytest.mark.parametrize(
    "best_metric",
    [
        problems.OneClass.best_metric,
        problems.SeveralClasses.best_metric,
        problems.Number.best_metric,
        causal_lm.TASK.best_metric,
        image_segmentation.TASK.best_metric,
        token_classification.TASK.best_metric,
        ("entity_f1", "max"),  # of sentences with entities
        ("nll", "min"),  # of nodules, without the variational part
    ],
)
def test_a_tasks_own_choice_has_the_direction_that_its_name_says(best_metric: tuple[str, str]) -> None:
    """A task knows the direction of its own choice. This table decides where a user names the metric."""
    name, mode = best_metric
    assert DIRECTIONS[name] == mode


def test_a_name_that_says_nothing_has_no_direction() -> None:
    """Then a run and a search ask for the mode instead of guessing."""
    assert not {"margin", "negative_elbo", "error", "score"} & DIRECTIONS.keys()
