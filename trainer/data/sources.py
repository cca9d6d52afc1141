"""Where data lies: a path, a pattern or a hub name as files, the split of each file, and a hash of the content.

A path is a path. It is a pattern only if nothing has exactly that name. Links are followed. Splits come from the names
of folders, and of files that hold tables or corpora. They never come from the names of classes or images.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..config.schema import near
from ..errors import UserError
from . import not_data
from .cache import remember

Data = str | Mapping[str, str]
Part = TypeVar("Part")

SPLITS = ("train", "validation", "test")
# Their usual names.
ALIASES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"
)
COMPRESSED = (".gz", ".bz2", ".xz")
TABLES = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
          ".parquet": "parquet"}  # fmt: skip
READERS = TABLES | {".txt": "txt"}
# Suffixes of files, and so of no name on the dataset hub.
_OF_FILES = (*READERS, ".npz", ".conll", ".conllu", ".iob", ".iob2", ".bio")
# Files that the system keeps in folders. They are left out without a note.
_SYSTEM = (".ds_store", "thumbs.db", "desktop.ini")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The number of a part: train-00000-of-00002.parquet, train_3.csv.
_PART = re.compile(r"(-\d+-of-\d+|[-_. ]?\d+)$")


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


def check_split_name(name: str) -> None:
    """Raises UserError unless a key of an option `data` names a split."""
    if name not in SPLITS:
        alias = ALIASES.get(name.lower())
        meant = near(name, SPLITS) if alias is None else f'Did you mean "{alias}"?'
        raise UserError(f'"trainer.task_options.data" names the split "{name}". {meant}')


@dataclass(frozen=True)
class Found:
    """The files that `data` names.

    Attributes:
        given: what the user wrote.
        root: the folder that names of files are relative to.
        files: by name; links are followed.
        single: the user named one file, not a folder or a pattern.
        hidden: how many files were left out because their names, or those of their folders, begin with a dot.
        aside: files that were left out because they hold settings or descriptions.
    """

    given: str
    root: Path
    files: list[Path]
    single: bool = False
    hidden: int = 0
    aside: Sequence[Path] = ()

    def parts(self, file: Path) -> tuple[str, ...]:
        """The names of the folders below `root`, and of the file."""
        return file.relative_to(self.root).parts

    def name(self, file: Path) -> str:
        """A file, for messages. Names that are no UTF-8 are written with question marks."""
        return "/".join(self.parts(file)).encode("utf-8", "replace").decode()

    def others(self, chosen: Iterable[Path]) -> list[Path]:
        """The files that are none of these."""
        known = set(chosen)
        return [file for file in self.files if file not in known]

    @property
    def saved(self) -> bool:
        """Whether this is a folder that datasets' save_to_disk wrote."""
        return not self.single and any((self.root / name).is_file() for name in ("dataset_dict.json", "state.json"))


def find(given: str) -> Found | None:
    """The files of a path or a pattern; None for what can be a name on the dataset hub.

    Raises:
        UserError: nothing is there, and it is no hub name; or a folder cannot be read.
    """
    path = Path(given).expanduser()
    if path.is_file():
        if not_data.is_config(path):
            raise UserError(
                f'"trainer.task_options.data": {given} is a config of DeepSpeed or of this trainer, not data. Name the '
                "file or folder that holds the samples: --set trainer.task_options.data=PATH"
            )
        return Found(given, path.parent, [path], single=True)
    if path.is_dir():
        return _walk(given, path)
    if glob.has_magic(given):
        files = sorted((Path(f) for f in glob.glob(str(path), recursive=True) if os.path.isfile(f)), key=str)
        if files:
            return _without_settings(given, Path(os.path.commonpath([file.parent for file in files])), files)
        raise UserError(
            f'"trainer.task_options.data": no file has the name {given}, or matches it as a pattern (looked from '
            f"{Path.cwd()})."
        )
    if _HUB_NAME.fullmatch(given) and suffix_of(path) not in _OF_FILES and not given.startswith("."):
        return None
    raise UserError(f'"trainer.task_options.data": {given} does not exist (looked from {Path.cwd()}).')


