"""What a run says of its data: rows, columns, classes and the first sample."""

from __future__ import annotations

import numpy as np
import torch

from trainer.data import report


def test_rows_and_columns() -> None:
    assert report.rows_line({"train": 1080, "validation": 120}, ["train"]) == (
        "1,200 rows: train 1,080, validation 120 (held out of train)"
    )
    assert report.columns_line(["id", "text", "stars"], {"text": "text", "pair": None, "label": "stars"}) == (
        'text from "text", label from "stars"; not read: id'
    )


def test_groups_are_named_where_they_are_few() -> None:
    speakers = {"train": ["a", "a", "b"], "validation": ["c d"], "test": ["e", "e", "f"]}
    rows = {name: len(own) for name, own in speakers.items()}
    assert report.rows_line(rows, ["train", "test"], "clip", groups=report.Groups("speaker", speakers)) == (
        "7 clips: train 3 (speaker: 2 groups), validation 1 (held out of train; speaker: c d), test 3 (speaker: e, f)"
    )
    many = report.Groups("patient", {"train": range(9), "validation": [9], "test": range(10, 16)})
    assert [many.said(name) for name in many.of] == ["patient: 9 groups", "patient: 1 group", "patient: 6 groups"]
    assert report.Groups("patient", {"train": None}).said("train") == report.NO_GROUPS.said("train") == ""


def test_classes_are_counted_in_every_split() -> None:
    labels = {"train": [0, 0, 1], "test": [1]}
    assert report.classes_line(["cat", "dog"], labels) == "2 classes (train + test): cat 2 + 0, dog 1 + 1"
    many = report.classes_line([f"c{i}" for i in range(30)], {"train": [0, *range(30)]})
    assert many.startswith("30 classes (train): c0 2, c1 1, ") and many.endswith("18 more, the smallest, c29 1")


def test_the_first_sample_is_one_line() -> None:
    assert (
        report.sample_line("a\nb" + "x" * 99, "cat")
        == f"first sample: {('a' + chr(10) + 'b' + 'x' * 77 + '...')!r} -> cat"
    )


def test_arrays_of_a_users_own_task() -> None:
    x, y = torch.arange(24.0).view(3, 8), torch.tensor([4, 7, 7])
    assert report.array_lines({"train": {"x": x, "y": y}, "test": {"x": x[:1], "y": y[:1]}}) == [
        "one sample: x (8,) float32, y () int64",
        "y: 2 classes (train + test): 4 1 + 1, 7 2 + 0",
        "first sample: x = 0, 1, 2, 3, 4, 5, ...; y = 4",
    ]
    assert len(report.array_lines({"train": {"y": torch.arange(50)}})) == 2, "numbers to regress on are no classes"


def test_classes_that_look_alike_are_named() -> None:
    line = report.classes_line(["pos", " pos", "neg"], {"train": [0, 1, 2, 0]})
    assert "pos 2, ' pos' 1, neg 1" in line
    assert "Check 'pos' and ' pos': they differ only in blanks, case or the encoding of accents" in line
    assert "differ" not in report.classes_line(["pos", "neg"], {"train": [0, 1]})
    assert "differ only" in report.classes_line(["caf\u00e9", "cafe\u0301"], {"train": [0, 1]})


def test_rows_of_train_in_other_splits_are_counted() -> None:
    rows = {"x": np.array([[1.0], [2.0], [3.0]], np.float32), "label": np.array([0, 1, 0])}
    other = {"x": np.array([[2.0], [3.0]], np.float32), "label": np.array([1, 1])}
    (note,) = report.copies_notes({"train": rows, "validation": {n: a + 5 for n, a in rows.items()}, "test": other})
    assert note.startswith("1 of the 2 rows of test are also in train")


def test_a_missing_validation_split_is_said() -> None:
    assert "Nothing is held out for validation" in report.rows_line({"train": 48}, ["train"])
    assert "Nothing" not in report.rows_line({"train": 48, "validation": 4}, ["train"])
