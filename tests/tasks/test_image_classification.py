"""The task `image_classification`: its options, augmentation and models, and what it saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_image_data import class_folders
from tests.data.test_images import encoded, erased, shifted_and_flipped, some_images
from trainer.errors import UserError
from trainer.exact.order import SampleRandom
from trainer.tasks.image_classification import ImageClassification
from trainer.tasks.protocol import load_task

pytestmark = pytest.mark.usefixtures("own_caches")

RESNET = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}
VIT = {
    "model_type": "vit",
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
# `python -m trainer predict` turns these names into the same task.
NAME = "image_classification"


def dataset(path: Path, *, classes: int = 3, side: int = 8, channels: int = 3, train: int = 30) -> str:
    """An .npz file; the classes differ in brightness."""
    arrays: dict[str, Any] = {}
    for i, (split, count) in enumerate((("train", train), ("test", 9))):
        y = np.arange(count) % classes
        x = (
            some_images(count, side, side, channels, seed=i) // 2
            + (y * 120 // classes).astype(np.uint8)[:, None, None, None]
        )
        arrays |= {f"{split}_x": x if channels > 1 else x[..., 0], f"{split}_y": y}
    np.savez(path / "data.npz", **arrays)
    return str(path / "data.npz")


def built(path: Path, **options: Any) -> tuple[ImageClassification, Any, Any]:
    """A task, its splits and its model."""
    torch.manual_seed(0)
    task: Any = load_task(NAME, {"data": dataset(path), "model": RESNET, **options})
    splits = task.splits()
    return task, splits, task.model()


# ---------------------------------------------------------------- data


def test_splits_are_bytes_and_a_tenth_of_each_class_is_held_out(tmp_path: Path) -> None:
    data = dataset(tmp_path, train=60)
    task: Any = load_task(NAME, {"data": data, "model": RESNET})
    splits = task.splits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 54, "validation": 6, "test": 9}
    assert splits["train"].arrays["image"].dtype == torch.uint8
    assert torch.bincount(splits["validation"].arrays["label"]).tolist() == [2, 2, 2]
    again = load_task(NAME, {"data": data, "model": RESNET}).splits()
    for name in splits:
        assert splits[name].data_hash() == again[name].data_hash()
    assert list(load_task(NAME, {"data": data, "model": RESNET, "validation_fraction": 0}).splits()) == [
        "train",
        "test",
    ]


def test_duplicates_between_splits_are_counted(tmp_path: Path) -> None:
    x, y = some_images(20, 4, 4), np.arange(20) % 2
    np.savez(tmp_path / "a.npz", train_x=x, train_y=y, test_x=np.concatenate([x[3:6], x[:2] ^ 1]), test_y=y[:5])
    task: Any = load_task(NAME, {"data": str(tmp_path / "a.npz"), "model": RESNET, "validation_fraction": 0})
    task.splits()
    assert task.notes == ["3 of the 5 samples of test are also in train, so its metrics are too good"]


def test_class_weights_are_counts(tmp_path: Path) -> None:
    task, splits, model = built(tmp_path, class_weights={"1": 2.5}, label_smoothing=0.1)
    train = splits["train"]
    labels = train.arrays["label"]
    assert train.counts.tolist() == [2.5 if label == 1 else 1.0 for label in labels.tolist()]
    batch = train.gather(torch.arange(7))
    logits = task.forward(model, batch)
    logits = logits.detach()
    loss, count = task.loss(logits, batch)
    weights = torch.tensor([1.0, 2.5, 1.0], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels[:7], weights, label_smoothing=0.1)
    assert float(loss) / float(count) == pytest.approx(float(expected), rel=1e-5)
    assert float(count) == pytest.approx(float(train.counts[:7].sum()))


# ---------------------------------------------------------------- augmentation


def test_augmentation_against_one_image_at_a_time(tmp_path: Path) -> None:
    task, splits, _ = built(tmp_path, crop_padding=2, flip=True, erasing=0.5)
    train = splits["train"]
    random = SampleRandom(3, len(train), torch.device("cpu"))
    random.start_epoch(4)
    samples = torch.tensor([5, 0, 11, 26, 3])
    ours = task.augment(train.gather(samples), random.of(samples))["image"]
    numbers = random.of(samples)
    draws, erasing = numbers.uniform(3).numpy(), numbers.uniform(5).numpy()
    fill = (np.array(task._mean) * 255).round().astype(np.uint8)
    for image, (row, column, coin), rectangle, result in zip(
        train.arrays["image"][samples].numpy(), draws, erasing, ours.numpy()
    ):
        expected = shifted_and_flipped(image, 2, int(row * 5), int(column * 5), coin < 0.5)
        np.testing.assert_array_equal(result, erased(expected, 0.5, rectangle, fill))
    assert (ours.numpy() != train.arrays["image"][samples].numpy()).any()
    for i in range(len(samples)):
        alone = task.augment(train.gather(samples[i : i + 1]), random.of(samples[i : i + 1]))["image"]
        assert torch.equal(alone[0], ours[i])


def test_every_move_and_both_sides_come_up(tmp_path: Path) -> None:
    task, _, _ = built(tmp_path, crop_padding=1, flip=True)
    image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1, 0] = 1
    count = 400
    random = SampleRandom(0, count, torch.device("cpu"))
    samples = torch.arange(count)
    results = task.augment({"image": image.expand(count, 1, 3, 3)}, random.of(samples))["image"]
    # Three rows; the left pixel goes to columns -1, 0 and 1, or mirrored to 3, 2 and 1.
    seen = {tuple(int(v) for v in r.flatten()) for r in results}
    assert len(seen) == 3 * 3 + 1


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(("spec", "channels"), [(RESNET, 1), (RESNET, 3), (VIT, 1), (VIT, 3)])
def test_what_is_saved_loads_with_the_auto_classes_alone(
    tmp_path: Path, spec: dict[str, Any], channels: int, capfd: pytest.CaptureFixture[str]
) -> None:
    import deepspeed  # noqa: F401  # it prints when transformers, in saving, is the first to import it
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    torch.manual_seed(1)
    task: Any = load_task(NAME, {"data": dataset(tmp_path, channels=channels), "model": spec, "image_size": [12, 8]})
    test = task.splits()["test"]
    model = task.model().eval()
    folder = tmp_path / "model"
    folder.mkdir()
    capfd.readouterr()
    task.save(model, folder)
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        ours = task.forward(model, test.arrays)

        processor = AutoImageProcessor.from_pretrained(folder)
        network = AutoModelForImageClassification.from_pretrained(folder)
        with np.load(tmp_path / "data.npz") as file:
            pictures = [Image.fromarray(pixels) for pixels in file["test_x"]]
        inputs = processor(pictures, return_tensors="pt")
        theirs = network(**inputs).logits
    assert inputs["pixel_values"].shape == (9, 3, 12, 8), "grey models are saved with three channels, as pipelines want"
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert network.config.id2label == {0: "0", 1: "1", 2: "2"}

    again: Any = load_task(NAME, {"data": "elsewhere", "model": spec})
    loaded = again.load(folder)
    np.savez(tmp_path / "new.npz", x=np.stack([np.array(p) for p in pictures]))
    rows = list(again.predict(loaded, tmp_path / "new.npz", 4))
    expected = torch.softmax(ours.double(), 1).max(1)
    assert [row["row"] for row in rows] == list(range(9))
    assert [row["label"] for row in rows] == [str(i) for i in expected.indices.tolist()]
    assert [row["score"] for row in rows] == pytest.approx(expected.values.tolist(), abs=2e-6)


def test_prediction_on_files_folders_and_tables(tmp_path: Path) -> None:
    import datasets

    task, _, model = built(tmp_path)
    folder = class_folders(tmp_path / "pets", ("new",), side=9)
    model.eval()
    rows = list(task.predict(model, folder, 4))
    assert [row["file"] for row in rows] == [str(folder / f"new/{c}/{k}.png") for c in ("cat", "dog") for k in range(3)]
    one = list(task.predict(model, str(folder / "new/dog/1.png"), 4))
    assert [row["file"] for row in one] == [rows[4]["file"]]
    assert one[0]["score"] == pytest.approx(rows[4]["score"], abs=2e-6)
    images = [{"bytes": Path(row["file"]).read_bytes(), "path": None} for row in rows]
    datasets.Dataset.from_dict({"image": images}).to_parquet(tmp_path / "new.parquet")
    table = list(task.predict(model, tmp_path / "new.parquet", 4))
    assert [(r["row"], r["label"], r["score"]) for r in table] == [
        (i, r["label"], r["score"]) for i, r in enumerate(rows)
    ]
    (folder / "new/cat/0.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"1 image cannot be read:\n.*cat/0\.png"):
        list(task.predict(model, folder, 4))
    (tmp_path / "new.xyz").write_text("?")
    with pytest.raises(UserError, match=r"--input: .*new\.xyz is a \.xyz file"):
        list(task.predict(model, tmp_path / "new.xyz", 4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in this folder"):
        list(task.predict(model, tmp_path / "empty", 4))


def folder_of_others(tmp_path: Path, channels: int) -> Path:
    """A model that transformers saved, without a processor."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model(**RESNET, num_channels=channels, num_labels=3)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pretrained_folder(tmp_path: Path, spec: dict[str, Any] = RESNET, **changes: Any) -> Path:
    """A small model that is saved with its processor."""
    task, _, model = built(tmp_path, model=spec, **changes)
    folder = tmp_path / "model"
    folder.mkdir()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # so that no seed gives the same weights
    task.save(model, folder)
    return folder