def _walk(given: str, root: Path) -> Found:
    files: list[Path] = []
    hidden = 0

    def enter(folder: Path, above: tuple[str, ...], shown: bool) -> None:
        nonlocal hidden
        real = os.path.realpath(folder)
        if real in above:  # a link to a folder above itself: following it would never end
            return
        try:
            entries = sorted(folder.iterdir(), key=str)
        except OSError as error:
            raise UserError(
                f'"trainer.task_options.data": {folder} cannot be read: {error.strerror or error}.'
            ) from error
        for entry in entries:
            own = shown and not entry.name.startswith(".") and entry.name not in ("__MACOSX", "__pycache__")
            if entry.is_dir() and not_data.is_of_a_run(entry):
                continue
            if entry.is_dir():
                enter(entry, (*above, real), own)
            elif not own or entry.name.lower() in _SYSTEM:
                hidden += entry.name.lower() not in _SYSTEM
            elif entry.is_file():
                files.append(entry)
            elif entry.is_symlink():
                raise UserError(
                    f'"trainer.task_options.data": {entry} is a link to {os.readlink(entry)}, which is not there.'
                )

    enter(root, (), True)
    return _without_settings(given, root, sorted(files, key=str), hidden)


def _without_settings(given: str, root: Path, files: Sequence[Path], hidden: int = 0) -> Found:
    aside = [file for file in files if not_data.is_beside_data(file, root)]
    others = set(aside)
    return Found(given, root, [file for file in files if file not in others], hidden=hidden, aside=aside)


def suffix_of(path: Path) -> str:
    """The suffix in lower case, without that of a compression: ".csv" of a.CSV.gz."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def fingerprint(data: Data) -> str | None:
    """A hash of everything that local files and folders contain; None for a hub name, whose content is elsewhere.

    It covers suffixes, because they say how a file is read, and the names of the files in a folder, because they may
    be classes. The file system's times and sizes have no part in it: `rsync -t` and `cp -p` keep them when the content
    changes.

    Raises:
        UserError: it looks like a path, but nothing is there; or a file cannot be read.
    """
    if isinstance(data, Mapping):
        parts = {name: fingerprint(part) for name, part in data.items()}
        return None if None in parts.values() else json.dumps(parts, sort_keys=True)
    found = find(data)
    if found is None:
        return None
    total = hashlib.sha256()
    for file in found.files:
        name = "".join(file.suffixes[-2:]).lower() if found.single else str(file.relative_to(found.root))
        try:
            content = _sha256(file)
        except OSError as error:
            raise UserError(
                f'"trainer.task_options.data": {file} cannot be read: {error.strerror or error}.'
            ) from error
        total.update(os.fsencode(name) + b"\0" + content)
    for file in found.aside:  # their names stand in a note, which is cached
        total.update(os.fsencode(str(file.relative_to(found.root))) + b"\0")
    return remember(total.hexdigest(), lambda: fingerprint(data))


def _sha256(file: Path) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


# --- splits -----------------------------------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """The split that a folder or file is called after: train, Valid, test-00000-of-00002; else None."""
    return ALIASES.get(_PART.sub("", name).lower())


def split_in(name: str) -> str | None:
    """The only split whose name is a word of a name: reviews_train, 20news-bydate-test; else None."""
    found = {ALIASES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in ALIASES}
    return found.pop() if len(found) == 1 else None


def in_order(splits: Mapping[str, Part]) -> dict[str, Part]:
    """The splits as they are always given: train, validation, test."""
    return {name: splits[name] for name in SPLITS if name in splits}


def stem_of(path: Path) -> str:
    """A file's name without its suffixes: train of train.csv.gz."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def by_file(found: Found, files: Sequence[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """The splits of tables or corpora, and the files that belong to none.

    Files and folders that are called train, validation or test (or usual variants of these) are these splits. All
    other files are left out. If there are none, such a word may be a part of the names (reviews_train.csv): if all
    files have one, and train is among them, these are the splits. Otherwise all files are train.

    Raises:
        UserError: only some of the files have such a word in their names, or a split has a file in two formats.
    """
    splits, others = _by_name(found, files)
    for group in splits.values():
        if pairs := twins(found, group):
            one, other, *_ = map(found.name, pairs[0])
            suffix = Counter(file.name[len(stem_of(file)) :] for file in files).most_common(1)[0][0]
            deep = "**/" if any(len(found.parts(file)) > 1 for file in files) else ""
            pattern = f"{glob.escape(str(found.root))}/{deep}*{suffix}"
            raise UserError(
                f'"trainer.task_options.data": in {found.given}, {one} and {other} differ only in their format, so '
                "they seem to hold the same samples, which would count twice.\nTo read one format, type --set "
                f"'trainer.task_options.data={pattern}'. If they hold different samples, rename one of them."
            )
    return splits, others


def _by_name(found: Found, files: Sequence[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    names = {file: (*found.parts(file)[:-1], stem_of(file)) for file in files}
    for one in (split_of, split_in):
        of = {file: next((s for part in parts if (s := one(part))), None) for file, parts in names.items()}
        named = [file for file in files if of[file] is not None]
        if named and (one is split_of or (len(named) == len(files) and "train" in of.values())):
            splits = {s: [file for file in files if of[file] == s] for s in SPLITS}
            return {s: group for s, group in splits.items() if group}, [f for f in files if of[f] is None]
        if len(set(of.values()) - {None}) > 1:
            other = next(file for file in files if of[file] is None)
            raise UserError(
                f'"trainer.task_options.data": in {found.given}, {found.name(named[0])} is named like a split, but '
                f'{found.name(other)} is not.\nName the files: "data": {{"train": "a.csv", "test": "b.csv"}}.'
            )
    return {"train": list(files)}, []


def twins(found: Found, files: Sequence[Path]) -> list[list[Path]]:
    """Groups of files that differ only in their format: a.csv and a.csv.gz, or csv/a.csv and parquet/a.parquet."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    for file in files:
        folders = [part for part in found.parts(file)[:-1] if "." + part.lower() not in READERS]
        groups.setdefault((*folders, stem_of(file)), []).append(file)
    return [group for group in groups.values() if len(group) > 1]


