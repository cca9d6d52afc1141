"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trainer.files import to_json, whole_file, whole_folder, write_json


def test_json_of_one_line() -> None:
    assert to_json({"a": 0.1 + 0.2, "b": math.nan}) == '{"a": 0.30000000000000004, "b": null}'


def test_a_file_takes_its_place_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path, synced=True) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # a rename across file systems is no rename
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with whole_file(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("synced", [True, False])
def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path, synced: bool) -> None:
    path = tmp_path / "model"
    for content in ("old", "new"):
        with whole_folder(path, synced=synced) as temporary:
            assert not list(temporary.iterdir())
            (temporary / content).mkdir()
            (temporary / content / "file").write_text(content)
    assert [p.name for p in path.iterdir()] == ["new"]

    def fail() -> None:
        with whole_folder(path) as temporary:
            (temporary / "x").touch()
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert [p.name for p in path.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_json_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": math.nan, "steps": 3})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None, "steps": 3}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_follow_the_umask_whoever_writes_them(tmp_path: Path, umask: int) -> None:
    """The library of safetensors makes its files private: a colleague could not read the weights."""
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "model") as temporary:
            save_file({"w": torch.zeros(2)}, str(temporary / "model.safetensors"))
            (temporary / "inner").mkdir()
            save_file({"w": torch.zeros(2)}, str(temporary / "inner" / "adapter.safetensors"))
        with whole_file(tmp_path / "cache.safetensors") as temporary:
            save_file({"w": torch.zeros(2)}, str(temporary))
    finally:
        os.umask(before)
    for file in tmp_path.rglob("*.safetensors"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file
