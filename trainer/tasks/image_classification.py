"""Classes or numbers of images: any dataset of labelled images, any AutoModelForImageClassification of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config.schema import option
from ..config.task_options import is_number, read_options, refuse, required
from ..data import (
    grey,
    held_out,
    image_arrays,
    image_data,
    images,
    labelled,
    labelled_files,
    model_checks,
    pretrained,
    reading,
    report,
    sources,
    targets,
    units,
)
from ..data.cut import Cut
from ..data.image_data import ImageSplit
from ..data.image_files import IMAGES
from ..data.images import Size
from ..data.pretrained import check_spec
from ..errors import UserError
from ..exact.order import SampleRandom
from ..exact.splits import Batch, Split
from . import problems
from .hub_options import HubOptions, TargetOptions

_AUTO = "AutoModelForImageClassification"
_PROCESSOR_FILE = "preprocessor_config.json"
_EXAMPLE = '{"model_type": "resnet", "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}'


@dataclass(frozen=True, kw_only=True)
class ImageOptions(TargetOptions, HubOptions):
    """The options of `image_classification`."""

    data: Any = required(
        "a folder of class folders (also with train/ and test/ above them), or with a metadata.csv (columns file_name "
        "and label); a parquet file with a column of images, a "
        "folder that save_to_disk wrote, a dataset's name on the hub, {split: any of these}, or an .npz file with "
        "uint8 arrays train_x, train_y, test_x, test_y (and validation_x, validation_y), or x and y"
    )
    model: Any = required("a folder or hub name of an image classifier, or a configuration to build one from")
    image_column: str | None = option(None, "the column of images; the usual names are found")
    new_head: bool = option(False, "replace a last layer that was trained for other classes")
    image_size: Any = option(
        None,
        "a side or [height, width], to which images of another size are resized (bilinear); without it the model's "
        "own, else that of the images, which must then be alike",
    )
    channels: Literal[1, 3] | None = option(None, "without it the model's own, else 1 if all images are grey")
    mean: Any = option(
        None, "of each channel, for pixels from 0 to 1; without it the pretrained model's, else the training set's"
    )
    std: Any = option(None, "the standard deviation: as mean, and together with it")
    crop_padding: int = option(
        0,
        "augmentation: an image moves by up to this many pixels in each direction, filled with black",
        minimum=0,
        maximum=1024,
    )
    flip: bool = option(False, "augmentation: half of the images are mirrored left to right")
    erasing: float = option(
        0.0,
        "augmentation: the probability that a rectangle is filled with the mean (Zhong et al. 2017)",
        minimum=0,
        maximum=1,
    )
    validation_fraction: float = option(
        0.1,
        "share of each class held out of the training set if there is no validation split",
        minimum=0,
        below=1,
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)


class ImageClassification(problems.WithProblem):
    """Fine-tunes, or trains from scratch, a classifier of images. Its arguments are `ImageOptions`."""

    Options = ImageOptions
    pipeline_tag = "image-classification"

    def __init__(self, **given: Any) -> None:
        o = read_options(ImageOptions, given)
        check_spec(o.model, "classifier of images", _EXAMPLE)
        self._wish = o.wish()
        model_checks.check_problem_type(o.model, self._wish.problem)
        self._problem = problems.problem(self._wish, o.class_weights, o.label_smoothing)
        self.best_metric = self._problem.best_metric
        sources.check_data(o.data, o.config_name)
        held_out.check_fractions(o.validation_fraction, o.test_fraction)
        if o.image_size is not None and not images.is_size(o.image_size):
            refuse("image_size", o.image_size, "a side in pixels, or [height, width]")
        if (o.mean is None) != (o.std is None):
            raise UserError('"trainer.task_options.mean" and "trainer.task_options.std" go together: set both or none.')
        if isinstance(o.model, Mapping) and (o.new_head or not o.pretrained):
            name = "new_head" if o.new_head else "pretrained"
            raise UserError(
                f'"trainer.task_options.{name}" has no effect on a model that is built from a configuration. '
                "Leave it out."
            )
        self._columns = {
            "config_name": o.config_name,
            "split_column": o.split_column,
            "image_column": o.image_column,
            "group_column": o.group_column,
        }
        self._data: Any = o.data
        self._spec: Any = o.model
        self._pretrained, self._new_head = o.pretrained, o.new_head
        self.random_weights = isinstance(o.model, Mapping) or not o.pretrained
        self._trust_remote_code = o.trust_remote_code
        self._asked_size, self._asked_channels = _as_size(o.image_size), o.channels
        self._asked_mean = _per_channel("mean", o.mean, above=None)
        self._asked_std = _per_channel("std", o.std, above=0)
        self._crop_padding, self._flip, self._erasing = o.crop_padding, o.flip, o.erasing
        self._fractions = {"test": o.test_fraction, "validation": o.validation_fraction}
        self._split_seed = o.split_seed
        self.notes: list[str] = []
        self.data_lines: list[str] = []
        # Known once the data or a saved model is read.
        self._classes: list[str] = []  # or the column of numbers
        self._size: Size = (0, 0)
        self._channels = 0
        self._mean: list[float] = []
        self._std: list[float] = []
        self._constants: dict[torch.device, dict[str, Tensor]] = {}

    # ------------------------------------------------------------ data

    def splits(self, cut: Cut | None = None) -> dict[str, Split]:
        """Images (N, C, H, W) uint8, and labels: (N,) int64, (N, classes) float32 of 0 and 1, or (N,) float32.

        With `cut`, the splits of a fold.
        """
        self.notes.clear()
        self._constants.clear()
        processor, channels, size = self._wanted()
        found = image_data.read_images(self._data, channels=channels, size=size, wish=self._wish, **self._columns)
        parts = found.cut(cut, self._fractions, self._split_seed)
        splits, groups = parts.splits, report.Groups(self._columns["group_column"], parts.groups)
        self._classes = found.classes or found.label_columns
        self.notes += found.notes + targets.notes(found.classes, splits["train"].label.numpy(), self._wish)
        self.notes += pretrained.trust_note(self._trust_remote_code, self._spec)
        self.notes += labelled.duplicates_note(splits)
        _, self._channels, *sides = splits["train"].image.shape
        self._size = (sides[0], sides[1])
        self._settle_normalisation(processor, splits["train"])
        height, width = self._size
        shape = f"{height} x {width}, {'grey' if self._channels == 1 else 'RGB'}"
        self.data_lines[:] = [
            report.rows_line(
                {n: len(s.label) for n, s in splits.items()}, list(found.splits), "image", f" of {shape}", groups
            ),
            targets.said(found.classes, {name: s.label.numpy() for name, s in splits.items()}),
            f"first image: {' -> '.join(found.first)}",
        ]
        self._problem.settle(found.classes, splits["train"].label)
        labels = {name: self._problem.labels(s.label) for name, s in splits.items()}
        return {
            name: Split({"image": s.image, "label": labels[name]}, self._problem.counts(labels[name]))
            for name, s in splits.items()
        }

    def _wanted(self) -> tuple[_Processor | None, int | None, Size | None]:
        """What the model says of its images: its processor (None unless it is pretrained), channels, and size."""
        if isinstance(self._spec, Mapping):
            channels, size = self._spec.get("num_channels"), _as_size(self._spec.get("image_size"))
            _check_channels(channels)
            bare = pretrained.configuration({"model_type": self._spec["model_type"]})
            model_checks.check_kind(_AUTO, self._spec, bare, self._trust_remote_code)
            self._agree("num_channels", channels, "channels", self._asked_channels)
            if self._asked_size is not None:
                self._agree("image_size", size, "image_size", self._asked_size)
            return None, self._asked_channels or channels, self._asked_size or size
        config = pretrained.configuration(self._spec, self._trust_remote_code)
        model_checks.check_kind(_AUTO, self._spec, config, self._trust_remote_code)
        processor = _read_processor(self._spec, self._trust_remote_code)
        channels = getattr(config, "num_channels", None)
        _check_channels(channels)
        if self._pretrained:
            channels = channels or 3
            if self._asked_channels not in (None, channels):
                raise UserError(
                    f'"trainer.task_options.channels" is {self._asked_channels}, but {self._spec} takes {channels}.\n'
                    f"Leave it out: all images are given {channels} channel{'s' * (channels > 1)}."
                )
        size = (
            self._asked_size or (processor.size if processor else None) or _as_size(getattr(config, "image_size", None))
        )
        return (processor if self._pretrained else None), self._asked_channels or channels, size

    def _agree(self, key: str, in_model: Any, option: str, value: Any) -> None:
        if in_model is not None and value is not None and in_model != value:
            raise UserError(
                f'"trainer.task_options.{option}" is {_shown(value)}, but "trainer.task_options.model.{key}" is '
                f"{_shown(in_model)}. Leave one of them out."
            )

    def _settle_normalisation(self, processor: _Processor | None, train: ImageSplit) -> None:
        mean, std = self._asked_mean, self._asked_std
        if mean is None or std is None:
            if processor is not None and processor.fits(self._channels):
                mean, std = processor.mean, processor.std
                self.notes += processor.notes
            elif processor is not None:
                mean, std = train.mean_and_std()
                self.notes.append(
                    f"the image processor of {self._spec} has {len(processor.mean)} channels, its model takes "
                    f"{self._channels}: images are normalised by the training set's own mean {mean} and standard "
                    f"deviation {std}"
                )
            else:
                mean, std = train.mean_and_std()
                if isinstance(self._spec, str) and self._pretrained:
                    self.notes.append(
                        f"{self._spec} has no image processor, so images are normalised by the training set's own mean "
                        f"{mean} and standard deviation {std}"
                    )
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, self._channels):
                raise UserError(
                    f'"trainer.task_options.{name}" has {len(values)} numbers, but the images have {self._channels} '
                    f"channel{'s' * (self._channels > 1)}."
                )
        self._mean, self._std = (list(v) * (self._channels // len(v)) for v in (mean, std))

    # ------------------------------------------------------------ model

    def model(self) -> nn.Module:
        """(B, C, H, W) float32 as pixel_values -> logits (B, classes)."""
        assert self._classes, "splits() comes first"
        names = self._classes
        changes = problems.named_outputs(names, self._wish)
        if isinstance(self._spec, Mapping):
            spec: Any = problems.without_labels(self._spec, len(names), self._problem.said())
            known = pretrained.configuration({"model_type": self._spec["model_type"]})
            shape = {"num_channels": self._channels, "image_size": _side(self._size)}
            changes |= {name: value for name, value in shape.items() if hasattr(known, name)}
        else:
            spec = self._spec
            if not self._pretrained:
                changes |= {"num_channels": self._channels, "image_size": _side(self._size)}
        config = pretrained.configuration(spec, self._trust_remote_code, **changes)
        model = pretrained.build(
            _AUTO,
            spec,
            config,
            pretrained=self._pretrained,
            classes=names,
            new_head=self._new_head,
            trust_remote_code=self._trust_remote_code,
            notes=self.notes,
        )
        model_checks.check_saving(model, spec)
        self._try(model)
        return model

    def _try(self, model: nn.Module) -> None:
        """Sends one image through the model. A wrong size is found here, not only in the first step."""
        where = "x".join(str(side) for side in self._size)
        logits = model_checks.tried(
            model,
            self._spec,
            {"pixel_values": torch.zeros(1, self._channels, *self._size)},
            f"images of {where} pixels with {self._channels} channel{'s' * (self._channels > 1)}",
            "Set image_size in trainer.task_options to what the model takes.",
        )
        if logits.shape != (1, len(self._classes)):
            raise UserError(
                f'"trainer.task_options.model" gives logits of shape {tuple(logits.shape)} for one image, but the data '
                f"has {self._problem.said()}."
            )
        if self._problem.target is not None:
            units.check(model, {"pixel_values": torch.zeros(1, self._channels, *self._size)}, logits)

    # ------------------------------------------------------------ training

    # It only gathers, draws, and calculates with what is exact element by element.
    augment_in_chunks = True

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Crops, mirrors and erases, each image by its own numbers; all in uint8."""
        image = batch["image"]  # (B, C, H, W)
        padding = self._crop_padding
        if padding or self._flip:
            # Three numbers a sample: the crop's row and column in 0..2 padding, and whether it is mirrored.
            draws = random.uniform(3)
            moves = (draws[:, :2] * (2 * padding + 1)).to(torch.int64)
            image = images.shift_and_flip(image, padding, moves, draws[:, 2] < 0.5 if self._flip else None)
        if self._erasing:
            image = images.erase(image, self._erasing, random.uniform(5), self._constant("fill", image.device))
        return {**batch, "image": image}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, classes), or the standardised number (B,)."""
        image = batch["image"]
        scale, shift = self._constant("scale", image.device), self._constant("shift", image.device)
        return self._problem.outputs_of(model(pixel_values=images.normalise(image, scale, shift)).logits)

    def _constant(self, name: str, device: torch.device) -> Tensor:
        """What normalisation and erasing need, on a device. Made once for each, because a copy waits for the device."""
        if device not in self._constants:
            mean, std = torch.tensor(self._mean, dtype=torch.float64), torch.tensor(self._std, dtype=torch.float64)
            with torch.inference_mode(False):
                self._constants[device] = {
                    "scale": (1 / (255 * std)).view(1, -1, 1, 1).float().to(device),
                    "shift": (-mean / std).view(1, -1, 1, 1).float().to(device),
                    "fill": (mean * 255).round().clamp(0, 255).to(torch.uint8).to(device),
                }
        return self._constants[device][name]

    # ------------------------------------------------------------ afterwards

    def save(self, model: nn.Module, folder: Path) -> None:
        """Weights, config with the classes' names, and an image processor: what the Auto classes read."""
        with units.saved(model, self._problem.target, folder):
            channels = grey.save(model, folder)
        # The plain processor of transformers, which resizes, rescales and normalises.
        processor = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": channels == 3,
            "do_resize": True,
            "size": {"height": self._size[0], "width": self._size[1]},
            "resample": 2,  # bilinear
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self._mean * (channels // len(self._mean)),
            "image_std": self._std * (channels // len(self._std)),
        }
        (folder / _PROCESSOR_FILE).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> nn.Module:
        """The model that `save` wrote; what else `predict` needs is read from its folder too. Raises UserError."""
        model = pretrained.load_saved(_AUTO, folder)
        processor = _read_processor(str(folder), self._trust_remote_code)
        if processor is None or processor.size is None:
            raise UserError(f"{folder / _PROCESSOR_FILE} is missing: it says how images are prepared.")
        config: Any = model.config
        self._problem.names = self._classes = [config.id2label[i] for i in range(config.num_labels)]
        if self._wish.problem == targets.NUMBER:
            self._problem.target = units.restore(model, Path(folder))
        self._channels = int(getattr(config, "num_channels", 0) or 3)
        self._size = processor.size
        self._mean, self._std = (list(v) * (self._channels // len(v)) for v in (processor.mean, processor.std))
        self._constants.clear()
        return model

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """The file or row, and what is predicted (see `problems`), of images, an .npz file or a table of images."""
        kind, named = self._sources(Path(source))
        device = next(model.parameters()).device
        for block in reading.blocks(images.decode_all(named, self._channels, self._size), batch_size):
            batch = {"image": image_data.stacked([pixels for _, pixels, _ in block], self._channels).to(device)}
            with torch.inference_mode():
                outputs = self.forward(model, batch)
            for (name, _, _), prediction in zip(block, self._problem.predictions(outputs)):
                yield {kind: name, **prediction}

    def _sources(self, source: Path) -> tuple[str, Iterator[tuple[Any, Any]]]:
        """The word file or row, and (name, what to decode) of each image to predict on. Raises UserError."""
        if source.suffix.lower() == ".npz":
            return "row", iter(enumerate(image_arrays.read_npz_images(source)))
        return labelled_files.to_predict(source, IMAGES, self._columns["image_column"], self.notes)


TASK = ImageClassification


# ---------------------------------------------------------------- options and processors


class _Processor:
    """What a model's own image processor says: size (or None), mean and std; and notes on what is not done here."""

    def __init__(self, size: Size | None, mean: list[float], std: list[float], notes: list[str]) -> None:
        # A model of grey images may come with three equal numbers.
        self.mean, self.std = (values[:1] if len(set(values)) == 1 else values for values in (mean, std))
        self.size, self.notes = size, notes

    def fits(self, channels: int) -> bool:
        """Whether it says how images of so many channels are normalised."""
        return len(self.mean) in (1, channels) and len(self.std) in (1, channels)


def _read_processor(spec: str, trust_remote_code: bool) -> _Processor | None:
    """The image processor in a model's folder or under its hub name; None if there is none."""
    from transformers import AutoImageProcessor

    try:
        with pretrained.quiet():
            # The backend of Pillow: it is the same on machines with and without torchvision.
            own = AutoImageProcessor.from_pretrained(
                pretrained.where(spec), backend="pil", trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        file = Path(spec).expanduser() / _PROCESSOR_FILE
        if file.is_file():
            raise UserError(f"{file} cannot be used: {str(error).splitlines()[0]}") from error
        return None

    def get(name: str, default: Any) -> Any:
        value = getattr(own, name, None)
        return default if value is None else value

    size = None
    for sides in (get("crop_size", None) if get("do_center_crop", False) else None, get("size", None)):
        height, width = (_side_of(sides, name) for name in ("height", "width"))
        if size is None and height and width:
            size = (height, width)
    # (pixel * factor - mean) / std, where we divide pixels by 255.
    factor = 255 * (get("rescale_factor", 1 / 255) if get("do_rescale", True) else 1.0)
    plain = not get("do_normalize", False)
    mean = [float(m) / factor for m in _listed(0.0 if plain else get("image_mean", 0.0))]
    std = [float(s) / factor for s in _listed(1.0 if plain else get("image_std", 1.0))]
    notes = []
    if get("do_flip_channel_order", False):
        notes.append(f"the image processor of {spec} swaps red and blue, which is not done here")
    return _Processor(size, mean, std, notes)


def _side_of(size: Any, name: str) -> int:
    """A processor's height or width; its shortest edge if it keeps the aspect ratio; 0 if it says none."""
    values = [
        getattr(size, key, None) or (size.get(key) if isinstance(size, Mapping) else 0)
        for key in (name, "shortest_edge")
    ]
    return int(values[0] or values[1] or 0)


def _check_channels(channels: Any) -> None:
    if channels not in (None, 1, 3):
        raise UserError(
            f'"trainer.task_options.model" takes images of {channels} channels. Images here have 1 (grey) or 3 '
            "(colours); transparency is dropped. Take another model."
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _per_channel(name: str, value: Any, above: float | None) -> list[float] | None:
    """The option `mean` or `std`: one number, or one for each of 3 channels. Raises UserError."""
    if value is None:
        return None
    values = _listed(value)
    good = len(values) in (1, 3) and all(is_number(v) and abs(v) < 1e6 for v in values)
    rule = "a number" if above is None else f"a number above {above}"
    if not good or (above is not None and not all(v > above for v in values)):
        refuse(name, value, f"{rule}, or one a channel")
    return [float(v) for v in values]


def _as_size(value: Any) -> Size | None:
    if value is None:
        return None
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _side(size: Size) -> int | list[int]:
    """A size as transformers' configurations hold it: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
