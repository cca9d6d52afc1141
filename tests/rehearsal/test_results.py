"""What comes of a micro-batch: the first part that differs is found, and the function that made it is named."""

from __future__ import annotations

import pytest
from torch import nn

from trainer.rehearsal.results import changed_tensor, differs, source_of

WHOLE = {"data x": 1, "output ": 2, "loss": 3, "gradient 0.weight": 4, "statistics": 5}


def test_the_same_results_do_not_differ() -> None:
    assert differs(WHOLE, dict(WHOLE)) is None
    assert differs({}, {}) is None


def test_the_part_that_came_first_is_the_one_that_differs() -> None:
    """What follows from it differs as well, and is not the cause."""
    assert differs(WHOLE, WHOLE | {"statistics": 9, "output ": 9, "loss": 9}) == "output "
    assert differs(WHOLE, WHOLE | {"gradient 0.weight": 9}) == "gradient 0.weight"


def test_a_part_that_only_one_has_differs() -> None:
    fewer = {name: value for name, value in WHOLE.items() if name != "gradient 0.weight"}
    assert differs(WHOLE, fewer) == differs(fewer, WHOLE) == "gradient 0.weight"


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("data x", "augment()"),
        ("output ", "forward()"),
        ("output logits", "forward()"),
        ("loss", "loss()"),
        ("gradient 0.weight", "the gradient of 0.weight"),
        ("statistics", "a normalisation layer's statistics"),
    ],
)
def test_each_part_has_a_maker(part: str, source: str) -> None:
    assert source_of(part) == source


def test_a_tensor_that_a_forward_changes_is_named_with_what_to_do() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(2, 2),
            "table": nn.Embedding(3, 2, max_norm=1.0),
            "bag": nn.EmbeddingBag(3, 2, max_norm=1.0),
        }
    )
    model["free"] = nn.Embedding(3, 2)
    buffer = changed_tensor(model, "buffer", "plain.seen")
    assert buffer.what.startswith("the model's buffer plain.seen changes in its forward")
    assert "rank 0's" in buffer.remedy
    for name in ("plain.weight", "free.weight"):
        finding = changed_tensor(model, "parameter", name)
        assert finding.what.startswith(f"the parameter {name} changes in the forward, before")
        assert "Leave the change to the optimizer, or compute with a changed copy." in finding.remedy
    for name, kind in (("table.weight", "Embedding"), ("bag.weight", "EmbeddingBag")):
        finding = changed_tensor(model, "parameter", name)
        assert f"the parameter {name} changes in the forward: {kind} with max_norm" in finding.what
        assert "Leave max_norm out" in finding.remedy
