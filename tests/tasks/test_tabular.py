"""The task tabular: which problem it finds, what the training split decides, what it refuses, saves and predicts."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.errors import UserError
from trainer.tasks.tabular import Tabular

pytestmark = pytest.mark.usefixtures("own_caches", "one_thread")
SMALL = {"width": 8, "embedding_size": 3}


def rows(count: int = 80) -> list[dict[str, Any]]:
    """A number with gaps, a whole number, a category with gaps; a class and a number that follow from them."""
    random = np.random.default_rng(0)
    made = []
    for i in range(count):
        age, rooms, city = (
            round(float(random.normal(40, 10)), 1),
            int(random.integers(1, 6)),
            ["Oslo", "Rome", "Lima"][i % 3],
        )
        row = {"age": age if i % 8 else "", "rooms": rooms, "city": city if i % 10 else ""}
        made.append(row | {"label": "old" if age > 40 else "new", "price": round(1000 + 3 * age + rooms, 2)})
    return made


def write(path: Path, content: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(content[0]))
        writer.writeheader()
        writer.writerows(content)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "data.csv", rows())


CLASSES: dict[str, Any] = {"ignored_columns": ["price"], **SMALL}
PRICES: dict[str, Any] = {"label_column": "price", "ignored_columns": ["label"], **SMALL}


def made(**options: Any) -> tuple[Tabular, Any, Any]:
    task = Tabular(**options)
    splits = task.splits()
    torch.manual_seed(0)
    return task, splits, task.model().eval()


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_classes(data: str, model: str) -> None:
    task, splits, network = made(data=data, model=model, test_fraction=0.2, **CLASSES)
    assert {name: len(split) for name, split in splits.items()} == {"train": 56, "validation": 8, "test": 16}
    of_class = [sum(row["label"] == name for row in rows()) for name in ("new", "old")]
    assert splits["test"].arrays["label"].bincount().tolist() == [round(0.2 * n) for n in of_class], "of each alike"
    train = splits["train"].arrays
    assert {n: (a.dtype, a.shape[1:]) for n, a in train.items()} == {
        "numbers": (torch.float32, (3,)), "categories": (torch.int64, (1,)), "label": (torch.int64, ())}  # fmt: skip
    # Age and rooms are standardised by train alone; then comes the mark of missing ages.
    torch.testing.assert_close(
        train["numbers"][:, 1].double().mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert float(train["numbers"][:, 1].std(correction=0)) == pytest.approx(1, rel=1e-5)
    assert (train["numbers"][train["numbers"][:, 2] == 1, 0] == 0).all() and set(train["numbers"][:, 2].tolist()) == {
        0,
        1,
    }
    assert set(train["categories"].flatten().tolist()) == {0, 1, 2, 3}
    outputs = task.forward(network, train)
    assert outputs.shape == (56, 2)
    assert {"accuracy", "macro_f1", "auroc"} == set(task.metrics(outputs.detach(), train))
    assert (task.best_metric, task.pipeline_tag) == (("accuracy", "max"), "tabular-classification")
    loss, count = task.loss(outputs, train)
    assert count == 56
    torch.testing.assert_close(task.sample_losses(outputs, train).sum(), loss)


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_numbers_are_predicted_and_measured_in_their_own_units(data: str, model: str) -> None:
    task, splits, network = made(data=data, model=model, **PRICES)
    train = splits["train"].arrays
    outputs = task.forward(network, train)
    assert outputs.shape == train["label"].shape == (72,) and train["label"].dtype == torch.float32
    torch.testing.assert_close(task.loss(outputs, train)[0], ((outputs - train["label"]) ** 2).sum())
    assert task.best_metric == ("rmse", "min")
    # The mean of train as the prediction: its error is the deviation of the prices.
    prices = np.array([row["price"] for row in rows()])
    metrics = task.metrics(torch.zeros(72), train)
    assert metrics["r2"] == pytest.approx(0, abs=1e-6)
    assert 0.8 * prices.std() < metrics["rmse"] < 1.2 * prices.std()


@pytest.mark.parametrize(
    ("values", "problem", "words"),
    [
        (["a", "b"] * 20, "classification", "not all numbers"),
        ([0, 1, 2, 3] * 10, "classification", "holds 4 different whole numbers"),
        (list(range(40)), "regression", "holds 40 different whole numbers"),
        ([0.5, 1] * 20, "regression", "holds fractions, such as 0.5"),
        (["True", "False"] * 20, "classification", "not all numbers"),
    ],
)
def test_the_problem_is_told_by_the_target(tmp_path: Path, values: list[Any], problem: str, words: str) -> None:
    file = write(tmp_path / "a.csv", [{"x": i % 7 + 0.5, "target": v} for i, v in enumerate(values)])
    task, _, _ = made(data=file)
    assert task.pipeline_tag == f"tabular-{problem}"
    assert f"this is {problem}, because" in task.notes[0] and words in task.notes[0]
    if isinstance(values[0], int):
        other = {"classification": "regression", "regression": "classification"}[problem]
        task, _, _ = made(data=file, problem=other)
        assert task.pipeline_tag == f"tabular-{other}" and not any("this is" in note for note in task.notes)


def test_a_run_says_what_it_read(data: str) -> None:
    task, _, _ = made(data=data, test_fraction=0.1, **PRICES)
    lines = "\n".join(task.data_lines)
    assert "80 rows: train 64, validation 8 (held out of train), test 8 (held out of train)" in lines
    assert 'target from "price": in train mean 11' in lines
    assert "2 columns of numbers: age (missing marked), rooms" in lines
    assert "1 column of categories: city (3)" in lines and "not read: label" in lines
    assert "first sample: 'age " in lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_column": "prize"}, 'no column "prize"'),
        ({"label_column": "age"}, '10 values of the column "age" in train are missing'),
        ({"missing_values": ["old"]}, 'values of the column "label" in train are missing'),
        ({"problem": "regression", "class_weights": "balanced"}, '"trainer.task_options.class_weights" is'),
        (
            {"problem": "regression"},
            '79 more rows hold no number.\nCorrect it. If the column holds classes, set "problem" in '
            'trainer.task_options to "classification".',
        ),
        ({"label_column": "price", "ignored_columns": [], "problem": "classification"}, "holds fractions, such as 11"),
        ({"missing_values": [" "]}, "a blank field is missing anyway"),
        ({"numeric_columns": ["city"]}, 'column "city" in train must hold numbers, but row 2'),
        ({"numeric_columns": ["label"]}, "which is the column to predict"),
        ({"ignored_columns": ["age", "rooms", "city", "price"]}, "there is no column to learn from"),
        ({"model": "transformer"}, '"mlp", "resnet"'),
    ],
)
def test_what_cannot_be_is_refused(data: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        made(data=data, **(CLASSES | options))
    assert words in str(caught.value)


def test_a_target_that_is_neither_is_refused(tmp_path: Path) -> None:
    broken = [{"x": i % 7 + 0.5, "target": "?" if i == 5 else i / 2} for i in range(40)]
    with pytest.raises(UserError, match=r"holds 40 different values in 40 rows, such as '\?'"):
        made(data=write(tmp_path / "a.csv", broken))
    with pytest.raises(UserError, match=r'All values of "target".* are 3 in train'):
        made(data=write(tmp_path / "b.csv", [r | {"target": 3} for r in broken]), problem="regression")


def test_groups_stay_together_and_are_no_feature(tmp_path: Path) -> None:
    content = [row | {"patient": f"p{i // 4}"} for i, row in enumerate(rows())]
    task, splits, _ = made(data=write(tmp_path / "a.csv", content), group_column="patient", **CLASSES)
    assert len(splits["validation"]) % 4 == 0
    assert not any("patient" in line for line in task.data_lines if "columns of" in line)


def test_a_test_file_without_labels_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", rows())
    write(tmp_path / "test.csv", [{n: v for n, v in row.items() if n != "label"} for row in rows(10)])
    task, splits, _ = made(data=str(tmp_path), **CLASSES)
    assert "test" not in splits
    assert '10 rows of test left out: there is no column "label"' in task.notes


def test_rows_of_validation_that_are_in_train_are_counted(tmp_path: Path) -> None:
    task, _, _ = made(
        data={"train": write(tmp_path / "a.csv", rows()), "test": write(tmp_path / "b.csv", rows(5))}, **CLASSES
    )
    assert any(note.startswith("5 of the 5 rows of test are also in train") for note in task.notes)


def test_weights_of_classes_are_counted(data: str) -> None:
    task, splits, network = made(data=data, class_weights={"old": 3}, label_smoothing=0.1, **CLASSES)
    train = splits["train"]
    _, count = task.loss(task.forward(network, train.arrays), train.arrays)
    assert float(count) == float(train.counts.sum()) == 72 + 2 * int((train.arrays["label"] == 1).sum())


@pytest.mark.parametrize("options", [CLASSES, PRICES | {"model": "mlp"}], ids=["classes", "prices"])
def test_what_is_saved_predicts(tmp_path: Path, data: str, options: dict[str, Any]) -> None:
    """By a new task, on a file with its columns in another order, others beside them, and values never seen."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    task, _, network = made(data=data, **options)
    (tmp_path / "model").mkdir()
    task.save(network, tmp_path / "model")
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"model.safetensors", "columns.json"}
    new = [
        {"more": "x", "city": "Oslo", "rooms": 2, "age": 33.5},
        {"more": "y", "city": "Paris", "rooms": "", "age": ""},
    ]
    write(tmp_path / "new.csv", new)
    columns = {"rooms": pa.array([2, None]), "age": pa.array([33.5, None]), "city": pa.array(["Oslo", None])}
    pq.write_table(pa.table(columns), tmp_path / "new.parquet")

    again = Tabular(data="gone", **options)
    loaded = again.load(tmp_path / "model").eval()
    found = list(again.predict(loaded, tmp_path / "new.csv", 1))
    # A forward of another size may round in another way.
    number = "value" if "label_column" in options else "score"
    for row, other in zip(found, again.predict(loaded, tmp_path / "new.parquet", 100), strict=True):
        assert row == other | {number: pytest.approx(other[number], abs=2e-6 if number == "score" else 1e-3)}
    assert any("Paris" in note and "does not occur in train" in note for note in again.notes)
    assert any('"rooms" is missing' in note and "none in train" in note for note in again.notes)

    p = task._preparation
    assert p is not None
    age, rooms = p.numeric
    z = [(33.5 - age.mean) / age.deviation, (2 - rooms.mean) / rooms.deviation, 0.0]
    place = p.categorical[0].categories.index("Oslo") + 1
    batch = {"numbers": torch.tensor([z, [0.0, 0.0, 1.0]]), "categories": torch.tensor([[place], [0]])}
    outputs = task.forward(network, batch).detach()
    if p.target is None:
        assert [row["label"] for row in found] == [p.classes[i] for i in outputs.argmax(1)]
        assert found[0]["score"] == pytest.approx(float(outputs[0].softmax(0).max()), abs=1e-6)
    else:
        expected = (outputs.double() * p.target.deviation + p.target.mean).tolist()
        assert [row["value"] for row in found] == pytest.approx(expected, rel=1e-6)

    write(tmp_path / "less.csv", [{"rooms": 2, "label": "old"}])
    with pytest.raises(UserError, match=r'less\.csv lacks the columns "age", "city"'):
        list(again.predict(loaded, tmp_path / "less.csv", 1))
    write(tmp_path / "odd.csv", [{"rooms": "two", "age": 1, "city": ""}])
    with pytest.raises(UserError, match=r'column "rooms" in --input .*odd\.csv must hold numbers, but row 1'):
        list(again.predict(loaded, tmp_path / "odd.csv", 1))
    (tmp_path / "model" / "columns.json").write_text(json.dumps({"label": "x"}))
    with pytest.raises(UserError, match=r"columns\.json is damaged"):
        again.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "model", "metric", "least"),
    [("wine", "resnet", "accuracy", 0.9), ("diabetes", "mlp", "r2", 0.35)],
)
def test_tables_of_scikit_learn_are_learnt(tmp_path: Path, name: str, model: str, metric: str, least: float) -> None:
    from sklearn import datasets

    table: Any = getattr(datasets, f"load_{name}")()
    lines = [",".join(map(str, [*row, target])) for row, target in zip(table.data.tolist(), table.target.tolist())]
    (tmp_path / "a.csv").write_text("\n".join([",".join([*table.feature_names, "target"]), *lines]) + "\n")
    task, splits, network = made(data=str(tmp_path / "a.csv"), model=model, width=32, test_fraction=0.3)
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=0.005, weight_decay=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        loss, count = task.loss(task.forward(network, splits["train"].arrays), splits["train"].arrays)
        (loss / count).backward()
        optimizer.step()
    with torch.no_grad():
        outputs = task.forward(network.eval(), splits["test"].arrays)
    assert task.metrics(outputs, splits["test"].arrays)[metric] >= least
