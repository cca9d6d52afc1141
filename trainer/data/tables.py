"""A user's tables, from files, folders and hub names, as named splits; their columns, texts and labels.

The tasks for texts and images share this file. It finds columns, and checks labels before training starts. Heavy
packages are imported inside functions, because no rank needs them if the cache has the data.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import near
from ..errors import UserError
from ..wording import counted, row_at
from . import sources
from .sources import Data, Found
from .table_files import Format, Table, from_datasets, joined, read_file, read_text, reason_of

# Reads a folder that holds other files than tables, such as images; returns None if the folder is not of that kind.
FolderReader = Callable[[Found], dict[str, Table] | None]
_PLAIN = Format()
# Suffixes of texts in folders of classes; 20 Newsgroups has none, or a number.
_TEXTS = (".txt", ".text", ".md", ".eml", ".html", ".htm", "")


def checked_format(separator: str | None, encoding: str | None) -> Format:
    """The options on the format of text files. Raises UserError."""
    separator = "\t" if separator in ("tab", "\\t") else separator
    if separator is not None and len(separator) != 1:
        raise UserError(f'"trainer.task_options.separator" is "{separator}". It must be a single character, or "tab".')
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError as error:
        raise UserError(
            f'"trainer.task_options.encoding" is "{encoding}", which Python does not know. Usual ones are "utf-8", '
            '"latin-1", "cp1252" and "utf-16".'
        ) from error
    return Format(separator, encoding)


def read(
    data: Data,
    *,
    config_name: str | None = None,
    split_column: str | None = None,
    how: Format = _PLAIN,
    folder: FolderReader | None = None,
) -> dict[str, Table]:
    """The splits of a dataset: {"train": table, ...}, with "validation" and "test" where there are any.

    Args:
        data: a csv, tsv, json, jsonl, parquet or text file; a folder of such, of class folders, or one that
            `save_to_disk` wrote; a pattern of files; a dataset's name on the hub; or {split: any of these}.
        config_name: which configuration of a hub dataset.
        split_column: the column of a single table that names each row's split; without it, a column "split" whose
            values are names of splits is taken.
        how: the options on the format of text files.
        folder: reads folders of images; without it, folders of classes hold texts.

    Raises:
        UserError: nothing is there, it cannot be read, or there is no split for training.
    """
    if isinstance(data, Mapping):
        tables: dict[str, Table] = {}
        for name, part in data.items():
            sources.check_split_name(name)
            found = _load(part, config_name, how, folder)
            if len(found) > 1 and name not in found:
                raise UserError(f'"trainer.task_options.data.{name}": {part} holds the splits {", ".join(found)}.')
            tables[name] = found[name] if name in found else next(iter(found.values()))
    else:
        tables = _load(data, config_name, how, folder)
    if list(tables) == ["train"]:
        tables = _by_column(tables["train"], split_column)
    elif split_column is not None:
        raise UserError(
            f'"trainer.task_options.split_column" has no effect: {data} has splits already: {", ".join(tables)}.'
        )
    named: dict[str, Table] = {}
    unused = []
    for name, table in tables.items():
        known = sources.ALIASES.get(name.lower())
        if known in named:
            raise UserError(
                f'"trainer.task_options.data": {data} has two splits that mean the same: {known} is given twice, '
                f"once as {name} ({counted(len(table), 'row')}). Give both the same name, or leave one out."
            )
        if known is not None:
            named[known] = table
        else:
            unused.append(f"{name} ({counted(len(table), 'row')})")
    if "train" not in named:
        raise UserError(
            f'"trainer.task_options.data": {data} has no split for training, only {", ".join(tables) or "nothing"}.\n'
            'Name the files: "data": {"train": "a.csv", "test": "b.csv"}.'
        )
    for name, table in named.items():
        if len(table) == 0:
            raise UserError(f'"trainer.task_options.data": the split {name} of {data} is empty.')
    if unused:
        named["train"].notes.append(f"left out of {data}, because these are no known splits: {', '.join(unused)}")
    return sources.in_order(named)


def content_of(data: Data, read: Callable[[], dict[str, Table]]) -> tuple[Any, dict[str, Table] | None]:
    """What identifies the content of some data, for the key of a cache; and the splits, if they had to be read.

    Args:
        data: the option.
        read: reads the splits. Of a name on the hub, only the datasets library knows which content it has today.
    """
    content = sources.fingerprint(data)
    if content is not None:
        return content, None
    found = read()
    local = {name: sources.fingerprint(part) for name, part in data.items()} if isinstance(data, Mapping) else {}
    return {name: [table.content, local.get(name)] for name, table in found.items()}, found


def notes_of(tables: Mapping[str, Table]) -> list[str]:
    """What was unusual when the splits were read, each sentence once."""
    return list(dict.fromkeys(note for table in tables.values() for note in table.notes))


def _load(source: str, config_name: str | None, how: Format, folder: FolderReader | None) -> dict[str, Table]:
    found = sources.find(source)
    if found is None:
        return _hub(source, config_name)
    if found.saved:
        return _saved(found)
    if found.single:
        return {"train": read_file(found.files[0], how, source)}
    own = None if folder is None else folder(found)
    if own is not None:
        return own
    files = [file for file in found.files if how.is_table(file)]
    if not files:
        return _class_folders(found, how)
    splits, others = sources.by_file(found, files)
    read = {}
    for name, group in splits.items():
        names = {file: found.name(file) for file in group}
        read[name] = joined({file: read_file(file, how, str(file)) for file in group}, names)
    first = next(iter(read.values()))
    first.notes += sources.left_out_note(found, [*others, *found.others(files)], "no table that is called like a split")
    return read


def _class_folders(found: Found, how: Format) -> dict[str, Table]:
    """Texts in a folder for each class: BBC News, 20 Newsgroups, IMDB."""
    texts = _texts_of(found)
    groups, loose = sources.by_class(found, texts)
    if not groups:
        there = sources.kinds_of(found.files) or "no files"
        left_out = "".join(f"\n{note}." for note in sources.left_out_note(found, [], ""))
        raise UserError(
            f'"trainer.task_options.data": {found.given} holds neither tables ({", ".join(sources.TABLES)}) nor '
            f"folders of classes. It has: {there}.{left_out}"
        )
    others = [*loose, *found.others(texts)]
    read = {}
    for split, group in groups.items():
        names = sorted(set(group.classes))
        place = {name: i for i, name in enumerate(names)}
        contents = [read_text(file, how.encoding) for file in group.files]
        read[split] = Table({"text": contents, "label": [place[c] for c in group.classes]}, {"label": names})
    first = next(iter(read.values()))
    first.notes += sources.left_out_note(found, others, "no text in a folder of a class")
    named = [file for group in groups.values() for file in group.files if sources.suffix_of(file) in _TEXTS[:-1]]
    first.notes += sources.twins_note(found, named)
    return read


def _texts_of(found: Found) -> list[Path]:
    """The files that are single texts."""
    return [file for file in found.files if (suffix := sources.suffix_of(file)) in _TEXTS or suffix[1:].isdecimal()]


def _saved(found: Found) -> dict[str, Table]:
    import datasets

    try:
        result = datasets.load_from_disk(str(found.root))
        return _tables_of(result)
    except Exception as error:  # of a dozen kinds
        raise UserError(f'"trainer.task_options.data": {found.given} cannot be read: {reason_of(error)}') from error


def _hub(source: str, config_name: str | None) -> dict[str, Table]:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs, it raises as well
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each retry, on each rank
    try:
        return _tables_of(datasets.load_dataset(source, config_name))
    except Exception as error:  # of a dozen kinds
        raise UserError(
            f'"trainer.task_options.data": "{source}" is no file or folder here, and as a name on the dataset hub it '
            f"cannot be loaded: {reason_of(error)}\nWithout a network, give a local file or folder: csv, json lines, "
            "parquet, class folders of images, or what datasets' save_to_disk writes."
        ) from error


def _tables_of(result: Any) -> dict[str, Table]:
    import datasets

    splits = dict(result) if isinstance(result, datasets.DatasetDict) else {"train": result}
    return {str(name): from_datasets(table) for name, table in splits.items()}


def text_files(data: Data, how: Format = _PLAIN, notes: list[str] | None = None) -> dict[str, list[str]] | None:
    """{split: the contents of its files} of a text file, a folder of such, or {split: such}; None for other data.

    In a folder, files and folders with the names of splits (train.txt, valid.txt, ...) are these splits; else all
    files are for training. Contents are as they are, ends of lines included.

    Args:
        data: the option.
        how: the options on the format of text files.
        notes: takes sentences on what is left out.

    Raises:
        UserError: a file is empty or cannot be decoded, or no file is for training.
    """
    notes = [] if notes is None else notes
    if isinstance(data, Mapping):
        parts = {name: text_files(part, how, notes) for name, part in data.items()}
        if all(part is None for part in parts.values()):
            return None
        for name, part in parts.items():
            sources.check_split_name(name)
            if part is None:
                text = next(other for other, texts in parts.items() if texts is not None)
                raise UserError(
                    f'"trainer.task_options.data.{name}": {data[name]} is no text file, but {data[text]} ({text}) is. '
                    "All splits must be of one kind: texts, or tables with a column of texts."
                )
        if "train" not in parts:
            raise UserError(f'"trainer.task_options.data" has no split "train", only {", ".join(parts)}.')
        return {name: [t for texts in (part or {}).values() for t in texts] for name, part in parts.items()}
    found = sources.find(data)
    if found is None or found.saved:
        return None
    files = [file for file in found.files if sources.suffix_of(file) == ".txt"]
    others = [file for file in found.files if sources.suffix_of(file) in sources.TABLES]
    if not files or (others and not _are_the_splits(found, files, others)):
        return None
    splits, others = sources.by_file(found, files) if not found.single else ({"train": files}, [])
    if "train" not in splits:
        raise UserError(f'"trainer.task_options.data": {data} has no split for training (train.txt or train/).')
    notes += sources.left_out_note(found, [*others, *found.others(files)], "no .txt file that is called like a split")
    return {name: _read_texts(found, group, how.encoding) for name, group in splits.items()}


def _read_texts(found: Found, files: Sequence[Path], encoding: str | None) -> list[str]:
    """The contents of a split's files. Raises UserError if two are the same."""
    by_content: dict[str, Path] = {}
    for file in files:
        text = read_text(file, encoding)
        if text in by_content:
            raise UserError(
                f'"trainer.task_options.data": in {found.given}, {found.name(by_content[text])} and {found.name(file)} '
                "hold the same text, which would count twice. Remove one of them."
            )
        by_content[text] = file
    return list(by_content)


