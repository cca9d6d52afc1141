"""The weighted and smoothed loss is torch's mean over the global batch, however it is cut; metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.errors import UserError
from trainer.exact.splits import Split
from trainer.tasks import classification

NAMES = ["ham", "rare", "spam"]
LABELS = np.array([0] * 6 + [2] * 4 + [1] * 2)


@pytest.mark.parametrize("option", [None, "balanced", [0.5, 3.0, 1.0], {"rare": 4}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_summed_parts_over_the_global_count_are_the_mean_of_the_whole_batch(option: object, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 3, dtype=torch.float64), torch.from_numpy(LABELS)
    weights = classification.class_weights(option, NAMES, LABELS)
    expected = F.cross_entropy(
        logits, labels, weight=None if weights is None else weights.double(), label_smoothing=smoothing
    )
    cuts = ([0, 1, 2], [3, 4], [5, 6, 7, 8, 9, 10, 11])
    parts = [
        (
            classification.sample_losses(logits[c], labels[c], weights, smoothing).sum(),
            classification.count(labels[c], weights),
        )
        for c in cuts
    ]
    # The trainer divides by the count that the split gives for the batch's samples.
    split = Split({"label": labels}, classification.counts(labels, weights))
    total = split.count_of(torch.arange(12))
    assert sum(float(count) for _, count in parts) == pytest.approx(total, rel=1e-6)
    assert sum(loss.item() for loss, _ in parts) / total == pytest.approx(expected.item(), rel=1e-6)
    naive = sum(loss.item() / float(count) for loss, count in parts) / len(parts)
    assert abs(naive - expected.item()) > 1e-3, "averaging means is another loss"


def test_weights() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    balanced = classification.class_weights("balanced", NAMES, LABELS)
    assert balanced is not None
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(balanced.numpy(), theirs, rtol=1e-6)
    named = classification.class_weights({"spam": 2}, NAMES, LABELS)
    assert named is not None and named.tolist() == [1, 1, 2]
    assert classification.class_weights(None, NAMES, LABELS) is None


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("even", 'must be "balanced", one number for each of the 3 classes \\(ham, rare, spam\\)'),
        ([1, 2], "one number for each of the 3 classes"),
        ([1, 0, 2], "Every weight must be a positive number"),
        ({"eggs": 1}, 'names the class "eggs". The data has: ham, rare, spam'),
    ],
)
def test_weights_that_make_no_sense(option: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        classification.class_weights(option, NAMES, LABELS)


def test_metrics_and_predictions() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    found = classification.metrics(logits, torch.tensor([0, 1, 2, 2]))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert 0.5 < found["auroc"] < 1
    # A class that never occurs has no curve.
    assert "auroc" not in classification.metrics(logits, torch.tensor([0, 1, 1, 1]))
    two = classification.metrics(torch.tensor([[1.0, 0], [0, 1.0], [0.4, 0.5]]), torch.tensor([0, 1, 0]))
    assert two["auroc"] == 1.0
    rows = classification.predictions(logits[:2], NAMES)
    assert [row["label"] for row in rows] == ["ham", "rare"]
    assert rows[0]["score"] == pytest.approx(np.exp(2) / (np.exp(2) + 2), abs=1e-6)


def test_the_classes_that_a_split_lacks_are_named() -> None:
    labels = torch.tensor([0, 0, 2])
    assert classification.why_no_auroc("auroc", ["a", "b", "c"], labels).startswith(
        'there is no sample of the class "b" in it, and auroc needs every class'
    )
    assert 'classes "b", "d"' in classification.why_no_auroc("auroc", ["a", "b", "c", "d"], labels)
    assert classification.why_no_auroc("auroc", ["a", "b"], torch.tensor([0, 1])) == ""
    assert classification.why_no_auroc("acuracy", ["a", "b", "c"], labels) == ""
