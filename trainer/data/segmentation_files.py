"""Folders of images and of their masks: which mask belongs to which image, and to which split.

A word in a folder's name says that it holds images or masks (images, train_masks, ...), wherever the folder lies. A
mask has the name of its image, perhaps with _mask, _label or the like at its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..wording import counted
from . import sources
from .image_files import is_image
from .sources import Found

IMAGES = ("image", "images", "img", "imgs", "input", "inputs", "scans", "volumes")
MASKS = ("mask", "masks", "label", "labels", "annotation", "annotations", "target", "targets", "seg", "segmentation",
         "segmentations", "gt")  # fmt: skip
_MASKS_END = re.compile(r"[-_. ](masks?|labels?|seg|segmentation|gt|annotations?|matte)$", re.IGNORECASE)
# Kinds of medical images that other libraries read.
_MEDICAL = (".nii", ".dcm", ".mha", ".mhd", ".nrrd")

Pairs = list[tuple[Path, Path]]
# What is the same for an image and its mask: the split, the folders below, and the name without its suffix.
_Key = tuple[str, tuple[str, ...], str]


def pairs(found: Found) -> tuple[dict[str, Pairs], list[str]]:
    """The images and masks of a folder: split -> (image, mask) by name, and sentences on what was left out.

    Raises:
        UserError: there are no such folders; or an image has no mask, a mask no image, or one has two.
    """
    images: dict[_Key, list[Path]] = {}
    masks: dict[_Key, list[Path]] = {}
    others = []
    for file in found.files:
        _refuse_medical(file)
        role, key = _place(found, file)
        if role is None or not (file.suffix.lower() == ".npy" or is_image(file)):
            others.append(file)
        else:
            (images if role == "image" else masks).setdefault(key, []).append(file)
    if not images or not masks:
        missing = "images" if not images else "masks"
        raise UserError(
            f'"trainer.task_options.data": no folder of {missing} was found in {found.given}.\nPut images into a '
            "folder called images and their masks into one called masks, each mask with the name of its image, also "
            "with train/, validation/ and test/ above or below them."
        )
    masks = _with_names_of(images, masks)
    for kind, files in (("image", images), ("mask", masks)):
        twice = next((group for group in files.values() if len(group) > 1), None)
        if twice is not None:
            raise UserError(
                f'"trainer.task_options.data": in {found.given}, {" and ".join(map(found.name, twice[:2]))} are both '
                f"the {kind} of one sample. Remove or rename one of them."
            )
    _refuse_single(found, "image", "mask", [group[0] for key, group in images.items() if key not in masks])
    _refuse_single(found, "mask", "image", [group[0] for key, group in masks.items() if key not in images])
    splits: dict[str, Pairs] = {}
    for key, (image,) in images.items():
        splits.setdefault(key[0], []).append((image, masks[key][0]))
    if "train" not in splits:
        raise UserError(
            f'"trainer.task_options.data": {found.given} has the splits {", ".join(splits)}, but none for training. '
            "Call its folder train."
        )
    return sources.in_order(splits), sources.left_out_note(found, others, "no image in a folder of images or masks")


def images_alone(found: Found, files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The files to predict on, and sentences on what is left out.

    If there are folders of images and of masks, as for training, these are the files in folders of images. Otherwise
    they are all files.
    """
    roles = [_place(found, file)[0] for file in files]
    if not {"image", "mask"} <= set(roles):
        return list(files), []
    taken = [file for file, role in zip(files, roles) if role == "image"]
    folders = sorted({found.name(file.parent) for file in taken})
    which = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
    rest = len(files) - len(taken)
    return taken, [
        f"{found.given} has folders of images and of masks: predictions are for the images alone ({which}). "
        f"{counted(rest, 'other file')} {'are' if rest != 1 else 'is'} left out"
    ]


def _refuse_medical(file: Path) -> None:
    if sources.suffix_of(file) in _MEDICAL:
        raise UserError(
            f'"trainer.task_options.data": {file} is a medical image of a kind that is not read here. Save images and '
            'masks as arrays of numpy, for example numpy.save("scan.npy", '
            'nibabel.load("scan.nii.gz").get_fdata(dtype="float32")).'
        )


def _place(found: Found, file: Path) -> tuple[str | None, _Key]:
    """Whether a file is an image or a mask (None for neither), and what it has in common with its partner."""
    role, split, rest = None, "train", []
    for folder in found.parts(file)[:-1]:
        words = set(re.split(r"[^a-z]+", folder.lower()))
        own = "image" if words & set(IMAGES) else "mask" if words & set(MASKS) else None
        if own is not None:
            role = own
        named = sources.split_of(folder) or (sources.split_in(folder) if own is not None else None)
        if named is not None:
            split = named
        if own is None and named is None:
            rest.append(folder)
    return role, (split, tuple(rest), file.stem)


def _with_names_of(images: dict[_Key, list[Path]], masks: dict[_Key, list[Path]]) -> dict[_Key, list[Path]]:
    """The masks by the keys of their images: without _mask and the like at the end, if no image has the whole name."""
    result: dict[_Key, list[Path]] = {}
    for key, files in masks.items():
        split, rest, stem = key
        result.setdefault(key if key in images else (split, rest, _MASKS_END.sub("", stem)), []).extend(files)
    return result


def _refuse_single(found: Found, kind: str, partner: str, files: Sequence[Path]) -> None:
    if not files:
        return
    many = len(files) > 1
    shown = ", ".join(map(found.name, files[:5])) + (", ..." if len(files) > 5 else "")
    raise UserError(
        f'"trainer.task_options.data": in {found.given}, {len(files):,} {kind}{"s have" if many else " has"} no '
        f"{partner}: {shown}.\nA mask has the name of its image, such as images/a.png and masks/a.png. Add what is "
        f"missing, or remove the {kind}{'s' * many}."
    )