def test_a_pretrained_folder_gives_weights_size_and_normalisation(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path, image_size=10, mean=0.25, std=[0.5, 0.4, 0.3])
    task, splits, model = built(tmp_path, model=str(folder))
    assert splits["train"].arrays["image"].shape[1:] == (3, 10, 10)
    assert (task._mean, task._std) == ([0.25] * 3, [0.5, 0.4, 0.3])
    source = task.load(folder)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    scratch, _, other = built(tmp_path, model=str(folder), pretrained=False)
    assert scratch._mean != task._mean
    assert not torch.equal(other.classifier[1].weight, model.classifier[1].weight)
    with pytest.raises(UserError, match=r'channels" is 1, but .* takes 3'):
        built(tmp_path, model=str(folder), channels=1)

    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json cannot be used"):
        built(tmp_path, model=str(folder))
    (folder / "preprocessor_config.json").unlink()
    task, _, _ = built(tmp_path, model=str(folder))
    assert any("has no image processor" in note for note in task.notes)
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing"):
        task.load(folder)


def test_another_number_of_classes_needs_a_new_head(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path)
    (tmp_path / "five").mkdir()
    options = {"data": dataset(tmp_path / "five", classes=5), "model": str(folder)}
    task: Any = load_task(NAME, options)
    task.splits()
    with pytest.raises(UserError, match=r'(?s)trained for 3 classes, but the data has 5.*"new_head": true'):
        task.model()
    task = load_task(NAME, {**options, "new_head": True})
    task.splits()
    assert task.model().config.num_labels == 5
    assert any("they are initialised from the seed" in note for note in task.notes)


