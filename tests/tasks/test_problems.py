"""Several labels and numbers, of texts and of images: losses, metrics, predictions, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.tasks.test_image_classification import RESNET
from tests.tasks.test_text_classification import BERT, WORDS
from trainer.data.targets import NUMBER, SEVERAL
from trainer.errors import UserError
from trainer.tasks import classification
from trainer.tasks.protocol import load_task

pytestmark = pytest.mark.usefixtures("own_caches")
LABELS = ["red", "cold", "old"]


def texts(path: Path, count: int = 60) -> str:
    """Texts of some words, three of which are labels; and how many words a text has, times ten."""
    random = np.random.default_rng(0)
    lines = ["text,red,cold,old,tags,amount"]
    for i in range(count):
        words = random.choice(WORDS, 1 + i % 7, replace=False).tolist()
        flags = [int(label in words) for label in LABELS]
        tags = "|".join(label for label in LABELS if label in words)
        lines.append(f"{' '.join(words)} {i},{','.join(map(str, flags))},{tags},{10.0 * len(words)}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def images(folder: Path, count: int = 24) -> str:
    """Images in shades of grey with a metadata.csv: the brightness, and which of two labels they have."""
    folder.mkdir()
    lines = ["file_name,tags,amount"]
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 40, (8, 8), dtype=np.uint8) + np.uint8(200 * i // count)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{'|'.join(n for n, there in (('a', i % 2), ('b', i % 3 == 0)) if there)},{0.5 * i}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def made(name: str, path: Path, **options: Any) -> tuple[Any, Any, Any]:
    data = texts(path / "data.csv") if name.startswith("text") else images(path / "images")
    model = BERT if name.startswith("text") else RESNET
    task: Any = load_task(name, {"data": data, "model": model, **options})
    splits = task.splits()
    torch.manual_seed(0)
    return task, splits, task.model()


TAGS = {"problem_type": SEVERAL, "label_column": "tags", "label_separator": "|"}
AMOUNT = {"problem_type": NUMBER, "label_column": "amount"}


@pytest.mark.parametrize("name", ["text_classification", "image_classification"])
def test_several_labels(name: str, tmp_path: Path) -> None:
    task, splits, model = made(name, tmp_path, **TAGS)
    train = splits["train"]
    names = task._problem.names
    assert train.arrays["label"].shape == (len(train), len(names)) and train.counts is None
    assert bool(train.arrays["label"].any(0).all()), "train keeps a sample of every label"
    outputs = task.forward(model.eval(), train.arrays).detach()
    loss, count = task.loss(outputs, train.arrays)
    expected = F.binary_cross_entropy_with_logits(outputs.double(), train.arrays["label"].double())
    assert float(loss / count) == pytest.approx(float(expected), rel=1e-5)
    assert set(task.metrics(outputs, train.arrays)) == {"micro_f1", "macro_f1", "map"}
    assert model.config.problem_type == SEVERAL
    predicted = task._problem.predictions(torch.tensor([[1.0] + [-1.0] * (len(names) - 1)]))
    assert predicted[0]["labels"] == names[0] and predicted[0][f"score_{names[0]}"] == pytest.approx(0.731059)
    columns = task.predictions(outputs, train.arrays)
    assert list(columns) == ["target", "prediction", *(f"probability of {n}" for n in names)]


def test_columns_of_flags_give_the_same_as_one_text(tmp_path: Path) -> None:
    _, joined, _ = made("text_classification", tmp_path, **TAGS, validation_fraction=0)
    flags = {"problem_type": SEVERAL, "label_columns": LABELS, "validation_fraction": 0}
    _, apart, _ = made("text_classification", tmp_path, **flags)
    order = [sorted(LABELS).index(label) for label in LABELS]
    assert torch.equal(joined["train"].arrays["label"][:, order], apart["train"].arrays["label"])


def test_the_weight_of_a_presence(tmp_path: Path) -> None:
    task, splits, model = made("text_classification", tmp_path, **TAGS, class_weights="balanced")
    label = splits["train"].arrays["label"]
    outputs = task.forward(model.eval(), splits["train"].arrays).detach()
    weight = (1 - label.double()).sum(0) / label.double().sum(0)
    expected = F.binary_cross_entropy_with_logits(outputs.double(), label.double(), pos_weight=weight)
    assert float(task.loss(outputs, splits["train"].arrays)[0]) / len(label) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["text_classification", "image_classification"])
def test_numbers(name: str, tmp_path: Path) -> None:
    task, splits, model = made(name, tmp_path, **AMOUNT)
    label = splits["train"].arrays["label"]
    assert label.dtype == torch.float32 and float(label.mean()) == pytest.approx(0, abs=1e-6)
    assert float(label.std(correction=0)) == pytest.approx(1, rel=1e-5)
    outputs = task.forward(model.eval(), splits["train"].arrays).detach()
    loss, count = task.loss(outputs, splits["train"].arrays)
    assert float(loss / count) == pytest.approx(float(F.mse_loss(outputs, label)), rel=1e-5)
    target = task._problem.target
    found = task.metrics(outputs, splits["train"].arrays)
    assert found["mae"] == pytest.approx(float((outputs - label).abs().mean()) * target.deviation, rel=1e-5)
    assert task.metrics(label, splits["train"].arrays)["r2"] == 1.0
    folder = tmp_path / "model"
    folder.mkdir()
    task.save(model, folder)
    assert json.loads((folder / "config.json").read_text())["problem_type"] == NUMBER
    options = {"data": "gone.csv", "model": BERT if name.startswith("text") else RESNET, **AMOUNT}
    fresh: Any = load_task(name, options)
    loaded = fresh.load(folder)
    source = tmp_path / ("data.csv" if name.startswith("text") else "images")
    values = [row["value"] for row in fresh.predict(loaded, source, 7)]
    assert len(values) == (60 if name.startswith("text") else 24)
    from transformers import pipeline

    kind = "text-classification" if name.startswith("text") else "image-classification"
    first = "red 0" if name.startswith("text") else str(source / "0.png")
    shown = pipeline(kind, model=str(folder))(first)[0]
    assert shown["label"] == "amount"
    (tmp_path / "one.txt").write_text("red 0\n")
    own = next(
        iter(fresh.predict(loaded, tmp_path / "one.txt", 1) if name.startswith("text") else [{"value": values[0]}])
    )
    assert shown["score"] == pytest.approx(own["value"], rel=1e-3), "a pipeline gives units"


def test_metrics_of_several_labels_by_hand() -> None:
    logits = torch.tensor([[1.0, -1.0, -2.0], [2.0, 3.0, -1.0], [-1.0, 0.5, -3.0]])
    truth = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    found = classification.multi_label_metrics(logits, truth)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (4 + 4)), "3 right, 4 said, 4 there"
    assert found["macro_f1"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["map"] == pytest.approx(((1 / 2 * 0.5 + 2 / 3 * 0.5) + 1) / 2), "over the classes that occur"
    assert "map" not in classification.multi_label_metrics(logits, truth * 0)


def test_arrays_of_several_labels_and_of_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    y = np.stack([np.arange(20) % 2, np.arange(20) % 3 == 0], 1).astype(np.int64)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x, y=np.arange(20) / 4)
    several: Any = load_task(
        "image_classification", {"data": str(tmp_path / "a.npz"), "model": RESNET, "problem_type": SEVERAL}
    )
    assert several.splits()["train"].arrays["label"].shape[1:] == (2,) and several._problem.names == ["0", "1"]
    with pytest.raises(UserError, match=r"y has the shape \(20,\).* must be \(20, labels\) of 0 and 1"):
        load_task(
            "image_classification", {"data": str(tmp_path / "b.npz"), "model": RESNET, "problem_type": SEVERAL}
        ).splits()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (AMOUNT | {"label_smoothing": 0.1}, "label_smoothing"),
        (AMOUNT | {"class_weights": "balanced"}, "class_weights.* has no effect where numbers are predicted"),
        (TAGS | {"label_smoothing": 0.1}, "label_smoothing"),
        (AMOUNT | {"label_column": "tags"}, "must hold numbers, but row"),
        (TAGS | {"label_separator": None}, "label_separator"),
        (AMOUNT | {"model": {**BERT, "num_labels": 3}}, "num_labels. is 3, but the data has one number to predict"),
    ],
)
def test_options_and_data_that_do_not_agree(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        made("text_classification", tmp_path, **options)