def _are_the_splits(found: Found, texts: Sequence[Path], others: Sequence[Path]) -> bool:
    """Whether texts are the splits of a folder that holds tables, too. Raises UserError if both are."""
    text, table = (
        next((f for f in files if any(map(sources.split_of, (*found.parts(f)[:-1], sources.stem_of(f))))), None)
        for files in (texts, others)
    )
    if text is not None and table is not None:
        raise UserError(
            f'"trainer.task_options.data": in {found.given}, {found.name(text)} is a text and {found.name(table)} is a '
            "table, and both are called like splits. All splits must be of one kind: texts, or tables with a column of "
            "texts.\nConvert or remove those of one kind."
        )
    return text is not None


def _by_column(table: Table, split_column: str | None) -> dict[str, Table]:
    """One table, cut by a column that names splits."""
    if split_column is not None and split_column not in table.column_names:
        raise UserError(
            f'"trainer.task_options.split_column": no column "{split_column}". {near(split_column, table.column_names)}'
        )
    column = split_column or ("split" if "split" in table.column_names else None)
    if column is None:
        return {"train": table}
    values = values_of(table, column, "the data")
    names = dict.fromkeys(values)
    if split_column is None and not all(isinstance(n, str) and n.lower() in sources.ALIASES for n in names):
        return {"train": table}
    of = np.array([str(v) for v in values])
    return {str(name): table.select(np.flatnonzero(of == str(name)).tolist()) for name in names}


