"""What is wrong with a task's name, its files or their columns, found before torch and DeepSpeed are imported.

It looks only at names and the beginnings of files, and refuses only what is certainly wrong. What needs a closer look
is left to the task, which reads the data anyway.
"""

from __future__ import annotations

import ast
import csv
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.schema import near
from ..data.conll import NO_LISTS
from ..errors import UserError

# The tasks that come with the trainer: files of this folder, each of which calls its task TASK.
BUILT_IN = (
    "audio_classification",
    "causal_lm",
    "digits",
    "image_classification",
    "image_segmentation",
    "nodules",
    "tabular",
    "text_classification",
    "token_classification",
)
# Names that columns usually have, the likeliest first.
TEXT_COLUMNS = ("text", "sentence", "content", "document", "review", "question", "comment", "body", "title", "tweet")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "intent", "sentiment")

_OPTION = "trainer.task_options."
_COLUMNS = (
    "text_column",
    "pair_column",
    "label_column",
    "prompt_column",
    "completion_column",
    "image_column",
    "audio_column",
    "group_column",
)
_FILE = re.compile(r"\.(csv|tsv|json|jsonl|parquet|txt|npz|gz|zip|sqlite|conllu?|iob2?|bio)$", re.IGNORECASE)
# Columns are not looked for in larger json files: it would take longer than importing torch.
_MOST_BYTES = 5_000_000


def look(task: str, options: Mapping[str, Any]) -> None:
    """Raises UserError if a config names a task, a file or a column that is not there, with the flag to type.

    Args:
        task: `trainer.task`.
        options: `trainer.task_options`.
    """
    if ":" in task or task.endswith(".py"):
        _look_at_code(task)
        return
    if task not in BUILT_IN:
        raise UserError(
            f'unknown task "{task}". {_typed("--task ", near(task, BUILT_IN))} Your own is given as '
            "path/to/file.py:ClassName."
        )
    if task in ("digits", "nodules"):
        return
    data = options.get("data")
    parts = {f"data.{name}": part for name, part in data.items()} if isinstance(data, Mapping) else {"data": data}
    for option, part in parts.items():
        if isinstance(part, str):
            _look_at_path(option, part, is_file=_FILE.search(part) is not None)
            _look_for_rows(option, Path(part).expanduser())
            if task == "token_classification" and part.lower().endswith(".csv"):
                raise UserError(f'"{_OPTION}{option}" is {part}. {NO_LISTS}')
    model = options.get("model")
    if isinstance(model, str):
        _look_at_path("model", model, is_file=False)
    train = parts.get("data.train", parts.get("data"))
    if isinstance(train, str):
        _look_at_columns(task, Path(train).expanduser(), options)


def task_file(task: str) -> tuple[Path, str]:
    """The file and the class of a task that is given as path/to/file.py:ClassName. Raises UserError."""
    file, _, name = task.rpartition(":")
    if not file or not name:
        raise UserError(f'The task "{task}" must be given as path/to/file.py:ClassName.')
    path = Path(file)
    if not path.is_file():
        found = _nearest(path)
        raise UserError(
            f"The task file {path} does not exist (looked from {Path.cwd()})."
            + (f" There is {found}: --task {found}:{name}" if found else "")
        )
    return path, name


def _look_at_code(task: str) -> None:
    """As `protocol.load_task`, without running the file."""
    path, name = task_file(task)
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # the import gives a message with the line
    names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    imported = any(isinstance(node, (ast.ImportFrom, ast.Assign)) for node in tree.body)
    if name not in names and not (imported and re.search(rf"\b{re.escape(name)}\b", path.read_text(errors="ignore"))):
        if any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in tree.body):
            return
        raise UserError(f"The task file {path} has no class {name}. {_typed(f'--task {path}:', near(name, names))}")


def _typed(flag: str, said: str) -> str:
    """What `near` says, and what to type where it has found a name."""
    found = re.fullmatch(r'Did you mean "(.+)"\?', said)
    return said if found is None else f"{said} Type {flag}{found[1]}."


def _look_at_path(option: str, text: str, *, is_file: bool) -> None:
    path = Path(text).expanduser()
    # Anything else may be a name on a hub, or a pattern.
    certain = is_file or text.startswith((".", "/", "~")) or text.count("/") > 1
    if not certain or re.search(r"[*?]", text) or path.exists():
        return
    found = _nearest(path)
    flag = f"--set {_OPTION}{option}="
    raise UserError(
        f'"{_OPTION}{option}": {text} does not exist (looked from {Path.cwd()}). '
        + (f"There is {found}: {flag}{found}" if found else f"Give its path: {flag}PATH")
    )


