"""One file as a table: csv, tsv, json, json lines, parquet or text, as it is or compressed.

Training and prediction read files by the same function. It reads the content each time. Only the arrays that are made
of it are cached, under a hash of the content.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from .conll import SUFFIXES, read_conll
from .delimited import read_rows
from .json_layouts import read_json
from .memory import machine_bytes
from .not_data import other_kind
from .parquet import read_parquet
from .sources import READERS, TABLES, suffix_of

_OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Byte order marks, which Windows and others write before a text. The longer ones come first: UTF-32's begins with
# UTF-16's.
_MARKS = ((b"\xff\xfe\x00\x00", "utf-32"), (b"\x00\x00\xfe\xff", "utf-32"), (b"\xef\xbb\xbf", "utf-8-sig"),
          (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))  # fmt: skip


@dataclass(frozen=True)
class Format:
    """How text is read: the options `separator` and `encoding`. None means: as the file itself shows.

    With `conll`, files with a suffix of `conll.SUFFIXES` hold a word on each line.
    """

    separator: str | None = None
    encoding: str | None = None
    conll: bool = False

    def is_table(self, path: Path) -> bool:
        """Whether a file in a folder is a table by its name."""
        return suffix_of(path) in TABLES or (self.conll and suffix_of(path) in SUFFIXES)


@dataclass
class Table:
    """Rows, as columns.

    Attributes:
        columns: name -> values, a list or a pyarrow array.
        classes: for a column of numbers whose classes the data declares, their names.
        list_classes: the same for a column of lists of numbers.
        images: the columns that the data declares to be of images.
        notes: what was unusual, in sentences.
        content: a hash of what the datasets library has loaded, as it gives it; empty for files.
    """

    columns: dict[str, Any]
    classes: dict[str, list[str]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    content: str = ""
    list_classes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def column_names(self) -> list[str]:
        """The names of the columns, in the order of the file."""
        return list(self.columns)

    def __len__(self) -> int:
        """The number of rows."""
        return len(next(iter(self.columns.values()), ()))

    def values(self, column: str, start: int = 0, stop: int | None = None) -> list[Any]:
        """Some rows of a column."""
        part = self.columns[column][start:stop]
        return list(part) if isinstance(part, list) else list(part.to_pylist())

    def select(self, rows: Sequence[int]) -> Table:
        """Some rows, in the order given."""
        columns = {
            name: [values[i] for i in rows] if isinstance(values, list) else values.take(list(rows))
            for name, values in self.columns.items()
        }
        return Table(columns, self.classes, self.images, self.notes, self.content, self.list_classes)


def read_file(path: Path, how: Format = Format(), where: str | None = None) -> Table:
    """A file as a table. A .txt file has the column `text`, a line a row.

    Args:
        path: of a file.
        how: the options on its format.
        where: its name, for messages.

    Raises:
        UserError: it is of no known kind, or cannot be read.
    """
    where = where or str(path)
    kind = "conll" if how.conll and suffix_of(path) in SUFFIXES else READERS.get(suffix_of(path))
    if kind is None:
        raise UserError(
            f'"trainer.task_options.data": {where} is a {path.suffix or "nameless kind of"} file. '
            f"Files may be {', '.join(READERS)}, also compressed ({', '.join(_OPEN)})."
        )
    try:
        if kind == "parquet":
            return _parquet(path, where)
        text = read_text(path, how.encoding, where)
        if kind == "conll":
            return Table(dict(read_conll(text, where)))
        if kind in ("csv", "tsv"):
            header, rows, notes = read_rows(text, where, how.separator, kind == "tsv")
            columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
            return Table(columns, notes=notes)
        if kind == "txt":
            return Table({"text": text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")})
        json_columns, notes = read_json(text, lines=kind == "jsonl")
        return Table(json_columns, notes=[f"in {path.name}, {note}" for note in notes])
    except UserError:
        raise
    except Exception as error:  # of a dozen kinds, by file format and kind of failure
        raise UserError(f'"trainer.task_options.data": {where} cannot be read: {reason_of(error)}') from error


def reason_of(error: Exception) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_text(path: Path, encoding: str | None = None, where: str | None = None) -> str:
    """The text of a file, ends of lines included.

    Args:
        path: of a file, which may be compressed.
        encoding: None for UTF-8, or what the mark at the file's beginning says.
        where: its name, for messages.

    Raises:
        UserError: it cannot be read or decoded, or is empty.
    """
    where = where or str(path)
    try:
        with _OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
            content = _content(file, where)
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise UserError(f'"trainer.task_options.data": {where} cannot be read: {error}') from error
    other = other_kind(bytes(content[:100]), table=suffix_of(path) != ".txt")
    if other is not None:
        raise UserError(f'"trainer.task_options.data": {where} is no text: {other}')
    used = encoding or next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if used == "utf-8" and content.count(0, 0, 1000) > len(content[:1000]) // 4:
        raise UserError(
            f'"trainer.task_options.data": {where} is not UTF-8 text: it is full of zero bytes, as UTF-16 has them.\n'
            'Set "encoding": "utf-16-le" (or "utf-16-be") in trainer.task_options.'
        )
    try:
        text = content.decode(used)
    except UnicodeError as error:
        at = getattr(error, "start", 0)
        name = "UTF-8" if used.startswith("utf-8") else used
        raise UserError(
            f'"trainer.task_options.data": {where} is not {name} text: byte {at:,} is 0x{content[at : at + 1].hex()}.\n'
            'Another encoding is set with "encoding" in trainer.task_options, such as "latin-1" or "cp1252".'
        ) from error
    if not text:
        raise UserError(f'"trainer.task_options.data": {where} is empty.')
    return text


def _content(file: BinaryIO, where: str) -> bytearray:
    """All bytes of a file. A compressed file may unpack to a thousand times its size."""
    content, memory = bytearray(), machine_bytes()
    while part := file.read(1 << 24):
        content += part
        if 2 * len(content) > memory:  # twice: as bytes, and as text
            raise UserError(
                f'"trainer.task_options.data": {where} holds more than half of this machine\'s memory of {memory:,} '
                "bytes.\nKeep the rows that are needed, in another file."
            )
    return content


def _parquet(path: Path, where: str) -> Table:
    columns, features = read_parquet(path, where)
    return Table(
        columns,
        {name: [str(n) for n in f["names"]] for name, f in features.items() if f.get("_type") == "ClassLabel"},
        [name for name, f in features.items() if f.get("_type") == "Image"],
        list_classes={name: names for name, f in features.items() if (names := _names_in_lists(f)) is not None},
    )


def _names_in_lists(feature: Mapping[str, Any]) -> list[str] | None:
    """The names of classes that a column of lists declares in a parquet file of the datasets library, or None."""
    inner = feature.get("feature")
    if not isinstance(inner, Mapping) or inner.get("_type") != "ClassLabel":
        return None
    return [str(name) for name in inner["names"]]


def from_datasets(data: Any) -> Table:
    """A table of the datasets library."""
    import datasets

    arrow = data.with_format("arrow")[:]
    return Table(
        dict(zip(arrow.column_names, arrow.columns)),
        {name: list(f.names) for name, f in data.features.items() if isinstance(f, datasets.ClassLabel)},
        [name for name, f in data.features.items() if isinstance(f, datasets.Image)],
        content=data._fingerprint,
        list_classes={
            name: list(f.feature.names)
            for name, f in data.features.items()
            if isinstance(getattr(f, "feature", None), datasets.ClassLabel)
        },
    )


def joined(tables: Mapping[Path, Table], names: Mapping[Path, str]) -> Table:
    """The rows of several files, one after another.

    Raises:
        UserError: they have other columns, declare other classes, or two hold the same rows.
    """
    (first, whole), *others = tables.items()
    if not others:
        return whole
    columns = {name: whole.values(name) for name in whole.columns}
    notes = list(whole.notes)
    begins = {_beginning(whole): first}
    for file, table in others:
        declared = (table.classes, table.list_classes)
        if set(table.columns) != set(columns) or declared != (whole.classes, whole.list_classes):
            raise UserError(
                f'"trainer.task_options.data": {names[file]} has the columns {", ".join(table.columns)}, but '
                f"{names[first]} has {', '.join(columns)}. Files of one split must have the same columns.\n"
                'Name the files to read: "data": {"train": "a.csv", "test": "b.csv"}.'
            )
        twin = begins.setdefault(_beginning(table), file)
        if twin != file and len(table) and _same_rows(tables[twin], table):
            raise UserError(
                f'"trainer.task_options.data": {names[file]} holds the same {len(table):,} rows as {names[twin]}, '
                'which would count twice. Remove one of them, or name the file to read in "data".'
            )
        for name, values in columns.items():
            values += table.values(name)
        notes += table.notes
    return Table(columns, whole.classes, whole.images, notes, list_classes=whole.list_classes)


def _beginning(table: Table) -> tuple[Any, ...]:
    """The length and the first row of a table. Equal tables agree in them, few others do: they are compared first."""
    return len(table), *(_written(value) for name in sorted(table.columns) for value in table.values(name, 0, 1))


def _same_rows(one: Table, other: Table) -> bool:
    """Whether two tables with the same columns hold the same values, as text: one may be csv and the other json."""
    return all(
        all(_written(a) == _written(b) for a, b in zip(one.values(name), other.values(name))) for name in one.columns
    )


def _written(value: Any) -> str | bytes:
    """A value as csv writes it: a missing one (None, nan) is an empty field."""
    if isinstance(value, bytes):
        return value
    return "" if value is None or value != value else str(value)
