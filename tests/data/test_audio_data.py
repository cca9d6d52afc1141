"""Datasets of clips: folders and tables become features of one shape, or one message says what must change."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.test_audio import FRONT, broken, tone
from trainer.data import targets
from trainer.data.audio import LogMel
from trainer.data.audio_data import AudioSplit, Columns, read_clips
from trainer.data.labelled import Labelled
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches", "one_thread")


def tones(folder: Path, splits: tuple[str, ...] = ("train", "test"), each: int = 3, **how: Any) -> Path:
    """Two classes of clips in each split, of which the second is higher; wav and flac."""
    for i, split in enumerate(splits):
        for j, name in enumerate(("low", "up")):
            for k in range(each):
                file = folder / split / name / f"{k}.{'flac' if k % 2 else 'wav'}"
                tone(file, 300 + 1500 * j, seed=100 * i + 10 * j + k, **how)
    return folder


def read(data: Any, seconds: float | None = 0.25, column: str | None = None, **columns: Any) -> Labelled[AudioSplit]:
    found, front = read_clips(data, FRONT, seconds, Columns(**columns), targets.Wish(column=column))
    assert isinstance(front, LogMel)
    return found


def test_class_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tones(tmp_path / "tones")
    tone(folder / "train" / "up" / "2.wav", 1800, seconds=0.2, rate=16_000, channels=2)
    (folder / "notes.txt").write_text("no clip")
    found = read(str(folder))
    assert found.classes == ["low", "up"]
    assert found.splits["train"].clip.shape == (6, 1, 24, FRONT.frames)
    assert found.splits["test"].label.tolist() == [0, 0, 0, 1, 1, 1]
    loudest = found.splits["train"].clip[:, 0, :, 5].argmax(1)
    assert loudest[:3].max() < loudest[3:].min()
    assert found.notes == [
        "1 file left out (no clip in a folder of a class): notes.txt",
        "11 clips had to be cut to the first 0.25 s",
        "1 clip had to be made mono",
        "1 clip had to be resampled from 16,000 Hz to 8,000 Hz",
    ]
    values = found.splits["train"].select(np.array([1, 4])).mean_and_std()
    chosen = found.splits["train"].clip[[1, 4]].double()
    assert values == pytest.approx((float(chosen.mean()), float(chosen.std(correction=0))), abs=1e-3)
    assert found.files is not None and found.files()["train"][4] == f"{folder}/train/up/1.flac"
    # Again, from the cache, without what decodes and computes.
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    again = read(str(folder))
    assert torch.equal(again.splits["train"].clip, found.splits["train"].clip)
    assert (again.notes, again.first) == (found.notes, ("train/low/0.wav", "low"))


def test_clips_are_padded_to_the_longest_where_nothing_else_is_said(tmp_path: Path) -> None:
    folder = tones(tmp_path / "tones", ("train",), seconds=0.3)
    tone(folder / "train" / "low" / "0.wav", 300, seconds=0.4)
    found, front = read_clips(str(folder), FRONT, None, Columns(), targets.Wish())
    assert front == replace(FRONT, samples=3200)
    assert (found.splits["train"].clip[1, 0, :, -1] == -10_000).all()
    tone(folder / "train" / "low" / "0.wav", 300, seconds=31)
    with pytest.raises(UserError, match=r"(?s)longest clip, .*low/0\.wav, has 31\.0 s.*Set max_seconds"):
        read_clips(str(folder), FRONT, None, Columns(), targets.Wish())


def test_a_table_of_paths_whose_clips_change(tmp_path: Path) -> None:
    tones(tmp_path / "sounds", ("all",))
    names = [f"all/{name}/{k}.{'flac' if k % 2 else 'wav'}" for name in ("low", "up") for k in range(3)]
    rows = "".join(f"{name},{name.split('/')[1]},{'test' if '0' in name else 'train'}\n" for name in names)
    (tmp_path / "sounds" / "clips.csv").write_text("path,label,split\n" + rows)
    found = read(str(tmp_path / "sounds" / "clips.csv"))
    assert {split: part.label.tolist() for split, part in found.splits.items()} == {
        "train": [0, 0, 1, 1],
        "test": [0, 1],
    }
    tone(tmp_path / "sounds" / "all" / "up" / "0.wav", 600)
    changed = read(str(tmp_path / "sounds" / "clips.csv"))
    assert not torch.equal(changed.splits["test"].clip[1], found.splits["test"].clip[1])
    assert torch.equal(changed.splits["train"].clip, found.splits["train"].clip)
    (tmp_path / "clips.jsonl").write_text(
        "".join(f'{{"file": "{name}", "kind": "{name.split("/")[1]}"}}\n' for name in names)
    )
    found = read(str(tmp_path / "clips.jsonl"), column="kind", audio_folder=str(tmp_path / "sounds"))
    assert found.splits["train"].label.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match=r"(?s)6 clips cannot be read:.*all/low/0\.wav \(not there\)"):
        read(str(tmp_path / "clips.jsonl"), column="kind")


def test_a_table_that_holds_its_clips(tmp_path: Path) -> None:
    import datasets

    files = [tone(tmp_path / f"{i}.wav", 300 + 400 * i) for i in range(3)]
    values = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    datasets.Dataset.from_dict({"audio": values, "label": ["a", "b", "a"]}).to_parquet(tmp_path / "a.parquet")
    found = read(str(tmp_path / "a.parquet"))
    assert found.splits["train"].label.tolist() == [0, 1, 0]
    assert found.first == ("row 1 of train, 0.wav", "a")


def test_metadata_beside_clips_may_hold_numbers(tmp_path: Path) -> None:
    for i in range(3):
        tone(tmp_path / f"{i}.wav", 300 + 400 * i)
    (tmp_path / "metadata.csv").write_text("file_name,pitch\n0.wav,300\n1.wav,700\n2.wav,1100\n")
    wish = targets.wish(targets.NUMBER, "pitch", [], None)
    found, _ = read_clips(str(tmp_path), FRONT, 0.25, Columns(), wish)
    assert found.splits["train"].label.tolist() == [300, 700, 1100]
    assert found.label_columns == ["pitch"]


def test_all_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    folder = tones(tmp_path / "tones", ("train",))
    sources = broken(folder / "train" / "up")
    with pytest.raises(UserError) as error:
        read(str(folder))
    message = str(error.value)
    # Found by the headers alone, before any clip is decoded.
    assert message.startswith("4 clips cannot be read:") or message.startswith("5 clips cannot be read:")
    for case in ("rate", "nonsense", "format", "empty"):
        assert f"{sources[case][0]} ({sources[case][1]}" in message
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_labels_that_must_change(tmp_path: Path) -> None:
    folder = tones(tmp_path / "one", ("sounds",))
    with pytest.raises(UserError, match=r"all clips of .* lie in one folder, sounds, which would be the only class"):
        read(str(folder))
    for name in ("0.wav", "1.wav"):
        tone(tmp_path / "loose" / name, 300)
    with pytest.raises(UserError, match=r"(?s)the clips of .* have no labels.*metadata\.csv"):
        read(str(tmp_path / "loose"))
    for rows, words in (
        ("0.wav,a\n1.wav,a\n", "All labels in train are 'a'. A classifier needs at least two classes"),
        ("0.wav,a\n1.wav,\n", r'1 value of the column "label" in train is missing \(row 2'),
        ("0.wav,a\n2.wav,b\n", r"names .*2\.wav, which is no clip in"),
    ):
        (tmp_path / "loose" / "metadata.csv").write_text("file_name,label\n" + rows)
        with pytest.raises(UserError, match=words):
            read(str(tmp_path / "loose"))
    (tmp_path / "loose" / "table.csv").write_text("path,label\n0.wav,a\n1.wav,b\n./0.wav,b\n")
    with pytest.raises(UserError, match=r"loose/0\.wav has two rows in train, so it would count twice"):
        read(str(tmp_path / "loose" / "table.csv"))
    (tmp_path / "a.csv").write_text("name,label\n0.wav,a\n1.wav,b\n")
    with pytest.raises(UserError, match=r'audio_column" is needed.*name, label'):
        read(str(tmp_path / "a.csv"))
