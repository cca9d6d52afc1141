"""Files of one kind with labels, whatever the kind: folders, tables, and what to predict on."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from trainer.data import sources
from trainer.data.labelled_files import Contents, Kind, chosen, folder_of, to_predict
from trainer.data.table_files import Table
from trainer.errors import UserError

SCORES = Kind("score", "a score", lambda file: file.suffix == ".abc", (".abc",), ("score", "path"))


def scores(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def found(folder: Path) -> sources.Found:
    files = sources.find(str(folder))
    assert files is not None
    return files


def test_folders_of_classes_are_tables_of_paths(tmp_path: Path) -> None:
    folder = scores(tmp_path, "train/jig/1.abc", "train/reel/2.abc", "test/jig/3.abc", "train/jig/notes.txt")
    assert [file.name for file in chosen(found(folder), SCORES)[0]] == ["3.abc", "1.abc", "2.abc"]
    splits = folder_of(found(folder), SCORES)
    assert splits is not None
    assert splits["train"].columns == {
        "score": [f"{folder}/train/jig/1.abc", f"{folder}/train/reel/2.abc"],
        "label": [0, 1],
    }
    assert splits["train"].classes == {"label": ["jig", "reel"]}
    assert splits["train"].images == ["score"]
    assert splits["train"].notes == ["1 file left out (no score in a folder of a class): train/jig/notes.txt"]
    assert folder_of(found(scores(tmp_path / "other", "a.txt", "table.csv")), SCORES) is None
    with pytest.raises(UserError, match=r"(?s)no score in .*neither.*end in \.abc, and tables .*It has: 1 \.txt"):
        folder_of(found(scores(tmp_path / "neither", "a.txt")), SCORES)


def test_messages_name_the_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)the scores of .* have no labels.*each class's scores"):
        folder_of(found(scores(tmp_path, "1.abc")), SCORES)
    wrong = Contents(Table({"n": [1]}), "train", "n", SCORES)
    with pytest.raises(UserError, match=r'"n" holds 1 \(int\), not scores\. Name the right one with score_column'):
        list(wrong)


def test_contents_come_as_often_as_wanted(tmp_path: Path) -> None:
    table = Table({"score": [b"x", {"bytes": None, "path": "a.abc"}, "b.abc", None]})
    contents = Contents(table, "train", "score", SCORES)
    expected = [("row 1 of train", b"x"), ("a.abc", "a.abc"), ("b.abc", "b.abc"), ("row 4 of train", None)]
    assert list(contents) == list(contents) == expected
    elsewhere = Contents(table, "train", "score", SCORES, [tmp_path])
    with pytest.raises(UserError, match=r"(?s)row 2 of train, a\.abc: the table only names its scores.*metadata\.csv"):
        list(elsewhere)


def test_prediction_takes_a_file_a_folder_or_a_table(tmp_path: Path) -> None:
    folder = scores(tmp_path / "new", "1.abc", "deep/2.abc", "a.txt")
    notes: list[str] = []
    kind, one = to_predict(folder / "1.abc", SCORES, None, notes)
    assert (kind, list(one)) == ("file", [(f"{folder}/1.abc", folder / "1.abc")])
    kind, several = to_predict(folder, SCORES, None, notes)
    assert [Path(name).name for name, _ in several] == ["1.abc", "2.abc"]
    assert notes == ["1 file left out (no score): a.txt"]
    (tmp_path / "new.csv").write_text("path\n1.abc\n")
    kind, rows = to_predict(tmp_path / "new.csv", SCORES, None, notes)
    assert (kind, list(rows)) == ("file", [("1.abc", "1.abc")])
    (folder / "metadata.csv").write_text("file_name,label\ndeep/2.abc,x\n")
    kind, rows = to_predict(folder / "metadata.csv", SCORES, None, notes)
    assert (kind, list(rows)) == ("file", [(f"{folder}/deep/2.abc",) * 2]), "names begin at the folder of metadata"
    Dataset.from_dict({"score": [b"x"]}).to_parquet(str(tmp_path / "new.parquet"))
    kind, rows = to_predict(tmp_path / "new.parquet", SCORES, None, notes)
    assert (kind, list(rows)) == ("row", [(0, b"x")])
    scores(tmp_path / "empty", "a.txt")
    with pytest.raises(UserError, match=r"no scores in this folder \(\.abc\)"):
        to_predict(tmp_path / "empty", SCORES, None, notes)
