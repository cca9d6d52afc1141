"""Classes or numbers of clips of sound: log-mel features and a small ResNet, or a pretrained model of transformers.

A model from a configuration sees log-mel features as grey images: any AutoModelForImageClassification. A model's folder
or hub name is any AutoModelForAudioClassification, with the feature extractor that comes with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.schema import option, read_json
from ..config.task_options import read_options, required
from ..data import (
    audio,
    audio_data,
    audio_files,
    held_out,
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
from ..data.audio_data import AudioSplit, Columns
from ..data.audio_files import CLIPS
from ..data.cut import Cut
from ..data.feature_extractors import Extractor
from ..errors import UserError
from ..exact.order import SampleRandom
from ..exact.splits import Batch, Split
from . import problems
from .hub_options import HubOptions, TargetOptions

_OF_FEATURES = "AutoModelForImageClassification"
_OF_SOUND = "AutoModelForAudioClassification"
# Beside the saved weights: how clips are prepared.
FACTS = "audio.json"
_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 32,
    "hidden_sizes": [32, 64, 128],
    "depths": [1, 1, 1],
}
_USUAL_RATE = 16_000


@dataclass(frozen=True, kw_only=True)
class AudioOptions(TargetOptions, HubOptions):
    """The options of `audio_classification`."""

    data: Any = required(
        "a folder of class folders (also with train/ and test/ above them), or with a metadata.csv (columns file_name "
        "and label); a csv, tsv, json, jsonl or parquet file with a column of paths (or of audio files themselves); a "
        "folder of such tables, or one that save_to_disk wrote; a dataset's name on the hub; or {split: any of these}"
    )
    model: Any = option(
        None,
        "a folder or hub name of an audio classifier; or the configuration of a classifier of images, which sees "
        "log-mel features as grey images; without it a ResNet of 0.3 million parameters",
    )
    audio_column: str | None = option(None, "the column of clips; the usual names are found")
    audio_folder: str | None = option(None, "the folder at which paths in a table begin; without it that of the table")
    sample_rate: int | None = option(
        None,
        "in Hz, to which all clips are resampled; without it 16,000, or the rate of the model's feature extractor",
        minimum=audio.RATES[0],
        maximum=audio.RATES[1],
    )
    max_seconds: float | None = option(
        None,
        "longer clips are cut to it, shorter ones are padded; without it the length of the longest clip",
        above=0,
        maximum=3600,
    )
    mel_bands: int = option(64, "of log-mel features: bands of the mel scale", minimum=4, maximum=1024)
    window_seconds: float = option(0.025, "of log-mel features: the length of a frame", minimum=0.001, maximum=1)
    hop_seconds: float = option(0.01, "of log-mel features: the time to the next frame", minimum=0.0005, maximum=1)
    shift_seconds: float = option(
        0.0,
        "augmentation of log-mel features: a clip moves by up to this much, around its end",
        minimum=0,
        maximum=3600,
    )
    mask_seconds: float = option(
        0.0,
        "augmentation of log-mel features: the longest stripe of frames that is filled with the mean (Park et al. "
        "2019)",
        minimum=0,
        maximum=3600,
    )
    mask_bands: int = option(0, "the same for bands", minimum=0, maximum=1024)
    new_head: bool = option(False, "replace a last layer that was trained for other classes")
    validation_fraction: float = option(
        0.1,
        "share of each class held out of the training set if there is no validation split",
        minimum=0,
        below=1,
    )
    test_fraction: float = option(0.0, "the same for the test split", minimum=0, below=1)


# Options that only log-mel features have.
_LOG_MEL = ("mel_bands", "window_seconds", "hop_seconds", "shift_seconds", "mask_seconds", "mask_bands")


class AudioClassification(problems.WithProblem):
    """Fine-tunes, or trains from scratch, a classifier of clips. Its arguments are `AudioOptions`."""

    Options = AudioOptions
    pipeline_tag = "audio-classification"

    def __init__(self, **given: Any) -> None:
        o = read_options(AudioOptions, given)
        self._spec: Any = _RESNET if o.model is None else o.model
        pretrained.check_spec(self._spec, "classifier of audio", json.dumps(_RESNET))
        self._wish = o.wish()
        model_checks.check_problem_type(self._spec, self._wish.problem)
        self._problem = problems.problem(self._wish, o.class_weights, o.label_smoothing)
        self.best_metric = self._problem.best_metric
        sources.check_data(o.data, o.config_name)
        held_out.check_fractions(o.validation_fraction, o.test_fraction)
        self._log_mel = isinstance(self._spec, Mapping)
        for name in ("new_head", "pretrained") if self._log_mel else _LOG_MEL:
            if name in given and getattr(o, name) != _default(name):
                what = (
                    "a model that is built from a configuration" if self._log_mel else "a model with its own features"
                )
                raise UserError(f'"trainer.task_options.{name}" has no effect on {what}. Leave it out.')
        self._options = o
        self._columns = Columns(o.config_name, o.split_column, o.audio_column, o.audio_folder, o.group_column)
        self.random_weights = self._log_mel or not o.pretrained
        self.notes: list[str] = []
        self.data_lines: list[str] = []
        # Known once the data or a saved model is read.
        self._front: audio.LogMel | Extractor | None = None
        self._classes: list[str] = []  # or the column of numbers
        self._mean, self._std = 0.0, 1.0
        self._sample: Batch = {}  # a clip of the training set, on which `model` tries the model
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    # ------------------------------------------------------------ data

    def splits(self, cut: Cut | None = None) -> dict[str, Split]:
        """Features of clips, and labels: (N,) int64, (N, classes) float32 of 0 and 1, or (N,) float32.

        clip is (N, 1, bands, frames) int16, or (N, ...) float32 and length (N,) int64 from a feature extractor. With
        `cut`, the splits of a fold.
        """
        o = self._options
        self.notes.clear()
        self._constants.clear()
        front = self._wanted()
        found, self._front = audio_data.read_clips(o.data, front, o.max_seconds, self._columns, self._wish)
        parts = found.cut(cut, {"test": o.test_fraction, "validation": o.validation_fraction}, o.split_seed)
        splits, groups = parts.splits, report.Groups(o.group_column, parts.groups)
        train = splits["train"]
        self._classes = found.classes or found.label_columns
        self.notes += found.notes + targets.notes(found.classes, train.label.numpy(), self._wish)
        self.notes += pretrained.trust_note(o.trust_remote_code, self._spec)
        self.notes += labelled.duplicates_note(splits)
        if self._log_mel:
            self._mean, self._std = train.mean_and_std()
        self.data_lines[:] = [
            report.rows_line(
                {n: len(s.label) for n, s in splits.items()}, list(found.splits), "clip", self._shape(), groups
            ),
            targets.said(found.classes, {name: s.label.numpy() for name, s in splits.items()}),
            f"first clip: {' -> '.join(found.first)}",
        ]
        self._problem.settle(found.classes, train.label)
        self._sample = {name: array[:1].clone() for name, array in self._arrays(train).items()}
        result = {}
        for name, split in splits.items():
            label = self._problem.labels(split.label)
            result[name] = Split({**self._arrays(split), "label": label}, self._problem.counts(label))
        return result

    def _wanted(self) -> audio.LogMel | Extractor:
        """What makes features: as the options say, or as the model's feature extractor does."""
        o = self._options
        if self._log_mel:
            bare = pretrained.configuration({"model_type": self._spec["model_type"]})
            model_checks.check_kind(_OF_FEATURES, self._spec, bare, o.trust_remote_code)
            if self._spec.get("num_channels", 1) != 1:
                raise UserError(
                    '"trainer.task_options.model.num_channels" must be 1, or left out: log-mel features have one.'
                )
            rate = o.sample_rate or _USUAL_RATE
            return audio.LogMel(
                rate, 0, o.mel_bands, max(2, round(o.window_seconds * rate)), max(1, round(o.hop_seconds * rate))
            )
        config = pretrained.configuration(self._spec, o.trust_remote_code)
        model_checks.check_kind(_OF_SOUND, self._spec, config, o.trust_remote_code)
        front = Extractor(self._spec, o.trust_remote_code)
        if o.sample_rate not in (None, front.rate):
            raise UserError(
                f'"trainer.task_options.sample_rate" is {o.sample_rate}, but {self._spec} takes {front.rate:,} Hz. '
                "Leave it out: all clips are resampled to that."
            )
        return front

    def _shape(self) -> str:
        front = self._front
        assert front is not None
        shape = f" of {front.samples / front.rate:g} s at {front.rate:,} Hz"
        return shape + (f", {front.bands} bands x {front.frames} frames" if isinstance(front, audio.LogMel) else "")

    def _arrays(self, split: AudioSplit) -> Batch:
        """What a model is called with, of clips as they were prepared."""
        told = bool((split.length >= 0).all())
        return {"clip": split.clip} | ({"length": split.length} if told else {})

    # ------------------------------------------------------------ model

    def model(self) -> nn.Module:
        """Features of clips -> logits (B, classes)."""
        assert self._classes and self._front is not None, "splits() comes first"
        o, names = self._options, self._classes
        changes = problems.named_outputs(names, self._wish)
        spec = self._spec
        if isinstance(self._front, audio.LogMel):
            spec = problems.without_labels(spec, len(names), self._problem.said())
            known = pretrained.configuration({"model_type": spec["model_type"]})
            shape = {"num_channels": 1, "image_size": [self._front.bands, self._front.frames]}
            changes |= {name: value for name, value in shape.items() if hasattr(known, name)}
        else:
            changes |= self._settled(pretrained.configuration(spec, o.trust_remote_code))
        config = pretrained.configuration(spec, o.trust_remote_code, **changes)
        model = pretrained.build(
            self._auto,
            spec,
            config,
            pretrained=o.pretrained,
            classes=names,
            new_head=o.new_head,
            trust_remote_code=o.trust_remote_code,
            notes=self.notes,
        )
        model_checks.check_saving(model, spec)
        self._try(model)
        return model

    @property
    def _auto(self) -> str:
        return _OF_FEATURES if self._log_mel else _OF_SOUND

    def _settled(self, config: Any) -> dict[str, Any]:
        """Switches off the settings of a configuration that draw random numbers which belong to no sample."""
        off = {"apply_spec_augment": False, "layerdrop": 0.0}
        changed = {name: value for name, value in off.items() if getattr(config, name, None)}
        if changed:
            self.notes.append(
                f"{' and '.join(changed)} of {self._spec} {'are' if len(changed) > 1 else 'is'} switched off: what is "
                "drawn for them in training would not be the same at every number of ranks"
            )
        return changed

    def _try(self, model: nn.Module) -> None:
        """Sends one clip through the model. A wrong length is found here, not only in the first step."""
        inputs = self._inputs(self._sample)
        advice = "Set max_seconds in trainer.task_options to what the model takes."
        logits = model_checks.tried(model, self._spec, inputs, f"clips{self._shape()}", advice)
        if logits.shape != (1, len(self._classes)):
            raise UserError(
                f'"trainer.task_options.model" gives logits of shape {tuple(logits.shape)} for one clip, but the data '
                f"has {self._problem.said()}."
            )
        if self._problem.target is not None:
            units.check(model, inputs, logits)

    # ------------------------------------------------------------ training

    # It only gathers, draws, and compares.
    augment_in_chunks = True

    def augment(self, batch: Batch, random: SampleRandom) -> Batch:
        """Moves each clip along its frames and masks a stripe of them and one of bands; all in whole numbers."""
        o, front, clip = self._options, self._front, batch["clip"]
        if not isinstance(front, audio.LogMel) or not (o.shift_seconds or o.mask_seconds or o.mask_bands):
            return batch
        draws = random.uniform(5)  # the move, and width and place of both stripes
        shift, most = (int(seconds * front.rate / front.hop) for seconds in (o.shift_seconds, o.mask_seconds))
        fill = round(self._mean)
        if shift:
            shift = min(shift, front.frames - 1)
            moves = (draws[:, 0] * (2 * shift + 1)).to(torch.int64) - shift
            clip = audio.roll(clip, moves)
        if most:
            clip = audio.mask(clip, 3, min(most, front.frames), draws[:, 1:3], fill)
        if o.mask_bands:
            clip = audio.mask(clip, 2, min(o.mask_bands, front.bands), draws[:, 3:5], fill)
        return {**batch, "clip": clip}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits (B, classes), or the standardised number (B,)."""
        return self._problem.outputs_of(model(**self._inputs(batch)).logits)

    def _inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What a model's forward takes."""
        clip, front = batch["clip"], self._front
        if isinstance(front, Extractor):
            inputs = {front.name: clip}
            if "length" in batch:
                places = torch.arange(clip.shape[-1], device=clip.device)
                inputs["attention_mask"] = (places < batch["length"][:, None]).long()
            return inputs
        return {"pixel_values": images.normalise(clip, *self._standard(clip.device))}

    def _standard(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and shift of log-mel features, on a device. Made once for each, because a copy waits for the device."""
        if device not in self._constants:
            with torch.inference_mode(False):
                values = torch.tensor([1 / self._std, -self._mean / self._std], dtype=torch.float64).float().to(device)
                scale, shift = values.view(2, 1, 1, 1, 1).unbind(0)
                self._constants[device] = (scale.clone(), shift.clone())
        return self._constants[device]

    # ------------------------------------------------------------ afterwards

    def save(self, model: nn.Module, folder: Path) -> None:
        """Weights and config with the classes' names; how clips are prepared; and the feature extractor, if any."""
        front: Any = self._front
        saved: Any = model
        with units.saved(model, self._problem.target, folder), pretrained.quiet():
            saved.save_pretrained(str(folder))
        facts = {"rate": front.rate, "samples": front.samples}
        if isinstance(front, Extractor):
            front.save(folder)
        else:
            facts |= {**front.facts, "mean": self._mean, "std": self._std}
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> nn.Module:
        """The model that `save` wrote; what else `predict` needs is read from its folder too. Raises UserError."""
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise UserError(f"{folder / FACTS} is missing: it says how clips are prepared.")
        facts = read_json(folder / FACTS)
        names = [field.name for field in fields(audio.LogMel)]
        try:
            if self._log_mel:
                self._front = audio.LogMel(**{name: facts[name] for name in names})
                self._mean, self._std = float(facts["mean"]), float(facts["std"])
            else:
                self._front = audio_data.fitted(
                    Extractor(str(folder), self._options.trust_remote_code), int(facts["samples"])
                )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / FACTS} cannot be used: it does not say how clips are prepared.") from error
        model = pretrained.load_saved(self._auto, folder)
        config: Any = model.config
        self._problem.names = self._classes = [config.id2label[i] for i in range(config.num_labels)]
        if self._wish.problem == targets.NUMBER:
            self._problem.target = units.restore(model, folder)
        self._constants.clear()
        return model

    def predict(self, model: nn.Module, source: str | Path, batch_size: int) -> Iterator[dict[str, Any]]:
        """The file or row, and what is predicted (see `problems`), of a clip, a folder of clips or a table of them."""
        audio.soundfile()
        front, path = self._front, Path(source)
        assert front is not None
        base = Path(self._columns.audio_folder or audio_files.base_of(str(path))).expanduser()
        kind, named = labelled_files.to_predict(
            path, CLIPS, self._columns.audio_column, self.notes, lambda t, c: labelled_files.with_paths(t, c, base)
        )
        device = next(model.parameters()).device
        clips = reading.read_each(
            named, lambda one: audio.read_clip(one, front.rate, front.samples)[0], CLIPS.word, audio.reason
        )
        for block in reading.blocks(clips, batch_size):
            rows = [audio_data.prepared(front, clip) for _, clip in block]
            batch = {"clip": torch.stack([torch.from_numpy(features) for features, _ in rows]).to(device)}
            if rows[0][1] >= 0:
                batch["length"] = torch.tensor([length for _, length in rows], device=device)
            with torch.inference_mode():
                outputs = self.forward(model, batch)
            for (name, _), prediction in zip(block, self._problem.predictions(outputs)):
                yield {kind: name, **prediction}


TASK = AudioClassification


def _default(name: str) -> Any:
    return next(field.default for field in fields(AudioOptions) if field.name == name)
