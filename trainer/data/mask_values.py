"""The values of masks: which are classes, which do not count, and masks as numbers of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .images import Size

# In an array of numbers of classes, it marks a pixel that does not count.
IGNORED = 255
MOST_CLASSES = 255
# Masks with more different values than this are probably pictures, unless the classes are named.
_LIKELY_CLASSES = 64


@dataclass(frozen=True)
class Classes:
    """The classes of pixels: their names, and the value of each in a mask. The first is the background."""

    names: list[str]
    values: list[int]


def decode_mask(file: Path, size: Size | None) -> np.ndarray:
    """The values of an image file of a mask, (H, W) integers; resized without new values (nearest neighbour).

    Raises:
        UserError: it cannot be read, or is coloured.
    """
    from PIL import Image

    try:
        with Image.open(file) as picture:
            picture.load()
            mode, own = picture.mode, picture
            if mode in ("LA", "PA"):
                own = picture.convert(mode[0])
            if size is not None and (own.height, own.width) != size:
                own = own.resize((size[1], size[0]), Image.Resampling.NEAREST)
            values = np.array(own)
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise UserError(f"The mask {file} cannot be read: {str(error) or type(error).__name__}") from error
    if values.ndim == 3:
        colours = values[..., :3]
        if (colours != colours[..., :1]).any():
            raise UserError(
                f"The mask {file} is coloured. A mask has one number for each pixel, that of its class: save it as a "
                "grey PNG, or one with a palette."
            )
        values = colours[..., 0]
    return values


def checked_mask(name: str, mask: np.ndarray) -> np.ndarray:
    """A mask (H, W) or (D, H, W) of whole numbers as integers. name: of its image. Raises UserError."""
    if mask.ndim not in (2, 3):
        raise UserError(
            f"The mask of {name} has the shape {mask.shape}. It must have two or three dimensions: one number for each "
            "pixel or voxel, that of its class, without channels."
        )
    if mask.dtype == np.bool_:
        return mask.astype(np.uint8)
    if mask.dtype.kind not in "iu":
        raise UserError(
            f"The mask of {name} is {mask.dtype}. It must hold whole numbers: mask.round().astype(numpy.uint8)."
        )
    return mask


def classes_of(
    masks: Mapping[str, list[np.ndarray]],
    names: Mapping[str, list[str]],
    given: Any,
    ignore_value: int | None,
    notes: list[str],
) -> Classes:
    """The classes of masks. In their lists, it replaces the masks by (*S) uint8: numbers of classes, or IGNORED.

    Args:
        masks: split -> masks.
        names: split -> the name of each one's image, for messages.
        given: the option `classes`; None for the values in train.
        ignore_value: of pixels that do not count.
        notes: sentences are added.

    Raises:
        UserError: a mask holds a value that is not a class, or no pixel that counts. Or there are fewer than two
            classes, or more than a mask probably has.
    """
    classes = _named(given, ignore_value) if given is not None else _values_in(masks["train"], ignore_value, notes)
    known = np.array(sorted(classes.values), dtype=np.int64)
    number = np.array([classes.values.index(int(value)) for value in known], dtype=np.uint8)
    for split, group in masks.items():
        for row, mask in enumerate(group):
            wide = mask.astype(np.int64)
            place = np.searchsorted(known, wide).clip(max=len(known) - 1)
            ignored = np.zeros(wide.shape, bool) if ignore_value is None else wide == ignore_value
            wrong = (known[place] != wide) & ~ignored
            if wrong.any():
                where = "train" if given is None else "classes"
                raise UserError(
                    f"The mask of {names[split][row]} holds the value {wide[wrong][0]}, which is no class. The "
                    f"values of {where} are {_listed(classes.values)}.\nCorrect the mask, or set classes (or "
                    "ignore_value, for pixels that do not count) in trainer.task_options."
                )
            if ignored.all():
                raise UserError(f"The mask of {names[split][row]} holds only the ignored value {ignore_value}.")
            group[row] = np.where(ignored, np.uint8(IGNORED), number[place])
    return classes


def _named(given: Any, ignore_value: int | None) -> Classes:
    """The classes that the option `classes` names. It was checked by `check_classes`."""
    values = dict(given) if isinstance(given, Mapping) else {name: value for value, name in enumerate(given)}
    if ignore_value in values.values():
        raise UserError(
            f'"trainer.task_options.ignore_value" ({ignore_value}) is also the value of a class in '
            '"trainer.task_options.classes". Remove it from one of them.'
        )
    return Classes(list(values), list(values.values()))


def check_classes(given: Any) -> None:
    """Raises UserError unless the option `classes` is a list of names, or {name: value}, of 2 to 255 classes."""
    names: Sequence[Any] = list(given) if isinstance(given, (list, Mapping)) else []
    values = list(given.values()) if isinstance(given, Mapping) else list(range(len(names)))
    good = (
        2 <= len(names) <= MOST_CLASSES
        and all(isinstance(name, str) and name.strip() for name in names)
        and all(isinstance(value, int) and not isinstance(value, bool) for value in values)
        and len(set(names)) == len(names) == len(set(values))
    )
    if not good:
        raise UserError(
            f'"trainer.task_options.classes" is {given!r}. It must be 2 to {MOST_CLASSES} different names, for the '
            'values 0, 1, 2, ... of the masks, or {"name": value, ...}.'
        )


def _values_in(masks: Sequence[np.ndarray], ignore_value: int | None, notes: list[str]) -> Classes:
    found: set[int] = set()
    for mask in masks:
        found |= set(np.unique(mask).tolist())
        if len(found) > MOST_CLASSES + 1:
            break
    values = sorted(found - {ignore_value})
    if len(values) > _LIKELY_CLASSES:
        raise UserError(
            f"The masks hold more than {_LIKELY_CLASSES} different values, such as {_listed(values[:10])}. A mask has "
            "one number for each pixel, that of its class. JPEG and smooth resizing blur them: save masks as PNG.\n"
            "If all of them are classes, name them with classes in trainer.task_options."
        )
    if len(values) < 2:
        raise UserError(
            f"The masks of train hold only the value {_listed(values)}. There must be two classes, such as 0 for the "
            "background and 1 for what is to be found."
        )
    if (
        ignore_value is None
        and values[-1] == IGNORED
        and values[:-1] == list(range(len(values) - 1))
        and values[1] == 1
    ):
        raise UserError(
            f"The masks hold the values {_listed(values)}: is {IGNORED} a class, or does it mark pixels that do not "
            f'count?\nSet "ignore_value": {IGNORED} in trainer.task_options if it does, or name the classes, such as '
            '"classes": {"background": 0, "object": 1, "border": 255}.'
        )
    if values != list(range(len(values))):
        notes.append(
            f"the classes are the values of the masks, {_listed(values)}, and the first is the background; classes in "
            "trainer.task_options names them"
        )
    return Classes([str(value) for value in values], values)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
