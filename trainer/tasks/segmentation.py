"""Parts of `image_segmentation`: crops and mirrors of images with masks, losses, metrics, pictures, lines for the user.

S stands for (H, W) or (D, H, W), K for the number of classes. Masks hold numbers of classes, or `IGNORED`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import report
from ..data.mask_values import IGNORED, Classes
from ..data.segmentation_data import Scenes, shown
from ..errors import UserError

# Added to numerator and denominator of a Dice coefficient, as MONAI has it: two empty regions agree.
SMOOTH = 1e-5
# Up to 8 samples in a picture, of at most 256 pixels a side.
PICTURES, PICTURE_SIDE = 8, 256
# Classes in pictures: black, then colours that are told apart in print and by most eyes (Okabe and Ito 2008).
PALETTE = ((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
           (204, 121, 167), (255, 255, 255))  # fmt: skip
_IGNORED_COLOUR = (96, 96, 96)
_OPTION = '"trainer.task_options.'


def crop_and_flip(x: Tensor, starts: Tensor | None, size: Sequence[int], flipped: Tensor | None) -> Tensor:
    """A crop of each sample, mirrored along some of its axes. It only gathers, axis by axis.

    Args:
        x: (B, C, *S).
        starts: (B, axes) int64, the first pixel of the crop along each axis; None for whole images.
        size: of the crop, (axes,).
        flipped: (B, axes) bool; None for none.

    Returns:
        (B, C, *size).
    """
    for axis, length in enumerate(size):
        places = torch.arange(length, device=x.device).expand(len(x), length)
        if flipped is not None:
            places = torch.where(flipped[:, axis : axis + 1], length - 1 - places, places)
        elif starts is None:
            continue
        if starts is not None:
            places = places + starts[:, axis : axis + 1]
        shape = [len(x), *(1 for _ in x.shape[1:])]
        shape[axis + 2] = length
        expanded = [*x.shape]
        expanded[axis + 2] = length
        x = x.gather(axis + 2, places.reshape(shape).expand(expanded))
    return x


def one_hot(mask: Tensor, classes: int) -> Tensor:
    """(B, *S) uint8 -> (B, K, *S) bool; all false where the mask is ignored.

    It compares. A scatter or a lookup has no deterministic kernel on GPUs, or makes the host wait.
    """
    return torch.stack([mask == number for number in range(classes)], dim=1)


def sample_losses(logits: Tensor, mask: Tensor, *, cross_entropy: float, dice: float, background: bool) -> Tensor:
    """The loss of each sample: its weighted cross-entropy and Dice losses, added.

    The cross-entropy is the mean over a sample's pixels that count. The Dice loss is 1 - 2 |P T| / (|P| + |T|), with
    probabilities as P (Milletari et al. 2016), for each class of each sample, and the mean over classes. It is what
    MONAI's DiceLoss(softmax=True, batch=False) computes.

    A Dice coefficient over all pixels of a batch is not a sum over its samples, so its gradient could not be cut
    into micro-batches. It is not offered.

    Args:
        logits: (B, K, *S).
        mask: (B, *S) uint8.
        cross_entropy, dice: the weights of the two.
        background: whether the Dice loss includes the first class.

    Returns:
        (B,) float32.
    """
    truth = one_hot(mask, logits.shape[1]).flatten(2)  # (B, K, pixels)
    log_p = F.log_softmax(logits.float().flatten(2), dim=1)
    loss = log_p.new_zeros(len(logits))
    if cross_entropy:
        counted = truth.sum(dim=(1, 2)).clamp(min=1)
        loss = loss - cross_entropy * torch.where(truth, log_p, 0.0).sum(dim=(1, 2)) / counted
    if dice:
        p = log_p.exp() * (mask != IGNORED).flatten(1)[:, None]
        both = torch.where(truth, p, 0.0).sum(dim=2)  # (B, K)
        coefficients = (2 * both + SMOOTH) / (p.sum(dim=2) + truth.sum(dim=2) + SMOOTH)
        loss = loss + dice * (1 - coefficients[:, 0 if background else 1 :]).mean(dim=1)
    return loss


def overlaps(chosen: Tensor, mask: Tensor, classes: int) -> Tensor:
    """How many pixels of each class are right, chosen and true: (B, *S) both -> (B, K, 3) int64."""
    truth = one_hot(mask, classes).flatten(2)
    found = one_hot(chosen, classes).flatten(2) & (mask != IGNORED).flatten(1)[:, None]
    return torch.stack([(found & truth).sum(dim=2), found.sum(dim=2), truth.sum(dim=2)], dim=2)


def metrics(counts: Tensor, names: Sequence[str], background: bool) -> dict[str, float]:
    """Mean IoU over all classes, mean Dice, the share of right pixels, and the IoU of each class.

    All are of the pixels of the whole split. A class that is neither in the masks nor predicted has no part in a mean.

    Args:
        counts: (N, K, 3) int64, see `overlaps`.
        names: the classes.
        background: whether the mean Dice includes the first class.
    """
    right, found, true = counts.sum(dim=0).double().unbind(dim=1)  # (K,)
    there = found + true > 0
    iou, dice = right / (found + true - right), 2 * right / (found + true)
    foreground = there.clone()
    foreground[0] = foreground[0] and background
    result = {"mean_iou": float(iou[there].mean())}
    if bool(foreground.any()):
        result["mean_dice"] = float(dice[foreground].mean())
    result["pixel_accuracy"] = float(right.sum() / true.sum())
    if len(names) <= len(PALETTE):
        result |= {f"iou_{name}": float(value) for name, value, is_there in zip(names, iou, there) if is_there}
    return result


def middle(x: Tensor, dims: int) -> Tensor:
    """The middle slice of volumes (..., D, H, W), or images (..., H, W) as they are."""
    return x if dims == 2 else x[..., x.shape[-3] // 2, :, :]


def coloured(mask: Tensor) -> Tensor:
    """(N, H, W) uint8 -> (N, 3, H, W) uint8."""
    colours = torch.tensor(PALETTE, dtype=torch.uint8)
    shown = mask.long()
    # The background stays black, however many classes there are.
    shown = torch.where(shown >= len(PALETTE), 1 + (shown - 1) % (len(PALETTE) - 1), shown)
    picture = colours[shown]  # (N, H, W, 3)
    picture[mask == IGNORED] = torch.tensor(_IGNORED_COLOUR, dtype=torch.uint8)
    return picture.permute(0, 3, 1, 2)


def grey_or_rgb(image: Tensor) -> Tensor:
    """(N, C, H, W) uint8 or float32 -> (N, 3, H, W) uint8. Other numbers are stretched from black to white.

    Of images with other than 3 channels the first is shown.
    """
    if image.shape[1] != 3:
        image = image[:, :1].expand(-1, 3, -1, -1)
    if image.dtype == torch.uint8:
        return image
    low, high = image.amin(dim=(1, 2, 3), keepdim=True), image.amax(dim=(1, 2, 3), keepdim=True)
    return ((image - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)


def picture(image: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """One picture with a column a sample: the image, its mask, and what was predicted. (3, rows, columns) uint8.

    Args:
        image: (N, C, H, W).
        mask, chosen: (N, H, W) uint8.
    """
    step = -(-max(mask.shape[1:]) // PICTURE_SIDE)
    rows = [grey_or_rgb(image), coloured(mask), coloured(chosen)]
    framed = [F.pad(row[..., ::step, ::step], (1, 1, 1, 1), value=128) for row in rows]  # (N, 3, h, w) each
    return torch.cat([torch.cat(list(row), dim=2) for row in framed], dim=1)


def check_halving(size: Sequence[int], times: int, what: str, where: str) -> None:
    """Raises UserError unless a U-Net can halve a size this number of times, and more than one pixel is left."""
    factor = 2**times
    wrong = [side for side in size if side % factor]
    rule = f'{_OPTION}widths" has {times + 1} numbers, so the network halves each side {times} times'
    if wrong:
        nearest = sorted(
            {max(factor, side // factor * factor) for side in wrong} | {-(-s // factor) * factor for s in wrong}
        )
        raise UserError(
            f"The {what} of {where} are {shown(size)}, but {rule}: each side must be a multiple of {factor}.\nSet "
            f"{'crop_size' if what == 'crops' else 'image_size (of image files)'} to such sides, for example "
            f"{' or '.join(map(str, nearest))} for {wrong[0]}, pad the images, or give fewer widths."
        )
    if all(side == factor for side in size):
        raise UserError(
            f"The {what} of {where} are {shown(size)}, but {rule}: a single pixel would be left. Give fewer widths."
        )


def data_lines(splits: dict[str, Scenes], given: Sequence[str], classes: Classes, first: str) -> list[str]:
    """What was read: how many images, their size, and the share of each class."""
    train = splits["train"]
    channels, *size = train.image.shape[1:]
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    unit = "image" if len(size) == 2 else "volume"
    counts = {name: len(scenes.mask) for name, scenes in splits.items()}
    pixels = torch.bincount(train.mask.flatten().long(), minlength=256).double()
    total = float(pixels[: len(classes.names)].sum())
    shares = [f"{name} {100 * float(pixels[k]) / total:.1f} %" for k, name in enumerate(classes.names[:12])]
    lines = [
        report.rows_line(counts, given, unit, f" of {shown(size)}, {kind}"),
        f"{len(classes.names)} classes, as shares of train's pixels: {', '.join(shares)}"
        + (", ..." if len(classes.names) > 12 else ""),
    ]
    if ignored := int(pixels[IGNORED]):
        lines.append(f"ignored: {100 * ignored / train.mask.numel():.1f} % of train's pixels")
    return [*lines, f"first image: {first}"]
