"""Datasets of a user's own: files, folders and hub names, read by the `datasets` library, as named splits.

The tasks for text and images share this file. It finds splits and columns, and checks labels before training
starts. Heavy packages are imported inside functions: with a warm cache no rank needs them.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import near
from ..errors import UserError
from ..exact.order import key
from .cache import hash_files

Data = str | Mapping[str, str]

SPLITS = ("train", "validation", "test")
# Their usual names.
_ALIASES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
_READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def check_data(data: Any, config_name: str | None = None) -> None:
    """Raises UserError unless an option `data` is a path or name, or {split: path or name}."""
    parts = data if isinstance(data, Mapping) and data else {"": data}
    if not all(isinstance(part, str) and part for part in parts.values()):
        raise UserError(
            f'"trainer.task_options.data" is {data!r}. It must be a file, a folder or a name on the dataset hub, or '
            '{"train": ..., "validation": ..., "test": ...} of such.'
        )
    if config_name is not None and all(Path(part).expanduser().exists() for part in parts.values()):
        raise UserError('"trainer.task_options.config_name" has an effect only on datasets of the hub.')


def fingerprint(data: Data) -> str | None:
    """A hash of everything that local files and folders contain; None for a hub name, whose content is elsewhere.

    Raises:
        UserError: it looks like a path, but nothing is there.
    """
    if isinstance(data, Mapping):
        parts = {name: fingerprint(part) for name, part in data.items()}
        return None if None in parts.values() else json.dumps(parts, sort_keys=True)
    path = Path(data).expanduser()
    if path.exists():
        return hash_files(path)
    if path.suffix in _READERS or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise UserError(f'"trainer.task_options.data": {data} does not exist (looked from {Path.cwd()}).')
    return None


def read(data: Data, *, config_name: str | None = None, split_column: str | None = None) -> dict[str, Any]:
    """The splits of a dataset: {"train": datasets.Dataset, ...}, with "validation" and "test" where there are any.

    Args:
        data: a csv, tsv, json, jsonl, parquet or text file; a folder of such, of class folders of images, or one that
            `save_to_disk` wrote; a dataset's name on the hub; or {split: file or folder}.
        config_name: which configuration of a hub dataset.
        split_column: the column of a single table that names each row's split; without it, a column "split" whose
            values are names of splits is taken.

    Raises:
        UserError: nothing is there, it cannot be read, or there is no split for training.
    """
    if isinstance(data, Mapping):
        tables: dict[str, Any] = {}
        for name, part in data.items():
            if name not in SPLITS:
                raise UserError(f'"trainer.task_options.data" names the split "{name}". {near(name, SPLITS)}')
            found = _load(part, config_name)
            if len(found) > 1 and name not in found:
                raise UserError(f'"trainer.task_options.data.{name}": {part} holds the splits {", ".join(found)}.')
            tables[name] = found[name] if name in found else next(iter(found.values()))
    else:
        tables = _load(data, config_name)
    if list(tables) == ["train"]:
        tables = _by_column(tables["train"], split_column)
    elif split_column is not None:
        raise UserError(
            f'"trainer.task_options.split_column" has no effect: {data} has splits already: {", ".join(tables)}.'
        )
    named: dict[str, Any] = {}
    for name, table in tables.items():
        known = _ALIASES.get(name.lower())
        if known is not None and known not in named:
            named[known] = table
    if "train" not in named:
        raise UserError(
            f'"trainer.task_options.data": {data} has no split for training, only {", ".join(tables) or "nothing"}.\n'
            'Name the files: "data": {"train": "a.csv", "test": "b.csv"}.'
        )
    for name, table in named.items():
        if len(table) == 0:
            raise UserError(f'"trainer.task_options.data": the split {name} of {data} is empty.')
    return {name: named[name] for name in SPLITS if name in named}


def text_files(data: Data) -> dict[str, list[str]] | None:
    """{split: the contents of its files} of a text file, a folder of such, or {split: such}; None for other data.

    In a folder, files and folders with the names of splits (train.txt, valid.txt, ...) are these splits; else all
    files are for training. Contents are as they are, ends of lines included.

    Raises:
        UserError: a file is empty or not UTF-8, or only some of a folder's files have names of splits.
    """
    if isinstance(data, Mapping):
        parts = {name: text_files(part) for name, part in data.items()}
        if all(part is None for part in parts.values()):
            return None
        for name, part in parts.items():
            if name not in SPLITS:
                raise UserError(f'"trainer.task_options.data" names the split "{name}". {near(name, SPLITS)}')
            if part is None:
                raise UserError(f'"trainer.task_options.data.{name}": {data[name]} holds no text files, but others do.')
        if "train" not in parts:
            raise UserError(f'"trainer.task_options.data" has no split "train", only {", ".join(parts)}.')
        return {name: [t for texts in (part or {}).values() for t in texts] for name, part in parts.items()}
    path = Path(data).expanduser()
    if path.is_file():
        return {"train": [_text_of(path)]} if path.suffix.lower() == ".txt" else None
    files = sorted(path.rglob("*.txt")) if path.is_dir() else []
    if not files or any(p.suffix.lower() in _READERS and p.suffix.lower() != ".txt" for p in path.rglob("*")):
        return None
    names = {file: _ALIASES.get(file.relative_to(path).with_suffix("").parts[0].lower()) for file in files}
    named = [file for file, name in names.items() if name is not None]
    if named and len(named) < len(files):
        other = next(file for file in files if file not in named)
        raise UserError(
            f'"trainer.task_options.data": in {data}, {named[0].relative_to(path)} is named like a split, but '
            f"{other.relative_to(path)} is not. Name all of them so, or none."
        )
    if named and "train" not in names.values():
        raise UserError(f'"trainer.task_options.data": {data} has no split for training (train.txt or train/).')
    result: dict[str, list[str]] = {}
    for file in files:
        result.setdefault(names[file] or "train", []).append(_text_of(file))
    return {name: result[name] for name in SPLITS if name in result}


def _text_of(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f'"trainer.task_options.data": {path} is not UTF-8 text: byte {error.start:,} is '
            f"0x{error.object[error.start]:02x}."
        ) from error
    if not content:
        raise UserError(f'"trainer.task_options.data": {path} is empty.')
    return content


def _load(source: str, config_name: str | None) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it logs, it raises as well
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry, from each rank
    path = Path(source).expanduser()
    try:
        if path.is_file():
            reader = _READERS.get(path.suffix.lower())
            if reader is None:
                raise UserError(
                    f'"trainer.task_options.data": {source} is a {path.suffix or "nameless kind of"} file. '
                    f"Files may be {', '.join(_READERS)}."
                )
            extra = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
            result = datasets.load_dataset(reader, data_files={"train": str(path)}, **extra)
        elif path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            result = datasets.load_from_disk(str(path))
        elif path.is_dir():
            result = datasets.load_dataset(str(path.resolve()))
        else:
            result = datasets.load_dataset(source, config_name)
    except UserError:
        raise
    except Exception as error:  # of a dozen kinds, by file format and kind of failure
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if path.exists():
            cause = error.__cause__ or error.__context__
            detail = f" ({str(cause).strip().splitlines()[0]})" if cause is not None and str(cause).strip() else ""
            raise UserError(f'"trainer.task_options.data": {source} cannot be read: {reason}{detail}') from error
        raise UserError(
            f'"trainer.task_options.data": "{source}" is no file or folder here, and as a name on the dataset hub it '
            f"cannot be loaded: {reason}\nWithout a network, give a local file or folder: csv, json lines, parquet, "
            "class folders of images, or what datasets' save_to_disk writes."
        ) from error
    return dict(result) if isinstance(result, datasets.DatasetDict) else {"train": result}


def _by_column(table: Any, split_column: str | None) -> dict[str, Any]:
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
    if split_column is None and not all(isinstance(n, str) and n.lower() in _ALIASES for n in names):
        return {"train": table}
    of = np.array([str(v) for v in values])
    return {str(name): table.select(np.flatnonzero(of == str(name))) for name in names}


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


def npz_arrays(path: Path) -> Any:
    """An open .npz of plain arrays: {name: array}, each read when asked for; `files` names them. Raises UserError."""
    try:
        file = np.load(path, allow_pickle=False)
    except Exception as error:  # zip files, their compressions and numpy have a dozen kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if "pickle" in reason:
            reason = "it is neither a zip file of arrays nor an array"
        raise UserError(f"{path} cannot be read as an .npz of plain arrays: {reason}") from error
    if not hasattr(file, "files"):
        raise UserError(f"{path} holds one plain array. Write it with numpy.savez(file, x=images, y=labels).")
    return file


def npz_array(path: Path, file: Any, name: str) -> np.ndarray:
    """One array of an open .npz. Raises UserError, also for one of Python objects: they are never unpickled."""
    try:
        entry = next((i for i in file.zip.infolist() if i.filename in (name, f"{name}.npy")), None)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if entry is not None and entry.file_size > memory:  # a compressed array of zeros is small on disk
            raise UserError(f"{path}: {name} would take {entry.file_size:,} bytes of this machine's {memory:,}.")
        array = file[name]
    except UserError:
        raise
    except Exception as error:  # as above
        if "pickle" in str(error):
            raise UserError(
                f"{path}: {name} is an array of Python objects. It is stored pickled and is not loaded, because "
                "it could run code.\nSave plain arrays of numbers; labels and names may be whole numbers or strings."
            ) from error
        raise UserError(f"{path}: {name} cannot be read: {str(error) or type(error).__name__}") from error
    if not isinstance(array, np.ndarray):  # a zip file may hold other files, too
        raise UserError(f"{path}: {name} is not an array.")
    return array


def values_of(table: Any, column: str, split: str) -> list[Any]:
    """A column of a datasets table. Raises UserError, such as for texts in a parquet file that are not UTF-8."""
    try:
        return list(table[column][:])
    except Exception as error:  # pyarrow's and Python's own
        raise UserError(f'The column "{column}" in {split} cannot be read: {error}') from error


def texts(table: Any, column: str, split: str) -> list[str]:
    """A column of texts of a datasets table, complete. Raises UserError."""
    return as_texts(values_of(table, column, split), split, column)


def as_texts(values: Sequence[Any], split: str, column: str) -> list[str]:
    """Values that must be texts, and complete. Raises UserError, with the first row that is not."""
    check_complete(values, split, column)
    row = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
    if row is not None:
        raise UserError(
            f'The column "{column}" in {split} must hold texts, but row {row} is {str(values[row])[:50]!r} '
            f"({type(values[row]).__name__})."
        )
    return list(values)


def declared_names(table: Any, column: str) -> list[str] | None:
    """The names of classes that a dataset declares for a column of numbers (datasets.ClassLabel), or None."""
    names = getattr(table.features[column], "names", None)
    return None if names is None else [str(name) for name in names]


def labels(table: Any, column: str, split: str) -> list[Any]:
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
            f"{values[wrong[0]]}, which is none of the {len(names)} classes (row {wrong[0]}, counted from 0). "
            "Hub datasets mark samples without a label in this way. Leave that split out, or drop such rows."
        )
    return [names[value] for value in values]


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
        rows = ", ".join(str(row) for row in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f'{len(missing)} value{"s" * (len(missing) > 1)} of the column "{column}" in {split} '
            f"{'are' if len(missing) > 1 else 'is'} missing (row{'s' * (len(missing) > 1)} {rows}, counted from 0). "
            "Fill or drop such rows."
        )


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
        odd = next((v for v in values if not isinstance(v, (bool, int, str, np.integer))), None)
        if odd is not None:
            raise UserError(f"A label in {split} is {odd!r}. {_other_labels(odd)}")
    train = Counter(labels["train"])
    for split, values in labels.items():
        unknown = Counter(v for v in values if v not in train)
        if unknown:
            label, count = unknown.most_common(1)[0]
            raise UserError(
                f"The label {label!r} occurs {count} time{'s' * (count > 1)} in {split}, but never in train, so no "
                f"model can learn it ({len(unknown)} such label{'s' * (len(unknown) > 1)}). "
                f"Train has: {', '.join(str(v) for v in sorted(train, key=str)[:20])}."
            )
    if len({isinstance(v, str) for v in train}) > 1:
        raise UserError("Some labels in train are numbers and some are strings. Use one kind.")
    if len(train) < 2:
        raise UserError(f"All labels in train are {next(iter(train))!r}. A classifier needs at least two classes.")
    if given is not None:
        return list(given)
    return [str(value) for value in sorted(train)]


def _other_labels(value: Any) -> str:
    """What to do with labels that are no classes."""
    if isinstance(value, (list, tuple, set, np.ndarray, Mapping)):
        return (
            "Several labels a sample (multi-label) are not what this task trains: a label is one whole number or text. "
            "Choose one, or write a task of your own with a sigmoid and a binary cross-entropy for each class "
            "(trainer/tasks/README.md, Your own task)."
        )
    if isinstance(value, (float, np.floating)):
        return (
            "Predicting numbers (regression) is not what this task trains: a label is a whole number or a text, the "
            "name of a class. Make them classes, or write a task of your own with a squared error "
            "(trainer/tasks/README.md, Your own task)."
        )
    return "Labels are whole numbers or texts."


def label_numbers(values: Sequence[Any], names: Sequence[str], declared: bool) -> np.ndarray:
    """(rows,) int64 positions in `names`; `declared` if labels are such positions already."""
    if declared:
        return np.asarray(values, dtype=np.int64)
    place = {name: i for i, name in enumerate(names)}
    return np.array([place[str(value)] for value in values], dtype=np.int64)


def hold_out(count: int, fraction: float, seed: int, labels: np.ndarray | None = None) -> np.ndarray:
    """The rows of a training set that become validation: (n,) sorted int64. Only `seed` determines the choice.

    Args:
        count: the number of rows.
        fraction: the fraction of them to hold out; with labels, of each class (at least one row of any class
            that has two).
        seed: `split_seed`, the same whatever the run's seed.
        labels: (count,) int64.
    """
    rng = np.random.default_rng(key(seed, "hold out"))
    groups = [np.arange(count)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    taken = []
    for rows in groups:
        wanted = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
        taken.append(rng.permutation(rows)[:wanted])
    return np.sort(np.concatenate(taken))


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


def lines_of(source: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file to predict on: csv, tsv, json lines, parquet, or a text a line. Raises UserError."""
    if not source.is_file():
        raise UserError(f"--input {source} is not a file here (looked from {Path.cwd()}).")
    table = _load(str(source), None)["train"]
    try:
        yield from table
    except (ValueError, OSError) as error:
        raise UserError(f"--input {source} cannot be read: {error}") from error


def rows_of(source: Path) -> list[dict[str, Any]]:
    """All rows of a file to predict on, at least one. Raises UserError."""
    rows = list(lines_of(source))
    if not rows:
        raise UserError(f"--input {source} holds no rows.")
    return rows
