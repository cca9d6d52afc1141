"""Files of one kind, such as images or clips of sound, with their labels: in folders of classes, or named by a table.

Training and prediction use the same `Kind`, so both read the same files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import sources, tables
from .reading import BLOCK
from .sources import Found
from .table_files import Table, read_file

# The column of a metadata file that names files. Its paths begin at the folder of the metadata file.
_FILE_NAME = "file_name"


@dataclass(frozen=True)
class Kind:
    """One kind of files.

    Attributes:
        word: "image", for messages.
        one: the word with its article, "an image".
        is_one: whether a file is meant to be of this kind.
        suffixes: the usual ones, for messages.
        columns: usual names of a column of such files. Tables that are made of folders have the first one.
        nested: makes one of them from a value of nested lists; None if nested lists are an error.
    """

    word: str
    one: str
    is_one: Callable[[Path], bool]
    suffixes: Sequence[str]
    columns: Sequence[str]
    nested: Callable[[list[Any]], Any] | None = None

    @property
    def option(self) -> str:
        """The option that names the column."""
        return f"{self.columns[0]}_column"


def chosen(found: Found, kind: Kind) -> tuple[list[Path], list[Path]]:
    """The files that are of a kind, and the others."""
    files = [file for file in found.files if kind.is_one(file)]
    return files, found.others(files)


def folder_of(found: Found, kind: Kind) -> dict[str, Table] | None:
    """The splits of a folder, as tables of paths and labels; None if it holds tables, and no file of this kind.

    Raises:
        UserError: it holds neither; or the files have no classes, or a metadata file names others.
    """
    files, others = chosen(found, kind)
    if not files:
        if not any(sources.suffix_of(file) in sources.TABLES for file in others):
            raise UserError(_none_there(found, kind))
        return None
    described = [f for f in others if sources.stem_of(f) == "metadata" and sources.suffix_of(f) in sources.TABLES]
    if described:
        return _described(found, files, described, others, kind)
    groups, loose = sources.by_class(found, files)
    if not groups:
        raise UserError(
            f'"trainer.task_options.data": the {kind.word}s of {found.given} have no labels.\nPut each class\'s '
            f"{kind.word}s into a folder of its own, or add a file metadata.csv with the columns file_name and label."
        )
    if "train" in groups and len(only := set(groups["train"].classes)) == 1:
        raise UserError(
            f'"trainer.task_options.data": all {kind.word}s of {found.given} lie in one folder, {only.pop()}, which '
            "would be the only class. A classifier needs at least two classes.\nIf the folders of the classes lie in "
            "it, give that folder."
        )
    column, result = kind.columns[0], {}
    for split, group in groups.items():
        names = sorted(set(group.classes))
        place = {name: i for i, name in enumerate(names)}
        columns = {column: [str(file) for file in group.files], "label": [place[name] for name in group.classes]}
        result[split] = Table(columns, {"label": names}, [column])
    notes = sources.left_out_note(found, [*loose, *others], f"no {kind.word} in a folder of a class")
    notes += sources.twins_note(found, [file for group in groups.values() for file in group.files])
    next(iter(result.values())).notes += notes
    return result


def _none_there(found: Found, kind: Kind) -> str:
    """A message: a folder holds no file of a kind, nor a table that could name such."""
    there = sources.kinds_of(found.files) or "no files that could be data"
    left_out = "".join(f"\n{note}." for note in sources.left_out_note(found, [], ""))
    return (
        f'"trainer.task_options.data": there is no {kind.word} in {found.given}. It and its folders were searched, '
        f"except folders of runs, for files that end in {', '.join(kind.suffixes)}, and tables that name such files "
        f"({', '.join(sources.TABLES)}). It has: {there}.{left_out}\n"
        f"Name the folder that holds the {kind.word}s: --set trainer.task_options.data=PATH"
    )


def _described(
    found: Found, files: Sequence[Path], described: Sequence[Path], others: Sequence[Path], kind: Kind
) -> dict[str, Table]:
    """Files whose labels stand in metadata files, in their folder or in that of a split."""
    if pairs := sources.twins(found, described):
        raise UserError(
            f'"trainer.task_options.data": in {found.given}, {" and ".join(map(found.name, pairs[0]))} describe the '
            f"same {kind.word}s, which would count twice. Remove one of them."
        )
    known = {os.path.normpath(file): str(file) for file in files}
    column = kind.columns[0]
    splits: dict[str, Table] = {}
    used: set[str] = set()
    for file in described:
        table = read_file(file)
        if _FILE_NAME not in table.columns:
            raise UserError(
                f'"trainer.task_options.data": {file} needs the column file_name. It has: '
                f"{', '.join(table.column_names)}."
            )
        paths = [os.path.normpath(file.parent / str(name)) for name in table.values(_FILE_NAME)]
        lost = next((path for path in paths if path not in known), None)
        if lost is not None:
            raise UserError(
                f'"trainer.task_options.data": {file} names {lost}, which is no {kind.word} in {found.given}.'
            )
        paths = [known[path] for path in paths]
        twice = next((path for path, count in Counter(paths).items() if count > 1), None)
        if twice is not None or used & set(paths):
            path = twice or sorted(used & set(paths))[0]
            raise UserError(
                f'"trainer.task_options.data": {path} has two rows in {file if twice else "two metadata files"}, so it '
                "would count twice. Remove one of them."
            )
        tops = [found.parts(Path(path))[0] if len(found.parts(Path(path))) > 1 else "" for path in paths]
        of = [sources.split_of(top) or "train" for top in tops]
        for split in dict.fromkeys(of):
            rows = [row for row, own in enumerate(of) if own == split]
            part = table.select(rows)
            columns = {column: [paths[row] for row in rows]}
            columns |= {name: part.values(name) for name in part.columns if name != _FILE_NAME}
            if split in splits:
                if list(splits[split].columns) != list(columns):
                    raise UserError(
                        f'"trainer.task_options.data": the metadata files of {found.given} differ in their columns.'
                    )
                for name, values in columns.items():
                    splits[split].columns[name] += values
            else:
                splits[split] = replace(part, columns=columns, images=[column], notes=list(table.notes))
        used |= set(paths)
    rest = found.others([*map(Path, used), *described])
    notes = sources.left_out_note(found, rest, "not named by the metadata")
    next(iter(splits.values())).notes += notes
    return sources.in_order(splits)


@dataclass(frozen=True)
class Contents:
    """The files of a column: (name, content) for each row. It can be iterated over many times.

    A content is bytes, a path, what `Kind.nested` made of nested lists, or None if there is none.

    Attributes:
        table: its column holds files as bytes, as {"bytes": ..., "path": ...} (the datasets library writes this), as
            paths, or as nested lists.
        split: for messages.
        column: the name of the column.
        kind: what the files are.
        folders: a file that the table only names must lie in one of these folders, whose contents are part of the
            cache's key. None or no folders: it may lie anywhere.
    """

    table: Table
    split: str
    column: str
    kind: Kind
    folders: Sequence[Path] | None = None

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Raises UserError if the column holds something else, or a file lies elsewhere."""
        for start in range(0, len(self.table), BLOCK):
            try:
                values = self.table.values(self.column, start, start + BLOCK)
            except Exception as error:  # such as paths in a parquet file that are not UTF-8
                raise UserError(f'The column "{self.column}" in {self.split} cannot be read: {error}') from error
            for row, value in enumerate(values, start=start):
                yield self._one(row, value)

    def _one(self, row: int, value: Any) -> tuple[str, Any]:
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(value, str):
            content, path = None, value
        nested = self.kind.nested if isinstance(value, list) else None
        if nested is not None:
            content = nested(value)
        if not (nested or isinstance(content, (bytes, type(None)))) or not isinstance(path, (str, type(None))):
            raise UserError(
                f'The column "{self.column}" holds {str(value)[:50]} ({type(value).__name__}), not {self.kind.word}s. '
                f"Name the right one with {self.kind.option} in trainer.task_options."
            )
        name = f"row {row + 1} of {self.split}" + (f", {path}" if path else "")
        if (content is not None and len(content)) or not path:
            return name, content if content is not None and len(content) else None
        if self.folders and not any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in self.folders):
            raise UserError(
                f"{name}: the table only names its {self.kind.word}s, so changed {self.kind.word}s would not be "
                f"noticed.\nPut the table into the folder of the {self.kind.word}s as metadata.csv, with their names "
                "in the column file_name, and give that folder as data."
            )
        return path, path