def twins_note(found: Found, files: Sequence[Path]) -> list[str]:
    """A sentence on files of classes that differ only in their format."""
    pairs = twins(found, files)
    if not pairs:
        return []
    return [
        f"{sum(map(len, pairs)):,} files differ from another one only in their format, such as "
        f"{' and '.join(map(found.name, pairs[0][:2]))}. If these hold the same sample, it counts twice: remove one"
    ]


@dataclass(frozen=True)
class ClassFiles:
    """The files of one split in folders of classes, and the class of each."""

    files: list[Path]
    classes: list[str]


def by_class(found: Found, files: Sequence[Path]) -> tuple[dict[str, ClassFiles], list[Path]]:
    """The splits and classes of files in folders, and the files that lie in no class folder.

    The folders at the top are classes, as for torchvision and timm, whatever lies below them. They are splits if all
    are called like splits and folders lie in them, for instance train/cat/1.png.

    Raises:
        UserError: some folders at the top are splits and others are not, or two are the same split.
    """
    import unicodedata

    tops = list(dict.fromkeys(found.parts(file)[0] for file in files if len(found.parts(file)) > 1))
    deep = {found.parts(file)[0] for file in files if len(found.parts(file)) > 2}
    for one in (split_of, split_in):
        named = {top: one(top) for top in tops if one(top)}
        # A folder called train that holds files itself is a class, of vehicles for instance.
        if not any(split == "train" and top in deep for top, split in named.items()):
            continue
        if len(named) == len(tops):
            break
        if one is split_of:
            other = next(top for top in tops if top not in named)
            raise UserError(
                f'"trainer.task_options.data": in {found.given}, the folder {next(iter(named))} is named like a split, '
                f"but {other} is not.\nMove {other} elsewhere, or name the folders of the splits: "
                f'"data": {{"train": "{found.given}/{next(iter(named))}"}}.'
            )
    else:
        named = {}
    if len(set(named.values())) < len(named):
        raise UserError(
            f'"trainer.task_options.data": {found.given} has several folders for one split: {", ".join(named)}.'
        )
    depth = 1 if named else 0
    groups: dict[str, ClassFiles] = {}
    loose = []
    for file in files:
        parts = found.parts(file)
        if len(parts) < depth + 2:
            loose.append(file)
            continue
        group = groups.setdefault((named[parts[0]] or "") if named else "train", ClassFiles([], []))
        group.files.append(file)
        # macOS writes é as two characters, other systems as one. Both must be the same class.
        group.classes.append(unicodedata.normalize("NFC", parts[depth]).encode("utf-8", "replace").decode())
    return in_order(groups), loose


def kinds_of(files: Sequence[Path]) -> str:
    """The most frequent suffixes of files, with their counts: 12 .jpg, 3 without a suffix."""
    kinds = Counter(file.suffix.lower() or "without a suffix" for file in files)
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5))


def left_out_note(found: Found, files: Iterable[Path], why: str) -> list[str]:
    """Sentences on files that are not read: how many, and of what kind or which.

    Args:
        found: where they are.
        files: these.
        why: what each of them is not, for the note ("no image").
    """
    notes = []
    for some, reason in ((list(files), why), (found.aside, "settings or descriptions, not data")):
        if some:
            which = kinds_of(some) + f"; the first is {found.name(some[0])}"
            if len(some) <= 3:
                which = ", ".join(found.name(file) for file in some)
            notes.append(f"{len(some):,} file{'s' * (len(some) > 1)} left out ({reason}): {which}")
    if found.hidden:
        notes.append(f"{found.hidden:,} hidden file{'s' * (found.hidden > 1)} left out (their names begin with a dot)")
    return notes