def test_processors_of_other_kinds(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path)

    def processor(**values: Any) -> None:
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_processor_type": "ViTImageProcessor", **values})
        )

    crop = {"do_center_crop": True, "crop_size": {"height": 12, "width": 9}, "size": {"shortest_edge": 14}}
    processor(**crop, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25], rescale_factor=2 / 255)
    task, splits, _ = built(tmp_path, model=str(folder))
    assert splits["train"].arrays["image"].shape[2:] == (12, 9)
    assert task._mean == pytest.approx([0.25] * 3)
    assert task._std == pytest.approx([0.125] * 3)
    processor(size={"shortest_edge": 14}, do_normalize=False)
    task, splits, _ = built(tmp_path, model=str(folder))
    assert splits["train"].arrays["image"].shape[2:] == (14, 14)
    assert (task._mean, task._std) == ([0.0] * 3, [1.0] * 3)


def test_a_model_that_does_not_take_the_images(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path, VIT)
    with pytest.raises(UserError, match=r"(?s)cannot compute images of 12x12 pixels.*8\*8.*Set image_size"):
        built(tmp_path, model=str(folder), image_size=12)


@pytest.mark.parametrize(
    ("channels", "mean", "note"),
    [
        (1, [0.5], None),
        (1, [0.5, 0.5, 0.5], None),
        (1, [0.5, 0.4, 0.6], "has 3 channels, its model takes 1: images are normalised by the training set's own mean"),
        (3, [0.5], None),
        (3, [0.5, 0.4, 0.6, 0.5], "has 4 channels, its model takes 3"),
    ],
)
def test_image_processors_of_grey_colours_and_transparency(
    tmp_path: Path, channels: int, mean: list[float], note: str | None
) -> None:
    folder = folder_of_others(tmp_path, channels)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": mean, "image_std": mean}))
    task, _, _ = built(tmp_path, model=str(folder))
    assert [text for text in task.notes if "the image processor of" in text] == [
        text for text in task.notes if note is not None and note in text
    ]
    assert len(task._mean) == channels
    assert (task._mean == (mean * channels)[:channels]) == (note is None)


@pytest.mark.parametrize("channels", [2, 4])
def test_a_model_of_other_images_than_grey_and_coloured_is_refused(tmp_path: Path, channels: int) -> None:
    for model in (RESNET | {"num_channels": channels}, str(folder_of_others(tmp_path, channels))):
        with pytest.raises(UserError, match=f"takes images of {channels} channels. Images here have 1 .grey. or 3"):
            built(tmp_path, model=model)


