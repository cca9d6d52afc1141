"""Handwritten digits: 1,797 real 8x8 images that come with scikit-learn (UCI, Alpaydin and Kaynak 1998).

This is the default task, and the smallest one. It needs no download and trains in a few seconds. It has BatchNorm,
dropout and augmentation, which exact strong scaling has to get right.
"""

from __future__ import annotations

import gzip
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import option
from ..config.task_options import read_options
from ..data.cut import Cut
from ..errors import UserError
from ..exact.order import SampleRandom, key
from ..exact.splits import Batch
from ..wording import counted, row_at
from . import classification

SAMPLES = 1797
TRAIN, VALIDATION = 1200, 297  # the remaining 300 are the test set


def read_images() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) with values 0..16, and labels (1797,), as scikit-learn's load_digits gives them.

    Reads the file that scikit-learn ships, without importing scikit-learn: the import costs every rank half a second
    or more. If a release keeps the file elsewhere, it calls load_digits.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise UserError("The task digits reads the images that scikit-learn ships: pip install scikit-learn.")
    file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        with gzip.open(file, "rt") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
        return table[:, :-1], table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return data.data.astype(np.float32), data.target.astype(np.int64)


def digit_moves(shift: int) -> Tensor:
    """((2 shift + 1)^2, 64) int64: for each move, where the 64 pixels lie in a flattened padded image."""
    side, steps = 8 + 2 * shift, torch.arange(2 * shift + 1)
    pixel = torch.arange(8)[:, None] * side + torch.arange(8)  # (8, 8)
    corner = steps[:, None] * side + steps  # (moves, moves)
    return (corner.reshape(-1, 1, 1) + pixel).flatten(1)


@dataclass(frozen=True, kw_only=True)
class DigitOptions:
    """The options of `digits`."""

    model: Literal["cnn", "mlp"] = option(
        "cnn", "cnn: three convolutions with BatchNorm, then dropout; mlp: 64-128-128-10, dropout"
    )
    width: int = option(
        0,
        "channels of the first convolution, or units of a hidden layer; 0 for the model's own",
        minimum=0,
        maximum=4096,
    )
    dropout: float = option(
        0.1,
        "probability of zeroing a feature before the classifier (cnn) or a hidden unit (mlp)",
        minimum=0,
        maximum=0.99,
    )
    shift: int = option(
        1, "augmentation: training images move by up to this many pixels in each direction", minimum=0, maximum=4
    )
    split_seed: int = option(0, "which images are train, validation and test, the same whatever the run's seed")
    norm: Literal["batch", "group"] = option(
        "batch", "of the cnn: BatchNorm, or group norm (Wu and He 2018, groups of 4 channels)"
    )


