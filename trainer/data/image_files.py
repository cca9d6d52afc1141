"""Which files are images, and folders of images as tables: in folders of classes, or described by a metadata file.

Training and prediction ask `is_image`, so that both read the same files.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from . import sources
from .sources import Found
from .table_files import Table, read_file

# Files with these suffixes are meant to be images. If Pillow cannot read one, that is an error.
SUFFIXES = (".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
            ".jpg", ".jxl", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")  # fmt: skip
# Any other file is an image if its content is of one of these kinds.
_KINDS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def is_image(file: Path) -> bool:
    """Whether a file is an image: by its suffix, or, with another suffix or none, by its content."""
    suffix = file.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix in (*sources.READERS, ".npz"):
        return False
    from PIL import Image

    Image.init()
    try:
        with Image.open(file, formats=[kind for kind in _KINDS if kind in Image.OPEN]):
            return True
    except Exception:  # Pillow's readers raise a dozen kinds
        return False


def images_of(found: Found) -> tuple[list[Path], list[Path]]:
    """The files that are images, and the others."""
    images = [file for file in found.files if is_image(file)]
    return images, found.others(images)


def image_folder(found: Found) -> dict[str, Table] | None:
    """The splits of a folder of images, as tables of paths and labels; None if it holds no images.

    Raises:
        UserError: the images have no classes, or a metadata file names others.
    """
    images, others = images_of(found)
    if not images:
        return None
    described = [f for f in others if sources.stem_of(f) == "metadata" and sources.suffix_of(f) in sources.TABLES]
    if described:
        return _described(found, images, described, others)
    groups, loose = sources.by_class(found, images)
    if not groups:
        raise UserError(
            f'"trainer.task_options.data": the images of {found.given} have no labels.\nPut each class\'s images into '
            "a folder of its own, or add a file metadata.csv with the columns file_name and label."
        )
    if "train" in groups and len(only := set(groups["train"].classes)) == 1:
        raise UserError(
            f'"trainer.task_options.data": all images of {found.given} lie in one folder, {only.pop()}, which would be '
            "the only class. A classifier needs at least two classes.\nIf the folders of the classes lie in it, give "
            "that folder."
        )
    result = {}
    for split, group in groups.items():
        names = sorted(set(group.classes))
        place = {name: i for i, name in enumerate(names)}
        columns = {"image": [str(file) for file in group.files], "label": [place[name] for name in group.classes]}
        result[split] = Table(columns, {"label": names}, ["image"])
    notes = sources.left_out_note(found, [*loose, *others], "no image in a folder of a class")
    notes += sources.twins_note(found, [file for group in groups.values() for file in group.files])
    next(iter(result.values())).notes += notes
    return result


def _described(
    found: Found, images: Sequence[Path], described: Sequence[Path], others: Sequence[Path]
) -> dict[str, Table]:
    """Images whose labels stand in metadata files, in the folder of the images or of a split."""
    if pairs := sources.twins(found, described):
        raise UserError(
            f'"trainer.task_options.data": in {found.given}, {" and ".join(map(found.name, pairs[0]))} describe the '
            "same images, which would count twice. Remove one of them."
        )
    known = {os.path.normpath(file): str(file) for file in images}
    splits: dict[str, Table] = {}
    used: set[str] = set()
    for file in described:
        table = read_file(file)
        if "file_name" not in table.columns:
            raise UserError(
                f'"trainer.task_options.data": {file} needs the column file_name. It has: '
                f"{', '.join(table.column_names)}."
            )
        paths = [os.path.normpath(file.parent / str(name)) for name in table.values("file_name")]
        lost = next((path for path in paths if path not in known), None)
        if lost is not None:
            raise UserError(f'"trainer.task_options.data": {file} names {lost}, which is no image in {found.given}.')
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
            columns = {"image": [paths[row] for row in rows]}
            columns |= {name: part.values(name) for name in part.columns if name != "file_name"}
            if split in splits:
                if list(splits[split].columns) != list(columns):
                    raise UserError(
                        f'"trainer.task_options.data": the metadata files of {found.given} differ in their columns.'
                    )
                for name, values in columns.items():
                    splits[split].columns[name] += values
            else:
                splits[split] = replace(part, columns=columns, images=["image"], notes=list(table.notes))
        used |= set(paths)
    rest = found.others([*map(Path, used), *described])
    notes = sources.left_out_note(found, rest, "not named by the metadata")
    next(iter(splits.values())).notes += notes
    return sources.in_order(splits)
