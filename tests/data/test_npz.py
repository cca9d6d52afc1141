"""Arrays of .npz files: only plain ones that fit into the memory are read, and nothing is unpickled."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_memory import with_memory
from trainer.data.image_arrays import read_npz_images
from trainer.data.npz import npz_array, npz_arrays
from trainer.errors import UserError


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_an_array_of_objects_is_refused_and_its_code_does_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.array([Trap(tmp_path / "it ran"), None], dtype=object))
    with npz_arrays(tmp_path / "a.npz") as file:
        assert npz_array(tmp_path / "a.npz", file, "x").tolist() == [0, 1, 2]
        with pytest.raises(
            UserError, match=r"(?s)y is an array of Python objects.*not loaded.*plain arrays of numbers"
        ):
            npz_array(tmp_path / "a.npz", file, "y")
    assert not (tmp_path / "it ran").exists()


def test_a_pickle_that_is_called_npz_is_refused_and_does_not_run(tmp_path: Path) -> None:
    np.array([Trap(tmp_path / "it ran")], dtype=object).dump(tmp_path / "a.npz")
    with pytest.raises(UserError, match="neither a zip file of arrays nor an array"):
        npz_arrays(tmp_path / "a.npz")
    assert not (tmp_path / "it ran").exists()


def test_a_file_that_is_no_npz(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"bad\.npz cannot be read as an \.npz of plain arrays"):
        npz_arrays(tmp_path / "bad.npz")
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(UserError, match=r"holds one plain array\. Write it with numpy\.savez"):
        npz_arrays(tmp_path / "one.npz")


def test_only_the_array_that_is_asked_for_is_read(tmp_path: Path) -> None:
    """So a broken one that nobody needs does no harm, and a zip may hold other files."""
    np.savez(tmp_path / "a.npz", x=np.arange(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("y.npy", b"\x93NUMPY\x01\x00 half a header")
        archive.writestr("notes", "not an array")
    with npz_arrays(tmp_path / "a.npz") as file:
        assert npz_array(tmp_path / "a.npz", file, "x").tolist() == [0, 1, 2]
        for name, message in (("y", "y cannot be read"), ("notes", "notes is not an array"), ("z", "z cannot be read")):
            with pytest.raises(UserError, match=message):
                npz_array(tmp_path / "a.npz", file, name)


def test_a_zip_that_unpacks_to_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros((64, 1024, 1024), dtype=np.uint8), y=np.zeros(64, dtype=np.int64))
    assert path.stat().st_size < 100_000
    with_memory(monkeypatch, 16)
    with pytest.raises(UserError, match=r"x would take 67,108,992 bytes of this machine's"):
        read_npz_images(path)