def find_column(
    columns: Sequence[str], given: str | None, usual: Sequence[str], option: str, where: str = "the data"
) -> str:
    """The column that an option names, or the first of the usual names that the data has.

    Raises:
        UserError: there is no such column; the message lists the columns.
    """
    there = ", ".join(columns)
    if given is not None:
        if given not in columns:
            raise UserError(f'"trainer.task_options.{option}": {where} has no column "{given}". It has: {there}.')
        return given
    lower = {column.lower(): column for column in columns}
    found = [lower[name] for name in usual if name in lower]
    if not found:
        raise UserError(
            f'"trainer.task_options.{option}" is needed: which of the columns is it? The data has: {there}.'
        )
    return found[0]


def values_of(table: Table, column: str, split: str) -> list[Any]:
    """A column of a table. Raises UserError, such as for texts in a parquet file that are not UTF-8."""
    try:
        return table.values(column)
    except Exception as error:  # pyarrow's and Python's own
        raise UserError(f'The column "{column}" in {split} cannot be read: {error}') from error


def texts(table: Table, column: str, split: str) -> list[str]:
    """A column of texts, complete. Raises UserError."""
    return as_texts(values_of(table, column, split), split, column)


def as_texts(values: Sequence[Any], split: str, column: str) -> list[str]:
    """Values that must be texts, and complete. Raises UserError, with the first row that is not."""
    check_complete(values, split, column)
    row = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if row is not None:
        raise UserError(
            f'The column "{column}" in {split} must hold texts, but {row_at(row)} is {str(values[row])[:50]!r} '
            f"({type(values[row]).__name__})."
        )
    return list(values)


