"""Arrays of .npz files, never unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .memory import machine_bytes


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
        memory = machine_bytes()
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
