"""The task `audio_classification`: features, augmentation, its models, and what it saves and predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from tests.data.test_audio import tone
from tests.data.test_audio_data import tones
from trainer.config.keys import FoldOptions
from trainer.data.cut import Cut
from trainer.errors import UserError
from trainer.exact.order import SampleRandom
from trainer.tasks.protocol import load_task

pytestmark = pytest.mark.usefixtures("own_caches", "one_thread")

# `python -m trainer predict` turns this name into the same task.
NAME = "audio_classification"
RESNET = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
SMALL = {"model": RESNET, "sample_rate": 8000, "max_seconds": 0.25, "mel_bands": 16}


def made(options: dict[str, Any]) -> tuple[Any, Any, Any]:
    task: Any = load_task(NAME, options)
    splits = task.splits()
    return task, splits, task.model()


def built(folder: Path, each: int = 3, **options: Any) -> tuple[Any, Any, Any]:
    """A task, its splits and its model."""
    torch.manual_seed(0)
    data = folder / "tones"
    if not data.exists():
        tones(data, each=each)
    return made({"data": str(data), "validation_fraction": 0, **SMALL, **options})


def test_features_are_standardised_by_the_training_split(tmp_path: Path) -> None:
    task, splits, _ = built(tmp_path)
    assert task.data_lines == [
        "12 clips of 0.25 s at 8,000 Hz, 16 bands x 23 frames: train 6, test 6. Nothing is held out for validation, so "
        "the model of the last step is kept",
        "2 classes (train + test): low 3 + 3, up 3 + 3",
        "first clip: train/low/0.wav -> low",
    ]
    seen = task._inputs(splits["train"].arrays)["pixel_values"]
    assert seen.shape == (6, 1, 16, 23) and splits["train"].arrays["clip"].dtype == torch.int16
    assert float(seen.double().mean()) == pytest.approx(0, abs=1e-4)
    assert float(seen.double().std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_nothing_of_a_tested_fold_is_in_what_standardises(tmp_path: Path) -> None:
    task = built(tmp_path, each=4)[0]
    cut = Cut(FoldOptions(folds=2, number=0))
    splits = task.splits(cut)
    whole = torch.cat([part.arrays["clip"] for part in splits.values()]).double()
    assert {name: len(part) for name, part in splits.items()} == {"train": 8, "test": 8}
    assert task._mean == pytest.approx(float(splits["train"].arrays["clip"].double().mean()), abs=1e-3)
    assert task._mean != pytest.approx(float(whole.mean()), abs=1e-3)


def test_augmentation_treats_each_clip_on_its_own(tmp_path: Path) -> None:
    task, splits, _ = built(tmp_path, shift_seconds=0.05, mask_seconds=0.08, mask_bands=6)
    train = splits["train"]
    random = SampleRandom(3, len(train), torch.device("cpu"))
    random.start_epoch(4)
    samples = torch.tensor([5, 0, 3, 4])
    ours = task.augment(train.gather(samples), random.of(samples))["clip"]
    assert (ours != train.arrays["clip"][samples]).flatten(1).any(dim=1).all()
    for i in range(len(samples)):
        alone = task.augment(train.gather(samples[i : i + 1]), random.of(samples[i : i + 1]))["clip"]
        assert torch.equal(alone[0], ours[i])
    plain = built(tmp_path)[0]
    batch = train.gather(samples)
    assert plain.augment(batch, random.of(samples)) is batch


def saved(task: Any, model: Any, folder: Path) -> Any:
    """A model that was saved, and the task that has loaded it."""
    folder.mkdir()
    task.save(model, folder)
    again: Any = load_task(NAME, {"data": "elsewhere", **{n: v for n, v in SMALL.items() if n == "model"}})
    return again, again.load(folder)


def test_what_is_saved_predicts_files_folders_and_tables(tmp_path: Path) -> None:
    task, splits, model = built(tmp_path)
    model.eval()
    with torch.no_grad():
        ours = torch.softmax(task.forward(model, splits["test"].arrays).double(), 1).max(1)
    again, loaded = saved(task, model, tmp_path / "model")
    folder = tmp_path / "tones" / "test"
    rows = list(again.predict(loaded, folder, 4))
    assert [row["file"] for row in rows] == sorted(str(file) for file in folder.glob("*/*"))
    assert [row["score"] for row in rows] == pytest.approx(ours.values.tolist(), abs=2e-6)
    assert [row["label"] for row in rows] == [["low", "up"][i] for i in ours.indices.tolist()]
    one = list(again.predict(loaded, folder / "up" / "1.flac", 4))
    assert one == [{**rows[4], "score": pytest.approx(rows[4]["score"], abs=2e-6)}]
    (folder / "new.csv").write_text("path\nup/1.flac\nlow/0.wav\n")
    table = list(again.predict(loaded, folder / "new.csv", 4))
    assert [row["score"] for row in table] == pytest.approx([rows[4]["score"], rows[0]["score"]], abs=2e-6)
    (folder / "up" / "1.flac").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"1 clip cannot be read:\n.*1\.flac \(Format not recognised\)"):
        list(again.predict(loaded, folder, 4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips in this folder"):
        list(again.predict(loaded, tmp_path / "empty", 4))
    (tmp_path / "model" / "audio.json").write_text('{"rate": 8000}')
    with pytest.raises(UserError, match=r"audio\.json cannot be used"):
        again.load(tmp_path / "model")


def test_numbers_are_in_their_units(tmp_path: Path) -> None:
    pitches = [300, 500, 900, 1400]
    for pitch in pitches:
        tone(tmp_path / "tones" / f"{pitch}.wav", pitch)
    rows = "".join(f"{pitch}.wav,{pitch}\n" for pitch in pitches)
    (tmp_path / "tones" / "metadata.csv").write_text("file_name,pitch\n" + rows)
    options = {"problem_type": "regression", "label_column": "pitch"}
    task, splits, model = built(tmp_path, **options)
    assert splits["train"].arrays["label"].mean() == pytest.approx(0, abs=1e-6)
    model.eval()
    (tmp_path / "model").mkdir()
    task.save(model, tmp_path / "model")
    again: Any = load_task(NAME, {"data": "elsewhere", "model": RESNET, **options})
    values = [row["value"] for row in again.predict(again.load(tmp_path / "model"), tmp_path / "tones", 2)]
    with torch.no_grad():
        outputs = task.forward(model, splits["train"].arrays).double()
    order = np.argsort([str(p) for p in pitches])
    expected = outputs * np.std(pitches) + np.mean(pitches)
    np.testing.assert_allclose(values, expected.numpy()[order], rtol=1e-4)


# ---------------------------------------------------------------- pretrained models

WAV2VEC2 = {
    "model_type": "wav2vec2",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "conv_dim": [4, 4],
    "conv_kernel": [10, 8],
    "conv_stride": [8, 8],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 4,
    "num_labels": 2,
}
AST = {
    "model_type": "audio-spectrogram-transformer",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_length": 24,
    "num_mel_bins": 16,
    "num_labels": 2,
}


def pretrained_folder(folder: Path, spec: dict[str, Any], **extractor: Any) -> Path:
    """A small model of sound with random weights, and its feature extractor."""
    from transformers import (
        ASTFeatureExtractor,
        AutoConfig,
        AutoModelForAudioClassification,
        Wav2Vec2FeatureExtractor,
    )

    torch.manual_seed(1)
    AutoModelForAudioClassification.from_config(AutoConfig.for_model(**spec)).save_pretrained(folder)
    kind: Any = Wav2Vec2FeatureExtractor if spec is WAV2VEC2 else ASTFeatureExtractor
    kind(sampling_rate=8000, **extractor).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("spec", "extractor"),
    [
        (WAV2VEC2, {"return_attention_mask": True}),
        (WAV2VEC2, {"return_attention_mask": False}),
        (AST, {"max_length": 24, "num_mel_bins": 16}),
    ],
    ids=["wav2vec2 with a mask", "wav2vec2", "ast"],
)
def test_a_pretrained_model_is_fed_and_saved_as_transformers_would(
    tmp_path: Path, spec: dict[str, Any], extractor: dict[str, Any]
) -> None:
    from transformers import pipeline

    folder = pretrained_folder(tmp_path / "base", spec, **extractor)
    tones(tmp_path / "tones", seconds=0.2)
    tone(tmp_path / "tones" / "test" / "low" / "0.wav", 300, seconds=0.15)
    options = {"data": str(tmp_path / "tones"), "model": str(folder), "max_seconds": 0.25, "validation_fraction": 0}
    task: Any = load_task(NAME, options)
    splits = task.splits()
    model = task.model().eval()
    assert ("length" in splits["test"].arrays) == extractor.get("return_attention_mask", False)
    assert any("apply_spec_augment and layerdrop of" in note for note in task.notes) == (spec is WAV2VEC2)
    with torch.no_grad():
        ours = torch.softmax(task.forward(model, splits["test"].arrays).double(), 1)
    (tmp_path / "model").mkdir()
    task.save(model, tmp_path / "model")

    again: Any = load_task(NAME, options)
    rows = list(again.predict(again.load(tmp_path / "model"), tmp_path / "tones" / "test", 4))
    assert [row["score"] for row in rows] == pytest.approx(ours.max(1).values.tolist(), abs=2e-6)
    if "length" not in splits["test"].arrays and spec is WAV2VEC2:
        return  # a pipeline does not pad, which this model could not tell from silence
    theirs = pipeline("audio-classification", model=str(tmp_path / "model"), device="cpu")
    for i, file in enumerate(row["file"] for row in rows):
        clip, _ = soundfile.read(file, dtype="float32")
        scores = {entry["label"]: entry["score"] for entry in theirs({"raw": clip, "sampling_rate": 8000})}
        assert scores["up"] == pytest.approx(float(ours[i, 1]), abs=1e-4)


def test_a_pretrained_model_that_does_not_fit(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path / "base", WAV2VEC2)

    def wrong(words: str, **options: Any) -> None:
        data = {"data": str(tmp_path / "tones"), "max_seconds": 0.25, "validation_fraction": 0}
        with pytest.raises(UserError, match=words):
            made({"model": str(folder)} | data | options)

    tones(tmp_path / "tones", ("train",))
    tone(tmp_path / "tones" / "train" / "third" / "1.wav", 900)
    wrong(r"(?s)trained for 2 classes, but the data has 3.*new_head")
    wrong(r'sample_rate" is 16000, but .* takes 8,000 Hz', sample_rate=16_000)
    wrong(r'mask_bands" has no effect on a model with its own features', mask_bands=4)
    wrong(r"(?s)cannot compute clips of 0\.002 s at 8,000 Hz.*Set max_seconds", max_seconds=0.002, new_head=True)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    wrong("are pickled", new_head=True)
    (folder / "preprocessor_config.json").write_text("{")
    wrong(r"(?s)the feature extractor of .* cannot be used.*preprocessor_config\.json")


# ---------------------------------------------------------------- what must change

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": 3}, r"task_options.data\" is 3"),
    ({"model": {"hidden_sizes": [4]}}, "folder or hub name of a classifier of audio"),
    ({"model": {"model_type": "bert"}}, "(?s)bert is not a classifier of images.*resnet"),
    ({"model": {**RESNET, "num_channels": 3}}, 'num_channels" must be 1'),
    ({"model": {**RESNET, "num_labels": 7}}, "is for 7 classes, but the data has 2"),
    ({"new_head": True}, 'new_head" has no effect'),
    ({"sample_rate": 10}, r'sample_rate" is 10. It must be at least 1000'),
    ({"max_seconds": 0}, 'max_seconds" is 0'),
    ({"max_seconds": 0.01}, "must be at least window_seconds"),
    ({"mel_bands": 300}, 'mel_bands" is 300. It must be fewer'),
    ({"audio_column": ""}, "audio_column"),
    ({"shift_second": 1}, 'unknown key .*Did you mean "shift_seconds"'),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(i) + next(iter(o)) for i, (o, _) in enumerate(WRONG)])
def test_one_message_for_what_must_change(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(tmp_path, **options)


def test_the_saved_folder_says_how_clips_are_prepared(tmp_path: Path) -> None:
    task, _, model = built(tmp_path)
    (tmp_path / "model").mkdir()
    task.save(model, tmp_path / "model")
    facts = json.loads((tmp_path / "model" / "audio.json").read_text())
    assert {name: facts[name] for name in ("rate", "samples", "bands", "window", "hop")} == {
        "rate": 8000, "samples": 2000, "bands": 16, "window": 200, "hop": 80,
    }  # fmt: skip
    assert (facts["mean"], facts["std"]) == (task._mean, task._std)