def declared_names(table: Table, column: str) -> list[str] | None:
    """The names of classes that a dataset declares for a column of numbers, or None."""
    return table.classes.get(column)


def labels(table: Table, column: str, split: str) -> list[Any]:
    """A column of labels, complete: strings and numbers as they are, numbers with declared names as these names.

    Raises:
        UserError: a value is missing, or is no number of a declared class.
    """
    values = values_of(table, column, split)
    check_complete(values, split, column)
    names = declared_names(table, column)
    if names is None:
        return list(values)
    wrong = [row for row, value in enumerate(values) if not 0 <= value < len(names)]
    if wrong:
        raise UserError(
            f"{len(wrong)} label{'s' * (len(wrong) > 1)} in {split} {'are' if len(wrong) > 1 else 'is'} "
            f"{values[wrong[0]]}, which is none of the {len(names)} classes (the first: {row_at(wrong[0])}). "
            "Hub datasets mark samples without a label in this way. Leave that split out, or drop such rows."
        )
    return [names[value] for value in values]


def groups(table: Table, column: str | None, split: str) -> list[Any] | None:
    """A column of groups, complete; None where no column is named, or a split other than train lacks it."""
    if column is None or (split != "train" and column not in table.column_names):
        return None
    find_column(table.column_names, column, (), "group_column", split)
    values = values_of(table, column, split)
    check_complete(values, split, column)
    return values


