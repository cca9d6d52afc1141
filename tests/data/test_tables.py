"""Datasets of a user's own: what can be read, how splits and columns are found, and everything that can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import sources, tables
from trainer.data.held_out import hold_out
from trainer.data.table_files import Table, from_datasets
from trainer.errors import UserError

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    import pandas as pd

    table = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    else:
        table.to_json(path, orient="records", lines=True)
    return str(path)


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_files_of_every_kind(tmp_path: Path, kind: str) -> None:
    found = tables.read(write(tmp_path / f"data{kind}", ROWS))
    assert list(found) == ["train"]
    assert found["train"].values("text") == [row["text"] for row in ROWS]
    assert found["train"].values("label") == [row["label"] for row in ROWS]


def test_a_file_beside_a_hub_name_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Table({"text": ["c"], "label": ["a"]}, content="today's")
    monkeypatch.setattr(tables, "_hub", lambda source, config_name: {"test": hub})
    data = {"train": str(tmp_path / "a.csv"), "test": "owner/name"}
    keys = []
    for word in ("panda", "tiger"):
        (tmp_path / "a.csv").write_text(f"text,label\n{word},a\n")
        content, found = tables.content_of(data, lambda: tables.read(data))
        assert found is not None and found["train"].values("text") == [word]
        assert "today's" in json.dumps(content)
        keys.append(json.dumps(content))
    assert len(set(keys)) == 2


def test_splits_from_files_folders_and_columns(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.csv", ROWS), write(tmp_path / "b.jsonl", ROWS[:2])
    assert {n: len(t) for n, t in tables.read({"test": test, "train": train}).items()} == {"train": 6, "test": 2}
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, rows in {"train": ROWS, "valid": ROWS[:3], "test": ROWS[:1]}.items():
        write(folder / f"{name}.csv", rows)
    assert {n: len(t) for n, t in tables.read(str(folder)).items()} == {"train": 6, "validation": 3, "test": 1}
    cut = [row | {"split": name} for row, name in zip(ROWS, ("train", "Dev", "TEST") * 2)]
    assert {n: len(t) for n, t in tables.read(write(tmp_path / "c.csv", cut)).items()} == {
        "train": 2, "validation": 2, "test": 2,
    }  # fmt: skip
    named = [{("part" if n == "split" else n): v for n, v in row.items()} for row in cut]
    named_file = write(tmp_path / "d.csv", named)
    assert list(tables.read(named_file)) == ["train"]
    assert list(tables.read(named_file, split_column="part")) == ["train", "validation", "test"]
    twice = write(
        tmp_path / "f.csv", [row | {"split": name} for row, name in zip(ROWS, ("train", "Train", "test") * 2)]
    )
    with pytest.raises(
        UserError, match=r"two splits that mean the same: train is given twice, once as Train \(2 rows\)"
    ):
        tables.read(twice)
    other = write(tmp_path / "e.csv", [row | {"split": "north"} for row in ROWS])
    assert len(tables.read(other)["train"]) == 6, "a column of that name need not hold splits"


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(tmp_path / "two"))
    table.save_to_disk(str(tmp_path / "one"))
    assert list(tables.read(str(tmp_path / "two"))) == ["train", "test"]
    assert list(tables.read(str(tmp_path / "one"))) == ["train"]


def test_data_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("nowhere.csv", "./nowhere", "/nowhere/at/all"):
        with pytest.raises(UserError, match="does not exist"):
            sources.fingerprint(missing)
    assert sources.fingerprint("imdb") is None
    assert sources.fingerprint("stanfordnlp/imdb") is None
    (tmp_path / "a.xyz").write_text("?")
    with pytest.raises(UserError, match=r"is a .xyz file. Files may be .csv, .tsv"):
        tables.read(str(tmp_path / "a.xyz"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"bad.jsonl cannot be read"):
        tables.read(str(tmp_path / "bad.jsonl"))
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"the split train of .*empty.csv is empty|empty.csv cannot be read"):
        tables.read(str(tmp_path / "empty.csv"))
    good = write(tmp_path / "good.csv", ROWS)
    with pytest.raises(UserError, match=r'names the split "tset". Did you mean "test"'):
        tables.read({"train": good, "tset": good})
    with pytest.raises(UserError, match=r'names the split "val". Did you mean "validation"'):
        tables.read({"train": good, "val": good})
    with pytest.raises(UserError, match="has no split for training, only test"):
        tables.read({"test": good})
    with pytest.raises(UserError, match=r'no column "fold"'):
        tables.read(good, split_column="fold")
    with pytest.raises(UserError, match=r'"trainer.task_options.split_column" has no effect'):
        tables.read({"train": good, "test": good}, split_column="label")

    import datasets

    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'imdb' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(UserError, match=r'(?s)"imdb" is no file or folder here.*Without a network, give a local file'):
        tables.read("imdb")


def test_the_option_data(tmp_path: Path) -> None:
    for wrong in (None, 3, "", {}, {"train": 3}):
        with pytest.raises(UserError, match="must be a file, a folder or a name"):
            sources.check_data(wrong)
    with pytest.raises(UserError, match=r"config_name.*only on datasets of the hub"):
        sources.check_data(str(tmp_path), "en")


def test_the_fingerprint_follows_content_alone(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", ROWS), write(tmp_path / "b.csv", ROWS)
    before = sources.fingerprint(a)
    assert before == sources.fingerprint(b), "a file's name says nothing"
    write(tmp_path / "a.csv", [*ROWS, ROWS[0]])
    assert sources.fingerprint(a) != before
    assert sources.fingerprint({"train": a, "test": b}) != sources.fingerprint({"train": b, "test": a})


def test_columns() -> None:
    assert tables.find_column(["id", "Text"], None, ("text",), "text_column") == "Text"
    assert tables.find_column(["id", "q"], "q", ("text",), "text_column") == "q"
    with pytest.raises(
        UserError, match=r'"trainer.task_options.text_column": the data has no column "x". It has: a, b.'
    ):
        tables.find_column(["a", "b"], "x", (), "text_column")
    with pytest.raises(UserError, match=r"is needed: which of the columns is it. The data has: a, b"):
        tables.find_column(["a", "b"], None, ("text",), "text_column")


def test_missing_values_and_wrong_kinds() -> None:
    tables.check_complete(["a", 0, False], "train", "c")
    with pytest.raises(
        UserError, match=r'2 values of the column "c" in test are missing \(rows 2, 4; row 1 is the first sample\)'
    ):
        tables.check_complete(["a", None, "b", "  "], "test", "c")
    with pytest.raises(UserError, match=r"1 value .* is missing \(row 1"):
        tables.check_complete([float("nan")], "test", "c")
    with pytest.raises(UserError, match=r'The column "c" in train must hold texts, but row 2 .* is .3.5. \(float\)'):
        tables.as_texts(["a", 3.5], "train", "c")


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (1.5, "To predict numbers .* set .problem_type.: .regression."),
        ([0, 1], "For several labels a sample, set .problem_type.: .multi_label_classification."),
        ({"a": 1}, "several labels a sample"),
        (b"x", "Labels are whole numbers or texts"),
    ],
)
def test_other_labels_say_which_task_they_need(label: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tables.class_names({"train": [label, label]})


def test_class_names() -> None:
    assert tables.class_names({"train": ["b", "a", "b"]}) == ["a", "b"]
    assert tables.class_names({"train": [10, 9, 10]}) == ["9", "10"], "numbers by value"
    assert tables.class_names({"train": [True, False]}) == ["False", "True"]
    assert tables.label_numbers([10, 9], ["9", "10"]).tolist() == [1, 0]
    for labels, words in (
        ({"train": ["a", "b"], "test": ["c", "c", "a"]}, "The label 'c' occurs 2 times in test, but never in train"),
        ({"train": ["a", "a"]}, "All labels in train are 'a'. A classifier needs at least two classes"),
        ({"train": [1.5, 2.5]}, 'A label in train is 1.5. .* "problem_type": "regression"'),
        ({"train": ["a", 1]}, "Some labels in train are numbers, such as 1, and some are texts, such as 'a'"),
    ):
        with pytest.raises(UserError, match=words):
            tables.class_names(labels)  # type: ignore[arg-type]


def test_true_is_true_in_every_file() -> None:
    """Python's csv has True, json and others have true; a split may have both, and numbers in quotes."""
    assert tables.class_names({"train": ["true", "false"], "test": [True, False, "TRUE"]}) == ["false", "true"]
    mixed = [True, False, "true", "False"]
    names = tables.class_names({"train": mixed})
    assert tables.label_numbers(mixed, names).tolist() == [1, 0, 1, 0]
    assert tables.label_numbers([1, "1", 0], tables.class_names({"train": [1, "1", 0]})).tolist() == [1, 1, 0]


