"""Tasks in one fold: nothing of a sample that is tested, or held out, changes how the others are prepared."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config.keys import FoldOptions
from trainer.data.cut import Cut
from trainer.errors import UserError
from trainer.exact.splits import Split
from trainer.tasks.causal_lm import CausalLM
from trainer.tasks.digits import Digits, read_images
from trainer.tasks.folds import columns_of, splits_in_fold
from trainer.tasks.image_classification import ImageClassification
from trainer.tasks.tabular import Tabular
from trainer.tasks.text_classification import TextClassification

pytestmark = pytest.mark.usefixtures("own_caches", "one_thread")
BERT = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
RESNET = {"model_type": "resnet", "hidden_sizes": [4], "depths": [1], "layer_type": "basic", "embedding_size": 4}


def cut(number: int = 0, **options: Any) -> Cut:
    return Cut(FoldOptions(**({"folds": 4, "number": number, "validation_fraction": 0.2} | options)))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def not_train(made: Cut) -> list[int]:
    return [*made.rows["test"].tolist(), *made.rows["validation"].tolist()]


def test_a_table_is_standardised_by_the_rows_that_train_in_this_fold(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [
        {"x": float(random.normal()), "city": ["a", "b"][i % 2], "label": ["no", "yes"][i % 3 == 0]} for i in range(48)
    ]
    first = cut()
    before = splits_in_fold(Tabular(data=write(tmp_path / "a.csv", rows)), first)
    assert before["train"].arrays["numbers"].mean() == pytest.approx(0, abs=1e-6)
    for row in not_train(first):
        rows[row] |= {"x": 1e6, "city": "elsewhere"}
    task, second = Tabular(data=write(tmp_path / "b.csv", rows)), cut()
    after = splits_in_fold(task, second)
    assert (first.rows["train"] == second.rows["train"]).all()
    for name, array in before["train"].arrays.items():
        assert torch.equal(array, after["train"].arrays[name]), name
    assert (after["test"].arrays["categories"] == 0).all()  # unknown to what trains
    assert any("do not occur in train, such as 'elsewhere'" in note for note in task.notes)
    # Another fold of the same file is prepared anew, and not taken from a cache.
    other = splits_in_fold(Tabular(data=str(tmp_path / "b.csv")), cut(1))
    assert not torch.equal(other["train"].arrays["numbers"], after["train"].arrays["numbers"])


def test_a_tokenizer_is_made_of_the_texts_that_train_in_this_fold(tmp_path: Path) -> None:
    rows = [{"text": f"common words of every text {'ab'[i % 2]}", "label": "ab"[i % 2]} for i in range(40)]
    options = {"model": BERT, "tokenizer": "words"}
    first = cut()
    before = splits_in_fold(TextClassification(data=write(tmp_path / "a.csv", rows), **options), first)
    for row in not_train(first)[::8]:
        rows[row]["text"] += " secret secret"
    task = TextClassification(data=write(tmp_path / "b.csv", rows), **options)
    after = splits_in_fold(task, cut())
    assert torch.equal(before["train"].arrays["input_ids"], after["train"].arrays["input_ids"])
    assert "secret" not in json.loads(task._facts["tokenizer"])["model"]["vocab"]


def test_images_are_normalised_by_those_that_train_in_this_fold(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(0, 50, (40, 8, 8), dtype=np.uint8), np.arange(40) % 2
    means = []
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", train_x=x[:30], train_y=y[:30], test_x=x[30:], test_y=y[30:])
        task, made = ImageClassification(data=str(tmp_path / f"{name}.npz"), model=RESNET), cut()
        splits = splits_in_fold(task, made)
        means.append((task._mean, task._std))
        assert sum(len(split) for split in splits.values()) == 40
        x[not_train(made)] = 255
    assert means[0] == means[1]


def test_digits_are_in_the_order_of_their_file() -> None:
    made = cut(2)
    splits = splits_in_fold(Digits(model="mlp"), made)
    images, labels = read_images()
    assert (splits["test"].arrays["label"].numpy() == labels[made.rows["test"]]).all()
    assert np.allclose(splits["test"].arrays["image"].reshape(-1, 64) * 16, images[made.rows["test"]])


def test_a_task_of_ours_that_cannot_be_cut_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    task = CausalLM(data=str(tmp_path / "a.txt"), model={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1})
    with pytest.raises(UserError, match="The task causal_lm cannot be cut into folds"):
        splits_in_fold(task, cut())


class Own:
    """All samples, in two splits."""

    def splits(self) -> dict[str, Any]:
        x = torch.arange(40.0).reshape(40, 1)
        parts = {"train": slice(0, 30), "test": slice(30, 40)}
        arrays = {"x": x, "y": torch.arange(40) % 2, "person": torch.arange(40) // 4}
        return {name: Split({n: a[part] for n, a in arrays.items()}) for name, part in parts.items()}


def test_the_samples_of_a_task_of_ones_own_are_put_together() -> None:
    task: Any = Own()
    made = cut(group_column="person", validation_fraction=0.0)
    splits = splits_in_fold(task, made)
    assert splits["test"].arrays["x"].flatten().tolist() == made.rows["test"].tolist()
    persons = [set(split.arrays["person"].tolist()) for split in splits.values()]
    assert not persons[0] & persons[1]
    assert made.labels is not None  # y holds classes
    with pytest.raises(UserError, match=r'gives no array "persn"\. Did you mean "person"'):
        splits_in_fold(task, cut(group_column="persn"))
    assert len(splits_in_fold(task, cut(pool=["train"]))["test"]) <= 8


def test_outputs_become_a_prediction_only_where_accuracy_agrees() -> None:
    task: Any = Own()
    outputs, arrays = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), {"y": torch.tensor([0, 0])}
    certain = columns_of(task, outputs, arrays, {"accuracy": 0.5})
    assert (certain["prediction"], certain["output_1"]) == ([0, 1], [0.0, 1.0])
    assert "prediction" not in columns_of(task, outputs, arrays, {"accuracy": 1.0})


def test_the_probabilities_of_digits() -> None:
    outputs = torch.zeros(1, 10)
    outputs[0, 7] = 5.0
    columns = columns_of(Digits(), outputs, {"label": torch.tensor([3])}, {})  # type: ignore[arg-type]
    assert (columns["target"], columns["prediction"]) == (["3"], ["7"])
    assert sum(columns[f"probability of {d}"][0] for d in range(10)) == pytest.approx(1)
