"""Which files are sound, and tables that name them."""

from __future__ import annotations

from pathlib import Path

from trainer.data.audio_files import CLIPS, is_audio, named_files
from trainer.data.labelled_files import with_paths
from trainer.data.table_files import Table


def test_sound_that_is_not_read_is_not_left_out_either() -> None:
    assert all(is_audio(Path(name)) for name in ("a.wav", "b.FLAC", "c.m4a", "d.raw"))
    assert not any(is_audio(Path(name)) for name in ("a.csv", "b", "c.png"))
    assert CLIPS.option == "audio_column"


def test_names_begin_at_the_tables_folder_and_files_elsewhere_are_known(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/a.wav", "b.wav"):
        (tmp_path / name).write_bytes(b"")
    table = Table({"path": ["a.wav", "../b.wav", str(tmp_path / "b.wav"), "none.wav"]})
    found = with_paths(table, "path", tmp_path / "in")
    assert found.values("path")[0] == str(tmp_path / "in" / "a.wav")
    assert found.values("path")[2] == str(tmp_path / "b.wav")
    assert table.values("path")[0] == "a.wav", "the table itself is as it was"
    files = named_files({"train": found}, "path", str(tmp_path / "in" / "table.csv"))
    assert [file.name for file in files] == ["a.wav", "b.wav"]
    assert [file.name for file in named_files({"train": found}, "path", str(tmp_path / "in"))] == ["b.wav"]
    whole = Table({"path": ["a.wav"]}, images=["path"])
    assert with_paths(whole, "path", tmp_path) is whole
