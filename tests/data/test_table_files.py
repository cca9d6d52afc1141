"""Files of every kind become the same rows, in any encoding, compressed or not; or a message names file and byte."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.data.test_memory import with_memory
from trainer.data import tables
from trainer.data.table_files import Format, read_file, read_text
from trainer.errors import UserError

CSV = "text,label\nüber é,a\nplain,b\n"
COLUMNS = {"text": ["über é", "plain"], "label": ["a", "b"]}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_at_the_beginning_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_text(CSV, encoding=encoding)
    assert read_file(tmp_path / "a.csv").columns == COLUMNS


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le"])
def test_another_encoding_is_an_option_that_the_message_names(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes(CSV.encode(encoding))
    if encoding != "utf-16-le":
        with pytest.raises(
            UserError, match=r'(?s)a.csv is not UTF-8 text: byte 11 is 0xfc.\n.*"encoding" in trainer.task_options'
        ):
            read_file(tmp_path / "a.csv")
    else:
        with pytest.raises(UserError, match=r'a.csv is not UTF-8 text: it is full of zero bytes.*\n.*"utf-16-le"'):
            read_file(tmp_path / "a.csv")
    assert read_file(tmp_path / "a.csv", Format(encoding=encoding)).columns == COLUMNS
    with pytest.raises(UserError, match=r"a.csv is not ascii text: byte"):
        read_text(tmp_path / "a.csv", "ascii")


def test_options_of_the_format() -> None:
    assert tables.checked_format("tab", "latin1") == Format("\t", "latin1")
    with pytest.raises(UserError, match=r'separator" is ";;". It must be a single character'):
        tables.checked_format(";;", None)
    with pytest.raises(UserError, match='encoding" is "utf-9", which Python does not know'):
        tables.checked_format(None, "utf-9")


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, pack: object) -> None:
    lines = "".join(json.dumps(dict(zip(COLUMNS, row))) + "\n" for row in zip(*COLUMNS.values()))
    for name, content in {"a.csv": CSV, "a.tsv": CSV.replace(",", "\t"), "a.jsonl": lines, "a.json": lines}.items():
        (tmp_path / (name + suffix)).write_bytes(pack(content.encode()))  # type: ignore[operator]
        assert read_file(tmp_path / (name + suffix)).columns == COLUMNS
    (tmp_path / ("b.csv" + suffix)).write_bytes(b"no such format")
    with pytest.raises(UserError, match="cannot be read"):
        read_file(tmp_path / ("b.csv" + suffix))


def test_json_of_every_style(tmp_path: Path) -> None:
    records = [dict(zip(COLUMNS, row)) for row in zip(*COLUMNS.values())]
    for content in (records, COLUMNS):
        (tmp_path / "a.json").write_text(json.dumps(content, indent=1))
        assert read_file(tmp_path / "a.json").columns == COLUMNS
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n\n{"label": 1, "text": null}\n')
    assert read_file(tmp_path / "b.jsonl").columns == {"text": ["a", None], "label": [None, 1]}
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"c.jsonl cannot be read: line 2: Expecting value"):
        read_file(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").write_text("3\n")
    with pytest.raises(UserError, match="row 1 is no record of column and value, but '3'"):
        read_file(tmp_path / "d.jsonl")


def test_a_file_replaced_with_its_time_kept_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "z.csv"
    for word in ("panda", "tiger"):
        file.write_text(f"text,label\n{word},a\n")
        os.utime(file, (1_200_000_000,) * 2)
        assert tables.read(str(file))["train"].values("text") == [word]


def test_reading_needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The datasets library kept a cache of its own there."""
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # a file: nothing can be made in it
    (tmp_path / "a.csv").write_text(CSV)
    assert tables.read(str(tmp_path / "a.csv"))["train"].columns == COLUMNS


def test_files_of_one_split_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,x\n")
    (tmp_path / "b.jsonl").write_text('{"label": "y", "text": "b"}\n')
    assert tables.read(str(tmp_path))["train"].columns == {"text": ["a", "b"], "label": ["x", "y"]}
    (tmp_path / "c.csv").write_text("id,price\n1,2\n")
    with pytest.raises(UserError, match=r"c.csv has the columns id, price, but a.csv has text, label"):
        tables.read(str(tmp_path))


@pytest.mark.parametrize(("one", "other"), [("a.csv", "export.jsonl"), ("a.csv", "b.parquet"), ("a.csv", "a (1).csv")])
def test_two_files_with_the_same_rows_are_refused(tmp_path: Path, one: str, other: str) -> None:

    columns: dict[str, list[object]] = {"text": ["a", "b", "c"], "label": [1, 2, None]}
    for name in (one, other):
        if name.endswith(".csv"):
            (tmp_path / name).write_text("text,label\na,1\nb,2\nc,\n")
        elif name.endswith(".jsonl"):
            (tmp_path / name).write_text(
                "".join(json.dumps(dict(zip(columns, r))) + "\n" for r in zip(*columns.values()))
            )
        else:
            pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / name)
    first, second = sorted((one, other))
    with pytest.raises(UserError, match=f"{re.escape(second)} holds the same 3 rows as {re.escape(first)}"):
        tables.read(str(tmp_path))
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,2\nd,2\n")
    if other != "a (1).csv":
        assert len(tables.read(str(tmp_path))["train"]) == 6


def test_a_folder_of_a_competition(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,text,label\n1,a,x\n2,b,y\n")
    (tmp_path / "test.csv").write_text("id,text\n3,c\n")
    (tmp_path / "sample_submission.csv").write_text("id,label\n3,x\n")
    found = tables.read(str(tmp_path))
    assert {name: len(table) for name, table in found.items()} == {"train": 2, "test": 1}
    assert tables.notes_of(found) == ["1 file left out (no table that is called like a split): sample_submission.csv"]


def test_texts_in_a_folder_for_each_class(tmp_path: Path) -> None:
    """As BBC News (.txt), 20 Newsgroups (no suffix, latin-1, messages with numbers) and IMDB (splits above) are."""
    for name, content in {
        "train/sci.med/58": "a caf\xe9", "train/rec.autos/101": "b", "train/rec.autos/102.txt": "c",
        "test/sci.med/9.5": "d", "README.pdf": "?", "train/urls.txt": "?",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"sci.med/58 is not UTF-8 text: byte 5"):
        tables.read(str(tmp_path))
    found = tables.read(str(tmp_path), how=Format(encoding="latin-1"))
    assert found["train"].values("text") == ["b", "c", "a caf\xe9"]
    assert tables.labels(found["train"], "label", "train") == ["rec.autos", "rec.autos", "sci.med"]
    assert tables.labels(found["test"], "label", "test") == ["sci.med"]
    assert tables.notes_of(found) == ["2 files left out (no text in a folder of a class): train/urls.txt, README.pdf"]
    for name in ("a.png", "b.png"):
        (tmp_path / "empty" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "empty" / name).touch()
    with pytest.raises(UserError, match=r"holds neither tables .* nor folders of classes. It has: 2 .png"):
        tables.read(str(tmp_path / "empty"))


# Files that unpack to more than the memory


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.csv", ""), ("a.csv", ".bz2"), ("a.csv", ".xz"), ("a.txt", ".gz"), ("a.jsonl", ".gz")]
)
def test_a_text_that_unpacks_to_more_than_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    content = b"text,label\n" + b"a,1\n" * 600_000
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    (tmp_path / (name + suffix)).write_bytes(pack(content))
    with_memory(monkeypatch, 4)
    with pytest.raises(UserError, match=r"holds more than half of this machine's memory of 4,194,304 bytes"):
        read_file(tmp_path / (name + suffix))