def with_paths(table: Table, column: str, base: Path) -> Table:
    """A table whose column of names holds paths that can be opened. Other columns of files are left as they are."""
    if column in table.images:  # paths of a folder, or files that the table holds
        return table
    if not isinstance(next(iter(table.values(column, 0, 1)), None), str):
        return table
    values = tables.values_of(table, column, "the data")
    # os.path.join: an absolute name stays as it is.
    paths = [
        os.path.normpath(os.path.join(base, value)) if isinstance(value, str) and value else value for value in values
    ]
    return replace(table, columns={**table.columns, column: paths})


def to_predict(
    source: Path, kind: Kind, column: str | None, notes: list[str], named: Callable[[Table, str], Table] | None = None
) -> tuple[str, Iterator[tuple[Any, Any]]]:
    """The word file or row, and (name, content) of each file to predict on. Rows of paths are files.

    Args:
        source: one file, a folder, or a table.
        kind: what to look for.
        column: of a table; None for the one with a usual name, or file_name, as metadata has it.
        notes: takes sentences on what is left out.
        named: given a table and its column, the table with paths that can be opened.

    Raises:
        UserError: there are none.
    """
    if source.is_file() and kind.is_one(source):
        return "file", iter([(str(source), source)])
    found = sources.find(str(source))
    if source.is_dir() and found is not None and not found.saved:
        files, others = chosen(found, kind)
        if files:
            notes += sources.left_out_note(found, others, f"no {kind.word}")
            return "file", ((str(file), file) for file in files)
        if not any(sources.suffix_of(file) in sources.TABLES for file in others):
            raise UserError(f"--input {source}: no {kind.word}s in this folder ({', '.join(kind.suffixes)}).")
    try:
        table = tables.read({"train": str(source)})["train"]
    except UserError as error:
        raise UserError(f"--input: {str(error).partition(': ')[2]}") from error
    given = column or (table.images[0] if len(table.images) == 1 else None)
    column = tables.find_column(table.column_names, given, (*kind.columns, _FILE_NAME), kind.option, str(source))
    if named is not None:
        table = named(table, column)
    elif column == _FILE_NAME:
        table = with_paths(table, column, source.parent if source.is_file() else source)
    contents = Contents(table, str(source), column, kind)
    if isinstance(next(iter(contents), ("", None))[1], str):  # a table of paths
        return "file", iter(contents)
    return "row", ((row, content) for row, (_, content) in enumerate(contents))
