"""What a task has to return: each slip is named, with the method that made it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainer.errors import UserError
from trainer.tasks.contract import check_augmented, metrics_problem


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (0.5, "T.metrics() must return a dictionary, name -> number; it returned a float."),
        ({"a": torch.zeros(3)}, "T.metrics() must return numbers, but 'a' is tensor([0., 0., 0.])."),
        ({"a": torch.zeros(200)}, "but 'a' is a Tensor of shape (200,).\nUse .item()"),
        ({"a": [0.5] * 99}, "but 'a' is a list.\nUse .item()"),
        ({"a": None}, "but 'a' is None"),
    ],
)
def test_metrics_that_are_no_numbers(metrics: Any, words: str) -> None:
    assert words in str(metrics_problem("T", metrics))


def test_metrics_that_are_numbers() -> None:
    assert metrics_problem("T", {"a": 1, "b": torch.tensor(0.5), "c": float("nan")}) is None


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (torch.zeros(4, 2), "T.augment() must return the batch, a dictionary of tensors, not a Tensor"),
        ({"x": [1, 2]}, "not one with list"),
        ({"x": torch.zeros(2, 3)}, r"T.augment() returned 'x' of shape (2, 3) for 4 samples"),
        ({"x": torch.zeros(())}, "of shape () for 4 samples"),
    ],
)
def test_an_augmentation_that_is_no_batch(arrays: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_augmented("T", arrays, 4)
    assert words in str(caught.value)


def test_a_batch_is_a_batch() -> None:
    check_augmented("T", {"x": torch.zeros(4, 2), "y": torch.zeros(4)}, 4)