def test_labels_that_are_equal_by_name_or_value_match_across_files() -> None:
    """A csv file knows only texts, json and parquet have numbers and true; pandas writes 1.0 for 1 beside a gap."""
    for train, test, names in (
        (["1", "0", "10"], [10, 1, 0], ["0", "1", "10"]),
        ([1, 0], ["1.0", "0.0"], ["0", "1"]),
        (["1.0", "0.0"], [1, 0.0], ["0.0", "1.0"]),
        ([1, 1.0, 0], [1], ["0", "1"]),
        (["True", "False"], [True, False], ["False", "True"]),
        (["007", "012"], ["012"], ["007", "012"]),
        (["None", "NA", "null"], ["NA"], ["NA", "None", "null"]),
    ):
        found = tables.class_names({"train": train, "test": test})  # type: ignore[dict-item]
        assert found == names
        numbers = tables.label_numbers(test, found).tolist()  # type: ignore[arg-type]
        assert [tables.label_name(v).removesuffix(".0") for v in test] == [names[i].removesuffix(".0") for i in numbers]  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="The label '7' occurs 1 time in test, but never in train"):
        tables.class_names({"train": ["007", "012"], "test": ["7"]})
    with pytest.raises(UserError, match=r"A label in train is 0\.5\."):
        tables.class_names({"train": ["0.5", "1.0"]})