class Digits:
    """Classifies the digits with a small convolutional network or an MLP. Its arguments are `DigitOptions`."""

    Options = DigitOptions

    def __init__(self, **given: Any) -> None:
        o = read_options(DigitOptions, given)
        self._model, self._dropout, self._shift, self._split_seed = o.model, o.dropout, o.shift, o.split_seed
        self._norm = o.norm
        self._moves: Tensor | None = None
        self._width = o.width or {"cnn": 16, "mlp": 128}[o.model]
        if o.norm == "group" and (o.model == "mlp" or self._width % 4):
            raise UserError(
                '"trainer.task_options.norm": "group" needs the cnn, with a width that 4 divides; this is the '
                f"{o.model} with a width of {self._width}."
            )

    def splits(self, cut: Cut | None = None) -> dict[str, dict[str, Tensor]]:
        """Images (N, 1, 8, 8) float32 in 0..1, labels (N,) int64: 1,200 train, 297 validation, 300 test; or a fold."""
        images, labels = read_images()
        if cut is not None:  # of the images in scikit-learn's order
            pixels, label = torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16.0, torch.from_numpy(labels)
            return {name: {"image": pixels[rows], "label": label[rows]} for name, rows in cut(SAMPLES, labels).items()}
        order = np.random.default_rng(key(self._split_seed, "digits split")).permutation(SAMPLES)
        image = torch.from_numpy(images[order]).reshape(-1, 1, 8, 8) / 16.0
        label = torch.from_numpy(labels[order])
        cuts = {"train": slice(0, TRAIN), "validation": slice(TRAIN, TRAIN + VALIDATION)}
        cuts["test"] = slice(TRAIN + VALIDATION, SAMPLES)
        return {name: {"image": image[cut], "label": label[cut]} for name, cut in cuts.items()}

    def model(self) -> nn.Module:
        """(B, 1, 8, 8) -> logits (B, 10)."""
        w, p = self._width, self._dropout
        if self._model == "mlp":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(64, w), nn.ReLU(), nn.Dropout(p), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10)
            )

        def block(inputs: int, outputs: int) -> list[nn.Module]:
            # The convolution needs no bias: the normalisation subtracts it again, or has its own.
            norm = nn.BatchNorm2d(outputs) if self._norm == "batch" else nn.GroupNorm(outputs // 4, outputs)
            return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm, nn.ReLU()]

        return nn.Sequential(
            *block(1, w),
            *block(w, 2 * w),
            nn.MaxPool2d(2),
            *block(2 * w, 4 * w),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(p),
            nn.Linear(16 * w, 10),
        )

    # It only gathers, draws, and calculates with what is exact element by element.
    augment_in_chunks = True

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Moves each image by -shift..shift pixels in both directions, filling with background."""
        s = self._shift
        if s == 0:
            return batch
        image = batch["image"]  # (B, 1, 8, 8)
        if self._moves is None or self._moves.device != image.device:
            self._moves = digit_moves(s).to(image.device)
        choice = random.integers(len(self._moves)).view(-1)  # (B,)
        padded = F.pad(image, (s, s, s, s)).flatten(1)  # (B, (8 + 2s)^2)
        return {**batch, "image": padded.gather(1, self._moves.index_select(0, choice)).view(image.shape)}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, 10)."""
        return model(batch["image"])

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Summed cross-entropy, and the number of samples."""
        return self.sample_losses(outputs, batch).sum(), len(outputs)

    def sample_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The cross-entropy of each sample, (B,)."""
        return F.cross_entropy(outputs, batch["label"], reduction="none")

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, float]:
        """The share of images whose likeliest class is the right one."""
        return {"accuracy": float((outputs.argmax(dim=1) == batch["label"]).double().mean())}

    def predictions(self, outputs: Tensor, batch: Batch) -> dict[str, Sequence[Any]]:
        """Of each image: the digit, the likeliest one, and the probability of each."""
        return classification.columns(outputs, batch["label"], [str(digit) for digit in range(10)])

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """{"label", "score"} for each line of a csv file: 64 pixels, row after row, from 0 to 16, as scikit-learn's."""
        pixels = _pixels(source)
        device = next(model.parameters()).device
        images = torch.from_numpy(pixels).reshape(-1, 1, 8, 8) / 16.0
        names = [str(digit) for digit in range(10)]
        for part in images.split(batch_size):
            yield from classification.predictions(self.forward(model, {"image": part.to(device)}), names)


# What `predict` reads.
_LINES = (
    "Each line is one digit: 64 numbers from 0 to 16 with commas between them, row after row of its 8 x 8 pixels, as "
    "in scikit-learn's load_digits. There is no header and no label"
)


def _pixels(source: str | Path) -> np.ndarray:
    """The digits of a csv file, (N, 64) float32 from 0 to 16. Raises UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file without lines, which is an error here
            pixels = np.loadtxt(source, delimiter=",", dtype=np.float32, ndmin=2)
    except OSError as error:
        reason = error.strerror or ("it is not there" if not Path(source).exists() else str(error))
        raise UserError(f"--input {source} cannot be read: {reason}.") from error
    except ValueError as error:
        raise UserError(f"--input {source}: {_wrong_line(Path(source))}.\n{_LINES}.") from error
    wrong = np.flatnonzero(~((pixels >= 0) & (pixels <= 16)).all(axis=1))
    if not len(pixels) or pixels.shape[1] != 64:
        raise UserError(
            f"--input {source} has {counted(len(pixels), 'line')} of {counted(pixels.shape[1], 'number')}.\n{_LINES}."
        )
    if len(wrong):
        raise UserError(f"--input {source}: {row_at(int(wrong[0]))} has a number below 0 or above 16.\n{_LINES}.")
    return pixels


def _wrong_line(source: Path) -> str:
    """What is wrong with the first line that does not hold 64 numbers."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return "this is no text"
    for number, line in enumerate(lines, start=1):
        cells = line.split(",")
        for cell in cells if line.strip() else ():
            try:
                float(cell)
            except ValueError:
                header = ". It looks like a header: remove it" if number == 1 and len(cells) > 1 else ""
                return f"line {number:,} holds {cell[:50]!r}, which is no number" + header
        if line.strip() and len(cells) != 64:
            return f"line {number:,} holds {counted(len(cells), 'number')}, not 64"
    return "it does not hold lines of 64 numbers"


TASK = Digits
