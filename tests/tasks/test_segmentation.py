"""Crops, losses, overlaps and pictures of segmentation: by hand, and against libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, jaccard_score

from trainer.data.mask_values import IGNORED
from trainer.tasks import segmentation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(4, 6), (4, 5, 6)])
def test_crops_and_mirrors_of_each_sample_are_its_own(size: tuple[int, ...]) -> None:
    x = torch.arange(2 * 3 * int(np.prod(size))).view(2, 3, *size)
    axes, crop = len(size), tuple(side - 2 for side in size)
    starts = torch.tensor([[1] * axes, [2] * axes])
    flipped = torch.tensor([[True] + [False] * (axes - 1), [False] * (axes - 1) + [True]])
    found = segmentation.crop_and_flip(x, starts, crop, flipped)
    for row, (start, axis) in enumerate(((1, 1), (2, axes))):
        own = x[row][(slice(None), *(slice(start, start + side) for side in crop))]
        assert torch.equal(found[row], own.flip(axis))
    assert torch.equal(segmentation.crop_and_flip(x, None, size, None), x)
    assert torch.equal(
        segmentation.crop_and_flip(x, None, size, torch.ones(2, axes).bool()), x.flip(*range(2, axes + 2))
    )


@pytest.mark.parametrize("background", [True, False])
def test_losses_are_the_mean_cross_entropy_and_monais_dice(background: bool) -> None:
    losses = pytest.importorskip("monai.losses")
    logits, mask = torch.randn(3, 4, 5, 6, requires_grad=True), torch.randint(0, 4, (3, 5, 6), dtype=torch.uint8)
    found = segmentation.sample_losses(logits, mask, cross_entropy=0.5, dice=2, background=background)
    dice = losses.DiceLoss(softmax=True, to_onehot_y=True, include_background=background, reduction="none")
    wanted = 0.5 * F.cross_entropy(logits, mask.long(), reduction="none").mean(dim=(1, 2))
    wanted = wanted + 2 * dice(logits, mask.long()[:, None]).flatten(1).mean(dim=1)
    torch.testing.assert_close(found, wanted)
    (gradient,), (other,) = (torch.autograd.grad(each.sum(), logits) for each in (found, wanted))
    torch.testing.assert_close(gradient, other)


def test_ignored_pixels_do_not_count() -> None:
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    mask[:, 2:] = IGNORED
    kinds = {"cross_entropy": 1.0, "dice": 1.0, "background": True}
    found = segmentation.sample_losses(logits, mask, **kinds)
    torch.testing.assert_close(found, segmentation.sample_losses(logits[:, :, :2], mask[:, :2], **kinds))
    chosen = logits.argmax(dim=1).to(torch.uint8)
    assert torch.equal(segmentation.overlaps(chosen, mask, 3), segmentation.overlaps(chosen[:, :2], mask[:, :2], 3))
    nothing = segmentation.sample_losses(logits, torch.full_like(mask, IGNORED), **kinds)
    assert torch.allclose(nothing, torch.zeros(2)), "a crop may hold only ignored pixels"


def test_metrics_are_those_of_all_pixels() -> None:
    mask, chosen = (torch.randint(0, 3, (5, 4, 4), dtype=torch.uint8) for _ in range(2))
    found = segmentation.metrics(segmentation.overlaps(chosen, mask, 4), ["a", "b", "c", "never"], False)
    truth, predicted = mask.flatten().numpy(), chosen.flatten().numpy()
    iou = jaccard_score(truth, predicted, average=None)
    assert found["mean_iou"] == pytest.approx(iou.mean()) and found["iou_b"] == pytest.approx(iou[1])
    assert found["mean_dice"] == pytest.approx(f1_score(truth, predicted, average=None)[1:].mean())
    assert found["pixel_accuracy"] == pytest.approx((truth == predicted).mean())
    assert "iou_never" not in found


def test_a_picture_shows_images_masks_and_predictions() -> None:
    image = torch.zeros(2, 1, 6, 6)
    image[1, 0, 3, 3] = 5.0
    mask, chosen = torch.zeros(2, 6, 6, dtype=torch.uint8), torch.zeros(2, 6, 6, dtype=torch.uint8)
    mask[0, 0, 0], chosen[1, 5, 5] = IGNORED, 1
    found = segmentation.picture(image, mask, chosen)
    assert found.shape == (3, 24, 16) and found.dtype == torch.uint8
    assert found[:, 4, 12].tolist() == [255, 255, 255]  # the bright pixel of the second image
    assert found[:, 9, 1].tolist() == [96, 96, 96]  # ignored
    assert tuple(found[:, 22, 14].tolist()) == segmentation.PALETTE[1]
    assert segmentation.coloured(torch.tensor([[[9, 200]]], dtype=torch.uint8)).any(dim=1).all(), "more than colours"