@pytest.mark.parametrize("kind", [int, str, np.uint64])
def test_large_numbers_are_classes_of_their_own(kind: Any) -> None:
    """As floats they would be the same: numbers of users or of posts."""
    labels = [kind(9007199254740992 + i) for i in range(3)]
    names = tables.class_names({"train": labels})
    assert names == ["9007199254740992", "9007199254740993", "9007199254740994"]
    assert tables.class_names({"train": ["1" + "0" * 400, "7"]}) == ["7", "1" + "0" * 400]


def test_declared_classes() -> None:
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["neg", "pos"]), "text": datasets.Value("string")})
    table = from_datasets(datasets.Dataset.from_dict({"label": [1, 0], "text": ["a", "b"]}, features=features))
    assert tables.declared_names(table, "label") == ["neg", "pos"]
    assert tables.declared_names(table, "text") is None
    assert tables.labels(table, "label", "train") == ["pos", "neg"]
    hidden = Table({"label": [-1, -1], "text": ["a", "b"]}, {"label": ["neg", "pos"]})
    with pytest.raises(
        UserError, match=r"2 labels in test are -1, which is none of the 2 classes .*Leave that split out"
    ):
        tables.labels(hidden, "label", "test")


def test_hold_out_is_stratified_and_keyed() -> None:
    labels = np.array([0] * 80 + [1] * 17 + [2] * 2 + [3])
    out = hold_out(100, 0.1, 0, labels)
    assert np.bincount(labels[out], minlength=4).tolist() == [8, 2, 1, 0], "a class of one sample is trained on"
    np.testing.assert_array_equal(out, hold_out(100, 0.1, 0, labels))
    assert not np.array_equal(out, hold_out(100, 0.1, 1, labels))
    assert (np.diff(out) > 0).all()
    assert len(hold_out(50, 0.2, 0)) == 10