def parted(groups: Sequence[Any] | None, rows: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """The groups of each part's rows; none where there are no groups.

    Args:
        groups: of each row of the whole.
        rows: part -> (n,) places in the whole.
    """
    return {} if groups is None else {name: [groups[i] for i in own.tolist()] for name, own in rows.items()}


def check_complete(values: Sequence[Any], split: str, column: str) -> None:
    """Raises UserError if a value is missing (None, nan, or an empty or blank text), with the row."""
    missing = [
        row
        for row, value in enumerate(values)
        if value is None
        or (isinstance(value, float) and value != value)
        or (isinstance(value, str) and not value.strip())
    ]
    if missing:
        rows = ", ".join(str(row + 1) for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
        which = f"row{'s' * (len(missing) > 1)} {rows}; row 1 is the first sample"
        raise UserError(
            f'{len(missing)} value{"s" * (len(missing) > 1)} of the column "{column}" in {split} '
            f"{'are' if len(missing) > 1 else 'is'} missing ({which}). Fill or drop such "
            "rows."
        )


def label_name(value: Any) -> str:
    """The name of a class: its label as it is written. 1 of a json file is "1" of a csv file, and 1.0 is "1.0"."""
    return str(value)


def _number(name: str) -> Fraction | None:
    """The number that a label is, if it is written as numbers usually are: 007 is a text.

    It is exact, because two different large numbers, such as the ids of users, may be the same float.
    """
    # Python refuses to read numbers of thousands of digits.
    usual = len(name) < 1000 and re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?", name)
    return Fraction(name) if usual else None


def _truth(name: str) -> bool | None:
    """True or False of a text that says so, in any letters: json writes true, Python's csv True. None of others."""
    return {"true": True, "false": False}.get(name.casefold())


def _reader(names: Sequence[str]) -> Callable[[str], Any] | None:
    """How to read the names of classes if all are numbers, or all are true or false; None if they are texts."""
    readers: tuple[Callable[[str], Any], ...] = (_number, _truth)
    return next((read for read in readers if all(read(name) is not None for name in names)), None)


def places(names: Sequence[str]) -> Callable[[Any], int | None]:
    """The position of a label's class among names, or None. Where all names are numbers, 1.0 is the class 1."""
    place, read = {name: i for i, name in enumerate(names)}, _reader(names)
    by_value = {} if read is None else {read(name): i for name, i in place.items()}

    def of(label: Any) -> int | None:
        name = label_name(label)
        found = place.get(name)
        return by_value.get(read(name)) if found is None and read is not None else found

    return of


def distinct(values: Iterable[Any]) -> list[str]:
    """The different values as they are written, sorted: numbers by value, others by alphabet. Of 1 and 1.0 it is 1."""
    names = sorted({label_name(value) for value in values}, key=lambda name: (len(name), name))
    read = _reader(names)
    if read is None:
        return sorted(names)
    by_value: dict[Any, str] = {}
    for name in names:
        by_value.setdefault(read(name), name)
    return [by_value[value] for value in sorted(by_value)]


def is_label(value: Any) -> bool:
    """Whether a value can name a class: a whole number, a text, true or false."""
    return isinstance(value, (bool, int, str, np.integer)) or (isinstance(value, float) and value.is_integer())


def class_names(labels: Mapping[str, Sequence[Any]], given: Sequence[str] | None = None) -> list[str]:
    """The classes of a dataset, in the order of their numbers.

    Args:
        labels: split -> label of each row, whole numbers or strings.
        given: names that the dataset itself declares (number -> name).

    Returns:
        The names: those given; else the training set's labels, numbers by value and strings by alphabet.

    Raises:
        UserError: a label is something else, a split has a label that train lacks, or there is only one class.
    """
    for split, values in labels.items():
        odd = next((v for v in values if not is_label(v)), None)
        if odd is not None:
            raise UserError(f"A label in {split} is {odd!r}. {_other_labels(odd)}")
    train = distinct(labels["train"])
    read = _reader(train)
    values_of = {} if read is None else {name: read(name) for name in train}
    fraction = next(
        (n for n, value in values_of.items() if isinstance(value, Fraction) and value.denominator > 1), None
    )
    if fraction is not None:
        raise UserError(f"A label in train is {fraction}. {_other_labels(float(fraction))}")
    known = places(train)
    for split, values in labels.items():
        unknown = Counter(v for v in values if known(v) is None)
        if unknown:
            label, count = unknown.most_common(1)[0]
            raise UserError(
                f"The label {label!r} occurs {count} time{'s' * (count > 1)} in {split}, but never in train, so no "
                f"model can learn it ({len(unknown)} such label{'s' * (len(unknown) > 1)}). "
                f"Train has: {', '.join(train[:20])}."
            )
    kinds = {isinstance(label, str): label for label in labels["train"]}
    if len(kinds) > 1 and not values_of:
        raise UserError(
            f"Some labels in train are numbers, such as {kinds[False]!r}, and some are texts, such as {kinds[True]!r}. "
            "Use one kind."
        )
    if len(train) < 2:
        raise UserError(f"All labels in train are {labels['train'][0]!r}. A classifier needs at least two classes.")
    return train if given is None else list(given)


def _other_labels(value: Any) -> str:
    """What to do with labels that are no classes."""
    if isinstance(value, (list, tuple, set, np.ndarray, Mapping)):
        return (
            "Here a label is one whole number or text. For several labels a sample, set "
            '"problem_type": "multi_label_classification" in trainer.task_options: texts and images can be learnt '
            "in this way."
        )
    if isinstance(value, (float, np.floating)):
        return (
            "A label is a whole number or a text, the name of a class. To predict numbers of texts and images, set "
            '"problem_type": "regression" in trainer.task_options.'
        )
    return "Labels are whole numbers or texts."


def label_numbers(values: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """(rows,) int64 positions in `names`."""
    place = places(names)
    return np.array([place(value) for value in values], dtype=np.int64)


def duplicates_note(rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """A sentence for each split that shares rows with train. rows: split -> hashable content of each row."""
    train = set(rows["train"])
    notes = []
    for split, values in rows.items():
        shared = 0 if split == "train" else sum(value in train for value in values)
        if shared:
            notes.append(
                f"{shared:,} of the {len(values):,} samples of {split} are also in train, so its metrics are too good"
            )
    return notes


def rows_of(source: Path, how: Format = _PLAIN) -> Table:
    """The table to predict on, with at least one row, read as in training.

    Args:
        source: a csv, tsv, json, json lines or parquet file; a .txt file with a text on each line; or a folder with a
            file for each text, whose names are the column "file".
        how: the options on the format of text files.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    if not source.exists():
        raise UserError(f"--input {source} is not a file here (looked from {Path.cwd()}).")
    try:
        table = _single_texts(source, how) if source.is_dir() else read_file(source, how)
    except UserError as error:
        raise UserError(f"--input: {str(error).partition(': ')[2] or error}") from error
    if not len(table):
        raise UserError(f"--input {source} holds no rows.")
    return table


def _single_texts(folder: Path, how: Format) -> Table:
    found = sources.find(str(folder))
    assert found is not None
    files = _texts_of(found)
    return Table(
        {"file": [found.name(file) for file in files], "text": [read_text(file, how.encoding) for file in files]},
        notes=sources.left_out_note(found, found.others(files), "no text"),
    )


def text_column_of(source: Path, table: Table, given: str | None, usual: Sequence[str], option: str) -> str:
    """The column of texts to predict on: of a .txt file its lines, else as in training. Raises UserError."""
    if source.is_dir() or sources.READERS.get(sources.suffix_of(source)) == "txt":
        return "text"
    return find_column(table.column_names, given, usual, option, f"--input {source}")
