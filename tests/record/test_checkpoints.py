"""Checkpoints: what the library reads back, and which are kept."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.record.checkpoints import Checkpoints, DamagedError, Snapshot, list_checkpoints, read, read_newest


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    """Tensors of every type that models and optimizers have, strided, empty and scalar ones too."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"a {t}": torch.randn(3, 5, generator=generator).to(t) for t in (torch.float32, torch.float64)}
    tensors |= {f"b {t}": torch.randn(7, generator=generator).to(t) for t in (torch.bfloat16, torch.float16)}
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors |= {f"c {t}": torch.randint(0, 2, (9,), generator=generator).to(t) for t in integers}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": torch.arange(24.0).view(4, 6).t()}
    writer = Checkpoints(tmp_path / "checkpoints", keep=1)
    writer.save(Snapshot(7, {"model": tensors, "nothing": {}}, {"note": "one"}))
    writer.wait()
    (folder,) = (tmp_path / "checkpoints").glob("step-*")
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    assert load_file(folder / "nothing.safetensors") == {}
    snapshot = read(folder)
    assert (snapshot.step, snapshot.facts["note"]) == (7, "one")
    assert (
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        in (folder / "manifest.json").read_text()
    )


def write(folder: Path, keep: int, *steps: int, whole: int | None = None) -> list[str]:
    """Writes checkpoints one after the other. Returns what is in the folder then."""
    writer = Checkpoints(folder, keep, whole)
    for step in steps:
        writer.save(Snapshot(step, {"model": {"w": torch.full((3,), float(step))}}, {}))
        writer.wait()
    return sorted(path.name for path in folder.iterdir())


FOREIGN = [
    "step-best",
    "step-9",
    "step-000000099 (copy)",
    "step-000000020.bak",
    "step-latest-000000007",
    ".step-notes.txt",
]


def test_only_our_names_are_checkpoints(tmp_path: Path) -> None:
    """Copies that a user made are not counted, read or removed, wherever their names would be sorted."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in FOREIGN:
        (folder / name).mkdir()
    assert write(folder, 2, 10, 20, 30) == sorted([*FOREIGN, "step-000000020", "step-000000030"])
    assert [c.name for c in list_checkpoints(folder)] == ["step-000000030", "step-000000020"]


def test_a_users_files_survive_their_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 2, 10)
    (tmp_path / "step-000000010" / "notes.txt").write_text("mine")
    names = write(tmp_path, 2, 20, 30)
    assert names == ["step-000000010-your-files", "step-000000020", "step-000000030"]
    assert [path.name for path in (tmp_path / names[0]).iterdir()] == ["notes.txt"]
    assert write(tmp_path, 1, 40) == ["step-000000010-your-files", "step-000000040"]


def test_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    names = write(tmp_path / "checkpoints", 2, 999_999_999, 1_000_000_000)
    assert [c.name for c in list_checkpoints(tmp_path / "checkpoints")] == names


def damage(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"")


def test_what_was_just_written_is_kept_although_damaged_ones_are_newer(tmp_path: Path) -> None:
    """The run continues from step 10, past two damaged ones, and `keep` was lowered to 1."""
    folder = tmp_path / "checkpoints"
    write(folder, 3, 10, 20, 30)
    damage(folder / "step-000000020")
    damage(folder / "step-000000030")
    assert "step-000000015" in write(folder, 1, 15, whole=10)
    assert read_newest(folder, lambda text: None)[0].name == "step-000000015"  # type: ignore[index]


def test_damaged_ones_do_not_take_the_place_of_whole_ones(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 4, 5, 10, 15)
    damage(folder / "step-000000010")
    damage(folder / "step-000000015")
    assert write(folder, 2, 20, whole=5) == ["step-000000005", "step-000000020"]


def test_a_copy_under_another_number_is_no_checkpoint_of_that_step(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 2, 10)
    shutil.copytree(folder / "step-000000010", folder / "step-000000099")
    with pytest.raises(DamagedError, match="is a copy of the checkpoint of step 10, under another name"):
        read(folder / "step-000000099")
    assert read_newest(folder, lambda text: None)[0].name == "step-000000010"  # type: ignore[index]
    shutil.copytree(folder / "step-000000010", folder / "step-best")
    assert read(folder / "step-best").step == 10  # where a user asks for it by its name