# ---------------------------------------------------------------- what must change

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": 3}, r"task_options.data\" is 3"),
    ({"model": {"hidden_sizes": [4]}}, "folder or hub name of a classifier of images"),
    ({"model": {"model_type": "restnet"}}, 'unknown model_type "restnet"'),
    ({"model": {**RESNET, "depth": [1]}}, 'unknown key "depth" for resnet. Did you mean "depths"'),
    ({"model": {**RESNET, "num_labels": 7}}, "is for 7 classes, but the data has 3"),
    ({"model": {**RESNET, "num_channels": 3}, "channels": 1}, 'channels" is 1, but .*num_channels" is 3'),
    ({"model": {**VIT, "image_size": 8}, "image_size": 12}, 'image_size" is 12x12, but .* is 8x8'),
    ({"model": "no/such-model-here"}, "is not a folder here"),
    ({"new_head": True}, 'new_head" has no effect'),
    ({"pretrained": False}, 'pretrained" has no effect'),
    ({"image_size": 0}, r"image_size\" is 0. It must be a side in pixels, or \[height, width\]"),
    ({"image_size": [8, 8, 3]}, "image_size"),
    ({"channels": 4}, 'channels" is 4. It must be one of 1, 3'),
    ({"mean": 0.5}, "go together"),
    ({"mean": [0.5, 0.5], "std": [1, 1]}, 'mean" is .* or one a channel'),
    ({"mean": 0.5, "std": 0}, 'std" is 0. It must be a number above 0'),
    ({"mean": [0.5] * 3, "std": [0.5] * 3, "channels": 1}, 'mean" has 3 numbers, but the images have 1 channel'),
    ({"crop_padding": -1}, 'crop_padding" is -1. It must be at least 0'),
    ({"flip": 1}, 'flip" must be true or false, not 1'),
    ({"erasing": 1.5}, 'erasing" is 1.5. It must be at most 1'),
    ({"validation_fraction": 1}, 'validation_fraction" is 1'),
    ({"split_seed": True}, 'split_seed" must be a whole number, not true'),
    ({"label_smoothing": 1}, 'label_smoothing" is 1'),
    ({"class_weights": [1, 2]}, "class_weights"),
    ({"label_column": ""}, "label_column\" is ''. It must be a name"),
    ({"label_column": "kind"}, 'label_column" has no effect on an .npz file'),
    ({"data": "nowhere.parquet"}, "nowhere.parquet does not exist"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(i) + next(iter(o)) for i, (o, _) in enumerate(WRONG)])
def test_one_message_for_what_must_change(
    tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        built(tmp_path, **options)


def test_weights_that_are_missing_or_pickled(tmp_path: Path) -> None:
    folder = pretrained_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r'(?s)has no weights.*"pretrained": false'):
        built(tmp_path, model=str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickled"):
        built(tmp_path, model=str(folder))


def test_a_png_of_a_parquet_file_with_one_class(tmp_path: Path) -> None:
    import datasets

    rows = {"image": [{"bytes": encoded(Image.fromarray(some_images(4, 4))), "path": None}] * 3, "label": ["a"] * 3}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="A classifier needs at least two classes"):
        built(tmp_path, data=str(tmp_path / "a.parquet"))


# ---------------------------------------------------------------- data as the user gave it


def test_a_run_says_what_it_read_and_holds_out_both_splits(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets", ("train",), side=12)
    for name in ("cat", "dog"):
        for k in range(7):
            Image.fromarray(some_images(12, 12, 3, seed=50 + k)).save(folder / "train" / name / f"more-{k}.png")
    (folder / "train" / "cat" / "Readme").write_text("no image")
    for _ in range(2):  # the second time from the cache
        task, splits, _ = built(tmp_path, data=str(folder / "train"), validation_fraction=0.2, test_fraction=0.2)
        assert task.data_lines == [
            "20 images of 12 x 12, RGB: train 12, validation 4 (held out of train), test 4 (held out of train)",
            "2 classes (train + validation + test): cat 6 + 2 + 2, dog 6 + 2 + 2",
            "first image: train/cat/0.png -> cat",
        ]
        assert task.notes[0] == "1 file left out (no image in a folder of a class): cat/Readme"
    assert {name: len(split) for name, split in splits.items()} == {"train": 12, "validation": 4, "test": 4}


def test_prediction_takes_the_images_that_training_takes(tmp_path: Path) -> None:
    task, _, model = built(tmp_path)
    (tmp_path / "new").mkdir()
    kinds = {"a.avif": "AVIF", "b.jfif": "JPEG", "c.pgm": "PPM", "d": "PNG", "e[1].png": "PNG", "e1.png": "PNG"}
    for name, kind in kinds.items():
        Image.fromarray(some_images(12, 12, 3)).save(tmp_path / "new" / name, kind)
    (tmp_path / "new" / "notes.doc").write_text("no image")
    rows = list(task.predict(model.eval(), tmp_path / "new", 4))
    assert [Path(row["file"]).name for row in rows] == sorted(kinds)
    assert "1 file left out (no image): notes.doc" in task.notes
    for name in kinds:
        assert [row["file"] for row in task.predict(model, tmp_path / "new" / name, 4)] == [
            str(tmp_path / "new" / name)
        ]
