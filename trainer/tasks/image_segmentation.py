"""Image segmentation: a class for each pixel or voxel, by MONAI's U-Net, from a user's images and masks.

The network halves with strided convolutions and doubles with transposed ones (Kerfoot et al. 2018). Networks with
smooth upsampling or padding by reflection are not offered: these have no deterministic kernel on GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import option, read_json
from ..config.task_options import is_number, read_options, refuse, required
from ..data import held_out, images, mask_values, reading, segmentation_data, sources, tables
from ..data.mask_values import Classes
from ..data.segmentation_data import Scenes, shown
from ..data.segmentation_input import inputs, write_mask
from ..errors import UserError
from ..exact.order import SampleRandom
from ..exact.splits import Batch
from . import segmentation
from .weights import load_weights

# The file beside model.safetensors: what prediction and loading need.
FACTS = "segmentation.json"


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions:
    """The options of `image_segmentation`."""

    data: Any = required(
        "a folder with folders images and masks (also below or above train/, validation/ and test/) of image files or "
        ".npy arrays; {split: folder}; or an .npz file with train_x, train_y, test_x, test_y (and validation_x, "
        "validation_y), or x and y: images (N, H, W), volumes (N, D, H, W), either with channels as the last "
        "dimension, and masks of whole numbers"
    )
    classes: Any = option(
        None,
        'names of the classes for the values 0, 1, 2, ... of masks, or {"name": value}; the first is the background; '
        "without it each value in the masks of train is a class",
    )
    ignore_value: int | None = option(None, "the value of pixels that do not count, often 255")
    image_size: Any = option(
        None,
        "of image files: a side or [height, width], to which images (bilinear) and masks (nearest) are resized",
    )
    channels: Literal[1, 3] | None = option(None, "of image files: grey or RGB; without it their own")
    widths: list[int] = option(
        [16, 32, 64, 128], "channels of each resolution, from fine to coarse; each but the first halves the image"
    )
    residual_units: int = option(
        2, "convolutions of a block, whose result is added to its input; 0 for plain blocks", minimum=0, maximum=8
    )
    norm: Literal["instance", "batch"] = option(
        "instance", "instance normalises each image by itself; batch has the statistics of a micro-batch"
    )
    dropout: float = option(0.0, "probability of zeroing an activation", minimum=0, maximum=0.99)
    cross_entropy_weight: float = option(1.0, "of the mean cross-entropy of a sample in the loss", minimum=0, below=1e6)
    dice_weight: float = option(1.0, "of the mean Dice loss of a sample in the loss", minimum=0, below=1e6)
    dice_background: bool = option(False, "the Dice loss and mean Dice include the first class, the background")
    crop_size: Any = option(
        None,
        "augmentation: a side or one number for each axis; training sees a crop of this size, another one in each "
        "epoch; evaluation sees whole images",
    )
    flip: Literal["none", "horizontal", "all"] = option(
        "none",
        "augmentation: images and their masks are mirrored, left to right or along each axis, with probability 1/2",
    )
    validation_fraction: float = option(
        0.1, "share held out of the training set if there is no validation split; 0 for none", minimum=0, below=1
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)
    split_seed: int = option(0, "chooses the samples that are held out, independently of the run's seed", minimum=0)


class ImageSegmentation:
    """Finds the class of each pixel. Its arguments are `SegmentationOptions`."""

    Options = SegmentationOptions
    pipeline_tag = "image-segmentation"
    best_metric = ("mean_iou", "max")
    random_weights = True

    def __init__(self, **given: Any) -> None:
        o = read_options(SegmentationOptions, given)
        sources.check_data(o.data)
        held_out.check_fractions(o.validation_fraction, o.test_fraction)
        if o.classes is not None:
            mask_values.check_classes(o.classes)
        if o.image_size is not None and not images.is_size(o.image_size):
            refuse("image_size", o.image_size, "a side in pixels, or [height, width]")
        crop = o.crop_size if isinstance(o.crop_size, list) else [o.crop_size]
        if o.crop_size is not None and not all(isinstance(s, int) and is_number(s) and s > 0 for s in crop):
            refuse("crop_size", o.crop_size, "a side, or a list with one number for each axis")
        if len(o.widths) < 2 or not all(1 <= width <= 4096 for width in o.widths):
            refuse("widths", o.widths, "at least two numbers of channels, from 1 to 4096")
        if not o.cross_entropy_weight and not o.dice_weight:
            refuse("dice_weight", o.dice_weight, 'above 0 where "cross_entropy_weight" is 0: nothing would be learnt')
        require_monai()
        self._o = o
        self.notes: list[str] = []
        self.data_lines: list[str] = []
        # Known once the data or a saved model is read.
        self._classes = Classes([], [])
        self._channels = 0
        self._size: tuple[int, ...] = (0, 0)  # (H, W) or (D, H, W)
        self._crop: tuple[int, ...] | None = None
        self._mean: list[float] = []
        self._std: list[float] = []
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # --- data ---------------------------------------------------------------------------------------------------------

    def splits(self) -> dict[str, Batch]:
        """Images (N, C, *S) uint8 or float32, and masks (N, *S) uint8; S is (H, W) or (D, H, W)."""
        o = self._o
        size = (o.image_size, o.image_size) if isinstance(o.image_size, int) else o.image_size
        found = segmentation_data.read(
            o.data,
            size=None if size is None else (size[0], size[1]),
            channels=o.channels,
            classes=o.classes,
            ignore_value=o.ignore_value,
        )
        splits = self._with_held_out(found.splits)
        self._classes = found.classes
        _, self._channels, *sides = splits["train"].image.shape
        self._size = tuple(sides)
        segmentation.check_halving(self._size, len(o.widths) - 1, "images", str(o.data))
        self._crop = self._crop_of(self._size)
        self._mean, self._std = splits["train"].mean_and_std()
        self._constants.clear()
        self.notes[:] = found.notes
        self.notes += tables.duplicates_note(
            {name: [row.tobytes() for row in scenes.digest.numpy()] for name, scenes in splits.items()}
        )
        self.data_lines[:] = segmentation.data_lines(splits, list(found.splits), found.classes, found.first)
        return {name: {"image": scenes.image, "mask": scenes.mask} for name, scenes in splits.items()}

    def _with_held_out(self, splits: dict[str, Scenes]) -> dict[str, Scenes]:
        train = splits["train"]
        wanted = {"test": self._o.test_fraction, "validation": self._o.validation_fraction}
        wanted = {name: part for name, part in wanted.items() if name not in splits}
        chosen = held_out.held_out(len(train.mask), wanted, self._o.split_seed)
        if list(chosen) == ["train"]:
            return splits
        return sources.in_order(splits | {name: train.select(rows) for name, rows in chosen.items()})

    def _crop_of(self, size: Sequence[int]) -> tuple[int, ...] | None:
        """The size of crops in training, None for whole images. Raises UserError."""
        asked = self._o.crop_size
        if asked is None:
            return None
        crop = tuple(asked) if isinstance(asked, list) else (asked,) * len(size)
        if len(crop) != len(size) or any(own > whole for own, whole in zip(crop, size)):
            refuse("crop_size", asked, f"a side, or one number for each axis, within images of {shown(size)}")
        segmentation.check_halving(crop, len(self._o.widths) - 1, "crops", "crop_size")
        return None if crop == tuple(size) else crop

    # --- model --------------------------------------------------------------------------------------------------------

    def model(self) -> nn.Module:
        """(B, C, *S) float32 -> logits (B, K, *S)."""
        from monai.networks.nets.unet import UNet

        assert self._classes.names, "splits() or load() comes first"
        o = self._o
        return UNet(
            spatial_dims=len(self._size),
            in_channels=self._channels,
            out_channels=len(self._classes.names),
            channels=o.widths,
            strides=[2] * (len(o.widths) - 1),
            num_res_units=o.residual_units,
            # MONAI's default is a PReLU, whose single slope takes a gradient for each micro-batch and slows packs.
            act="LEAKYRELU",
            norm=o.norm.upper(),
            dropout=o.dropout,
        )

    # --- training -----------------------------------------------------------------------------------------------------

    # It only draws and gathers.
    augment_in_chunks = True

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Crops and mirrors each sample by its own numbers. Its mask is treated like its image."""
        if self._crop is None and self._o.flip == "none":
            return batch
        image, mask = batch["image"], batch["mask"][:, None]
        axes, starts, flipped, size = len(self._size), None, None, self._crop or self._size
        if self._crop is not None:
            # One draw for each axis: the first pixel of the crop, among all that leave it inside.
            draws = random.uniform(axes)
            places = [whole - own + 1 for whole, own in zip(self._size, self._crop)]
            starts = torch.stack([(draws[:, a] * places[a]).to(torch.int64) for a in range(axes)], dim=1)
        if self._o.flip != "none":
            flipped = random.uniform(axes) < 0.5
            if self._o.flip == "horizontal":
                flipped = torch.cat([torch.zeros_like(flipped[:, 1:]), flipped[:, -1:]], dim=1)
        return {
            **batch,
            "image": segmentation.crop_and_flip(image, starts, size, flipped),
            "mask": segmentation.crop_and_flip(mask, starts, size, flipped)[:, 0],
        }

    def _logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """Of images as they were read: (B, C, *S) -> (B, K, *S)."""
        if image.device not in self._constants:
            mean, std = torch.tensor(self._mean, dtype=torch.float64), torch.tensor(self._std, dtype=torch.float64)
            shape = (1, -1, *(1 for _ in self._size))
            with torch.inference_mode(False):  # once for each device, because a copy waits for it
                scale, shift = ((v.float().view(shape).to(image.device)) for v in (1 / std, -mean / std))
            self._constants[image.device] = (scale, shift)
        return model(images.normalise(image, *self._constants[image.device]))

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """In training the logits (B, K, *S); in evaluation only what metrics and pictures need of them.

        Returns:
            `logits`. Or `loss` (B,) float32, `overlaps` (B, K, 3) int64, and `chosen` (B, H, W) uint8: the predicted
            classes, of volumes those of the middle slice.
        """
        logits = self._logits(model, batch["image"])
        if model.training:
            return {"logits": logits}
        chosen = logits.argmax(dim=1).to(torch.uint8)
        return {
            "loss": self._losses(logits, batch["mask"]),
            "overlaps": segmentation.overlaps(chosen, batch["mask"], logits.shape[1]),
            "chosen": segmentation.middle(chosen, len(self._size)).contiguous(),
        }

    def _losses(self, logits: Tensor, mask: Tensor) -> Tensor:
        o = self._o
        return segmentation.sample_losses(
            logits,
            mask,
            cross_entropy=o.cross_entropy_weight,
            dice=o.dice_weight,
            background=o.dice_background,
        )

    def loss(self, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, int]:
        """The summed losses of the samples, and their number.

        A sample's loss is the mean cross-entropy of its pixels plus the mean of its classes' Dice losses, each with its
        weight. The mean of samples over a global batch is exact for any cut into micro-batches.
        `segmentation.sample_losses` says what would not be.
        """
        losses = self.sample_losses(outputs, batch)
        return losses.sum(), len(losses)

    def sample_losses(self, outputs: dict[str, Tensor], batch: Batch) -> Tensor:
        """The loss of each sample, (B,) float32."""
        return outputs["loss"] if "loss" in outputs else self._losses(outputs["logits"], batch["mask"])

    def metrics(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, float]:
        """Mean IoU and Dice over all pixels of the split, the share of right pixels, and the IoU of each class."""
        return segmentation.metrics(outputs["overlaps"], self._classes.names, self._o.dice_background)

    def pictures(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Some samples of the split: images, below them their masks, and below these the predictions."""
        some = torch.linspace(0, len(batch["mask"]) - 1, min(segmentation.PICTURES, len(batch["mask"]))).long()
        dims = len(self._size)
        image, mask = (segmentation.middle(batch[name][some], dims) for name in ("image", "mask"))
        return {"image_mask_prediction": segmentation.picture(image, mask, outputs["chosen"][some])}

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def save(self, model: nn.Module, folder: Path) -> None:
        """model.safetensors, and segmentation.json: how an image becomes an input, and what the outputs mean."""
        from safetensors.torch import save_file

        state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, str(folder / "model.safetensors"))
        facts = {
            "classes": self._classes.names,
            "values": self._classes.values,
            "channels": self._channels,
            "size": list(self._size),
            "mean": self._mean,
            "std": self._std,
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> nn.Module:
        """The model that `save` wrote. Raises UserError if a file is missing or damaged."""
        weights, file = Path(folder) / "model.safetensors", Path(folder) / FACTS
        facts = read_json(file)
        try:
            self._classes = Classes(list(facts["classes"]), list(facts["values"]))
            self._channels, self._size = int(facts["channels"]), tuple(map(int, facts["size"]))
            self._mean, self._std = list(facts["mean"]), list(facts["std"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is damaged: {error}") from error
        self._constants.clear()
        return load_weights(self.model(), weights)

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """{"file" or "row", and for each class the share of pixels} of an image, a folder of images, or arrays."""
        for row, _, _ in self._predicted(model, Path(source), batch_size):
            yield row

    def predict_files(
        self, model: nn.Module, source: str | Path, batch_size: int, folder: Path
    ) -> Iterator[dict[str, Any]]:
        """As `predict`, with the mask of each sample as a file of `folder`: a png, or an .npz for volumes.

        A mask holds the values that the masks of training had, and has the size of its image. The column `mask` names
        it.
        """
        taken: set[str] = set()
        for row, chosen, size in self._predicted(model, Path(source), batch_size):
            values = np.array(self._classes.values)[chosen]
            name = write_mask(values, size, folder, row.get("file", row.get("row")), taken)
            yield {**row, "mask": name}

    def _predicted(
        self, model: nn.Module, source: Path, batch_size: int
    ) -> Iterator[tuple[dict[str, Any], np.ndarray, tuple[int, ...]]]:
        """(row, numbers of classes (*S), the image's own size) of each sample of a source."""
        kind, named = inputs(source, self._channels, self._size, self.notes)
        device = next(model.parameters()).device
        for block in reading.blocks(named, batch_size):
            stacked = torch.from_numpy(np.stack([image for _, image, _ in block])).to(device)
            with torch.inference_mode():
                chosen = self._logits(model, stacked).argmax(dim=1).to(torch.uint8).cpu().numpy()
            for (name, _, size), own in zip(block, chosen):
                share = np.bincount(own.ravel(), minlength=len(self._classes.names)) / own.size
                shares = {f"share_{c}": round(float(s), 6) for c, s in zip(self._classes.names, share)}
                yield {kind: name, **shares}, own, size


def require_monai() -> None:
    """Raises UserError if MONAI is not installed."""
    import importlib.util

    if importlib.util.find_spec("monai") is None:
        raise UserError(
            'The task image_segmentation needs the package monai, for its U-Net: pip install "strong-scaling-trainer'
            '[segmentation]".'
        )


TASK = ImageSegmentation