def _look_for_rows(option: str, path: Path) -> None:
    """Raises UserError for an empty file, and for a csv file with a header alone."""
    if not path.is_file() or _FILE.search(path.name) is None:
        return
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError:
        return  # the task gives a message with the reason
    if not start.strip():
        raise UserError(f'"{_OPTION}{option}": {path} is empty.')
    header_alone = len(start) < 1 << 16 and not start.strip().count(b"\n") and not start.strip().count(b"\r")
    if path.suffix.lower() == ".csv" and header_alone:
        raise UserError(
            f'"{_OPTION}{option}": {path} has a single line, {start.decode(errors="replace").strip()[:60]!r}. '
            "The first line names the columns, so there are no samples."
        )


def _nearest(path: Path) -> Path | None:
    """The file or folder beside a path whose name is nearest to it."""
    try:
        names = sorted(other.name for other in path.parent.iterdir())
    except OSError:
        return None
    found = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return path.parent / found[0] if found else None


def _look_at_columns(task: str, path: Path, options: Mapping[str, Any]) -> None:
    given = {option: options[option] for option in _COLUMNS if isinstance(options.get(option), str)}
    suffix = path.suffix.lower()
    if not path.is_file() or suffix not in (".csv", ".tsv", ".json", ".jsonl"):
        return
    columns = _header(path, suffix, options, set(given.values()))
    if columns is None:
        return
    for option, column in given.items():
        if column not in columns:
            raise _no_column(option, columns, f'the data has no column "{column}".', column)
    if task not in ("tabular", "text_classification") or suffix not in (".csv", ".tsv"):
        return
    lower = [column.lower() for column in columns]
    several = options.get("label_columns") or []
    missing = [c for c in several if c not in columns] if isinstance(several, list) else []
    if missing:
        raise UserError(
            f'"{_OPTION}label_columns": the data has no column "{missing[0]}". {near(missing[0], columns)} It has: '
            f"{', '.join(columns)}."
        )
    if options.get("problem_type") == "multi_label_classification":
        return  # of columns of 0 and 1, the task says which there are
    if "label_column" not in given and not set(lower) & set(LABEL_COLUMNS):
        raise _no_column("label_column", columns, "which column holds the labels?")
    if task == "text_classification" and "text_column" not in given and not set(lower) & set(TEXT_COLUMNS):
        known = {given.get("label_column"), given.get("pair_column"), options.get("split_column") or "split"}
        others = [c for c in columns if c not in known and c.lower() not in LABEL_COLUMNS]
        if len(others) != 1:
            raise _no_column("text_column", columns, "which column holds the texts?")


def _no_column(option: str, columns: list[str], problem: str, column: str = "") -> UserError:
    close = difflib.get_close_matches(column.lower(), [c.lower() for c in columns], n=1, cutoff=0.6)
    found = next((c for c in columns if [c.lower()] == close), None)
    flag = f"--set {_OPTION}{option}="
    return UserError(
        f'"{_OPTION}{option}": {problem} It has: {", ".join(columns)}.\n'
        + (f"Perhaps {flag}{found}" if found else f"Name it: {flag}COLUMN")
    )


def _header(path: Path, suffix: str, options: Mapping[str, Any], wanted: set[str]) -> list[str] | None:
    """The columns of a table; None if the beginning of the file does not tell for certain."""
    try:
        if suffix in (".json", ".jsonl"):
            return _json_keys(path, wanted)
        if options.get("encoding") is not None:
            return None
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline(1 << 16)
    except (OSError, ValueError):
        return None
    separator = options.get("separator") or ("\t" if suffix == ".tsv" else ",")
    if not isinstance(separator, str) or len(separator) != 1 or not line.strip() or line.count('"') % 2:
        return None
    # Other marks in it may be the separator, too.
    if options.get("separator") is None and (set(";\t|,") - {separator}) & set(line):
        return None
    columns = [name.strip() for name in next(csv.reader([line], delimiter=separator))]
    return columns if all(columns) else None


def _json_keys(path: Path, wanted: set[str]) -> list[str] | None:
    """The keys of a json file's records, of the first one only if it has those that are wanted; None if unclear."""
    with path.open("rb") as file:
        first = json.loads(file.readline(1 << 20))
    if not isinstance(first, dict) or "columns" in first or path.stat().st_size > _MOST_BYTES:
        return None  # with "columns", their names stand in a list (pandas, orient="split")
    if wanted <= set(first):
        return list(first)
    keys = re.findall(r'"((?:[^"\\]|\\.)*)"\s*:', path.read_text(encoding="utf-8"))
    return list(dict.fromkeys([*first, *keys]))