def test_duplicates_are_counted() -> None:
    notes = tables.duplicates_note({"train": ["a", "b", "a"], "test": ["a", "c", "b", "b"]})
    assert notes == ["3 of the 4 samples of test are also in train, so its metrics are too good"]
    assert tables.duplicates_note({"train": ["a", "a"], "test": ["c"]}) == []


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("x\r\ny é\n".encode())
    assert tables.text_files(str(tmp_path / "a.txt")) == {"train": ["x\r\ny é\n"]}, "as it is"
    (tmp_path / "b.txt").write_text("second")
    assert tables.text_files(str(tmp_path)) == {"train": ["x\r\ny é\n", "second"]}
    both = {"train": str(tmp_path / "a.txt"), "test": str(tmp_path / "b.txt")}
    assert tables.text_files(both) == {"train": ["x\r\ny é\n"], "test": ["second"]}
    named = tmp_path / "named"
    named.mkdir()
    for name in ("train", "val", "test"):
        (named / f"{name}.txt").write_text(name)
    assert tables.text_files(str(named)) == {"train": ["train"], "validation": ["val"], "test": ["test"]}
    (named / "notes.txt").write_text("?")
    notes: list[str] = []
    assert set(tables.text_files(str(named), notes=notes) or {}) == {"train", "validation", "test"}
    assert notes == ["1 file left out (no .txt file that is called like a split): notes.txt"]
    assert tables.text_files("imdb") is None
    assert tables.text_files(write(tmp_path / "c.csv", ROWS)) is None
    (tmp_path / "table").mkdir()
    write(tmp_path / "table" / "c.csv", ROWS)
    (tmp_path / "table" / "notes.txt").write_text("?")
    assert tables.text_files(str(tmp_path / "table")) is None, "a folder with tables is read as such"
    (tmp_path / "d.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"d.txt is not UTF-8 text: byte 2 is 0xff"):
        tables.text_files(str(tmp_path / "d.txt"))
    (tmp_path / "e.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"e.txt is empty"):
        tables.text_files(str(tmp_path / "e.txt"))


def test_one_text_in_two_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the same")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"the same"))
    with pytest.raises(UserError, match=r"a\.txt and b\.txt\.gz hold the same text, which would count twice"):
        tables.text_files(str(tmp_path))


def test_texts_and_tables_in_one_folder(tmp_path: Path) -> None:
    """Texts that are called like splits are the data, whatever tables lie beside them; two kinds of splits are none."""
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(name)
    write(tmp_path / "stats.csv", ROWS)
    notes: list[str] = []
    assert tables.text_files(str(tmp_path), notes=notes) == {"train": ["train"], "validation": ["valid"]}
    assert notes == ["1 file left out (no .txt file that is called like a split): stats.csv"]
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(UserError, match=r"train\.txt is a text and test\.jsonl is a table, and both are called like"):
        tables.text_files(str(tmp_path))
    with pytest.raises(UserError, match=r"data\.test.*test\.jsonl is no text file, but .*train\.txt \(train\) is\."):
        tables.text_files({"train": str(tmp_path / "train.txt"), "test": str(tmp_path / "test.jsonl")})


def test_rows_to_predict_on(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    assert tables.rows_of(tmp_path / "in.txt").values("text") == ["one", "two"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    assert tables.rows_of(tmp_path / "in.jsonl").columns == {"text": ["a"]}
    with pytest.raises(UserError, match="is not a file here"):
        tables.rows_of(tmp_path / "nowhere.csv")
