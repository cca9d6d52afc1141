"""A path is a path, links are followed, splits come from folders and files called so, and content alone is the key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.data import sources
from trainer.data.sources import by_class, by_file, find, fingerprint
from trainer.errors import UserError


def made(folder: Path, *names: str) -> sources.Found:
    """The files of a folder; each holds its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    found = find(str(folder))
    assert found is not None
    return found


def splits(folder: Path, *names: str) -> tuple[dict[str, list[str]], list[str]]:
    found = made(folder, *names)
    groups, others = by_file(found, found.files)
    return {s: [found.name(f) for f in group] for s, group in groups.items()}, [found.name(f) for f in others]


def classes(folder: Path, *names: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Split -> class -> number of files; and the files in no class."""
    found = made(folder, *names)
    groups, loose = by_class(found, found.files)
    counted = {s: {c: g.classes.count(c) for c in sorted(set(g.classes))} for s, g in groups.items()}
    return counted, [found.name(f) for f in loose]


ODD = ("reviews[1].csv", "what?.csv", "all*.csv", "-leading.csv", "two words.csv", "ü é.csv", "{a,b}.csv", "~x.csv")


@pytest.mark.parametrize("name", ODD)
def test_a_path_is_a_path_whatever_its_characters(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path, name, "reviews1.csv", "whats.csv", "alles.csv", "a.csv")
    found = find(str(tmp_path / name))
    assert found is not None
    assert [(f.name, f.read_text()) for f in found.files] == [(name, name)]
    monkeypatch.chdir(tmp_path)
    if not name.startswith("~"):
        relative = find(name)
        assert relative is not None
        assert [f.read_text() for f in relative.files] == [name]


def test_a_pattern_is_one_only_if_nothing_has_that_name(tmp_path: Path) -> None:
    made(tmp_path, "a1.csv", "a2.csv", "b.csv", "deep/a3.csv")
    found = find(str(tmp_path / "a*.csv"))
    assert found is not None
    assert [f.name for f in found.files] == ["a1.csv", "a2.csv"]
    deep = find(str(tmp_path / "**" / "a?.csv"))
    assert deep is not None
    assert len(deep.files) == 3
    with pytest.raises(UserError, match=r"no file has the name .*c\*\.csv, or matches it as a pattern"):
        find(str(tmp_path / "c*.csv"))


@pytest.mark.parametrize(
    "name", ["nowhere.csv", "nowhere.CSV.gz", "./nowhere", "/no/where", "a b", "data/a/b", "x.npz"]
)
def test_what_is_no_hub_name_must_be_there(name: str) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find(name)


def test_what_runs_write_beside_the_data_is_not_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with data="." and the output folder that a run chooses by itself."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    first = fingerprint(str(tmp_path))
    for name in ("cache/words.safetensors", "runs/one-001/logs/deepspeed.log", "runs/one-001/model/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert fingerprint(str(tmp_path)) == first
    found = find(str(tmp_path))
    assert found is not None and [file.name for file in found.files] == ["a.csv"]


def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    made(tmp_path / "store", "bird/1.png", "bird/2.png")
    data = tmp_path / "data"
    made(data, "cat/1.png")
    (data / "bird").symlink_to(tmp_path / "store" / "bird")
    (data / "cat" / "2.png").symlink_to(tmp_path / "store" / "bird" / "1.png")
    (data / "cat" / "back").symlink_to(data)
    counted, _ = classes(data)
    assert counted == {"train": {"bird": 2, "cat": 2}}
    before = fingerprint(str(data))
    (tmp_path / "store" / "bird" / "2.png").write_text("new")
    assert fingerprint(str(data)) != before, "the content behind a link counts"
    (data / "dog").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"dog is a link to .*gone, which is not there"):
        find(str(data))


def test_hidden_files_are_no_data_and_are_counted(tmp_path: Path) -> None:
    found = made(tmp_path, "cat/1.png", "cat/._1.png", ".cache/x.png", "cat/.DS_Store", "__MACOSX/cat/1.png")
    assert [found.name(f) for f in found.files] == ["cat/1.png"]
    assert sources.left_out_note(found, [], "") == ["3 hidden files left out (their names begin with a dot)"]


# --- the key ---------------------------------------------------------------------------------------------------------


def test_a_file_with_the_same_time_and_size_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    keys = set()
    for content in ("panda", "tiger", "panda"):
        file.write_text(content)
        os.utime(file, (1_200_000_000,) * 2)
        keys.add(fingerprint(str(file)))
    assert len(keys) == 2


def test_the_suffix_says_how_a_file_is_read_and_its_name_nothing(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv", "B.CSV", "a.tsv", "a.txt", "a.csv.gz"):
        (tmp_path / name).write_text("same")
    keys = {
        name: fingerprint(str(tmp_path / name)) for name in ("a.csv", "b.csv", "B.CSV", "a.tsv", "a.txt", "a.csv.gz")
    }
    assert keys["a.csv"] == keys["b.csv"] == keys["B.CSV"]
    assert len(set(keys.values())) == 4


def test_names_in_a_folder_are_part_of_the_key(tmp_path: Path) -> None:
    made(tmp_path / "a", "cat/1", "dog/1")
    made(tmp_path / "b", "cat/1", "dog/1")
    made(tmp_path / "c", "cat/1", "dog/1")
    (tmp_path / "c/dog/1").rename(tmp_path / "c/dog/2")
    assert fingerprint(str(tmp_path / "a")) == fingerprint(str(tmp_path / "b")) != fingerprint(str(tmp_path / "c"))


# --- splits of tables and corpora ------------------------------------------------------------------------------------


def test_files_called_like_splits_are_splits_and_others_are_left_out(tmp_path: Path) -> None:
    assert splits(tmp_path / "kaggle", "train.csv", "test.csv", "sample_submission.csv") == (
        {"train": ["train.csv"], "test": ["test.csv"]},
        ["sample_submission.csv"],
    )
    hub = (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/validation-00000-of-00001.parquet",
    )
    assert splits(tmp_path / "hub", *hub) == ({"train": list(hub[:2]), "validation": [hub[2]]}, [])
    assert splits(tmp_path / "folders", "Train/a.csv", "Train/b.csv", "dev/c.csv")[0] == {
        "train": ["Train/a.csv", "Train/b.csv"],
        "validation": ["dev/c.csv"],
    }
    assert splits(tmp_path / "parts", "train_1.csv.gz", "train_2.csv.gz") == (
        {"train": ["train_1.csv.gz", "train_2.csv.gz"]},
        [],
    )


def test_words_in_names_are_splits_only_if_all_files_have_one(tmp_path: Path) -> None:
    assert splits(tmp_path / "a", "imdb_train.csv", "imdb_test.csv")[0] == {
        "train": ["imdb_train.csv"],
        "test": ["imdb_test.csv"],
    }
    assert splits(tmp_path / "b", "north.csv", "test_drive.csv") == ({"train": ["north.csv", "test_drive.csv"]}, [])
    assert splits(tmp_path / "c", "test_drive.csv") == ({"train": ["test_drive.csv"]}, [])
    with pytest.raises(UserError, match=r"named like a split, but more.csv is not"):
        splits(tmp_path / "d", "imdb_train.csv", "imdb_test.csv", "more.csv")


# --- classes ---------------------------------------------------------------------------------------------------------


def test_the_folder_at_the_top_is_the_class(tmp_path: Path) -> None:
    assert classes(tmp_path / "a", "cat/a/1", "cat/b/1", "dog/a/1")[0] == {"train": {"cat": 2, "dog": 1}}
    assert classes(tmp_path / "b", "train/cat/a/1", "train/dog/1", "val/cat/1")[0] == {
        "train": {"cat": 1, "dog": 1},
        "validation": {"cat": 1},
    }


def test_no_split_comes_from_the_name_of_a_class_or_an_image(tmp_path: Path) -> None:
    assert classes(tmp_path / "a", "cat/train-1.png", "cat/2.png", "dog/test_3.png")[0] == {
        "train": {"cat": 2, "dog": 1}
    }
    assert classes(tmp_path / "b", "bus/1", "car/1", "train/1")[0] == {"train": {"bus": 1, "car": 1, "train": 1}}
    assert classes(tmp_path / "c", "train/1", "test/1")[0] == {"train": {"test": 1, "train": 1}}
    assert classes(tmp_path / "d", "train/test/1", "train/cat/1", "test/test/1")[0] == {
        "train": {"cat": 1, "test": 1},
        "test": {"test": 1},
    }
    assert classes(tmp_path / "e", "bullet train/1", "tram/1")[0] == {"train": {"bullet train": 1, "tram": 1}}


def test_folders_of_newsgroups(tmp_path: Path) -> None:
    counted, _ = classes(
        tmp_path,
        "20news-bydate-train/sci.med/58",
        "20news-bydate-train/alt.atheism/49",
        "20news-bydate-test/sci.med/59",
    )
    assert counted == {"train": {"alt.atheism": 1, "sci.med": 1}, "test": {"sci.med": 1}}


def test_files_in_no_class_are_named(tmp_path: Path) -> None:
    _, loose = classes(tmp_path / "a", "cat/1", "dog/1", "README")
    assert loose == ["README"]
    counted, loose = classes(tmp_path / "b", "train/cat/1", "train/dog/1", "test/1", "test/2")
    assert (counted, loose) == ({"train": {"cat": 1, "dog": 1}}, ["test/1", "test/2"]), "a test set without labels"


def test_splits_and_other_folders_beside_one_another_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)the folder train is named like a split, but extra is not.*data/train"):
        classes(tmp_path / "data", "train/cat/1", "train/dog/1", "extra/1")
    with pytest.raises(UserError, match=r"several folders for one split: train, val, valid"):
        classes(tmp_path / "two", "train/cat/1", "val/cat/1", "valid/cat/1")


def test_names_that_look_alike_are_one_class(tmp_path: Path) -> None:
    """An e and an accent: so macOS stores é."""
    assert classes(tmp_path, "train/caf\u00e9/1", "test/cafe\u0301/1", "train/bar/1")[0] == {
        "train": {"bar": 1, "caf\u00e9": 1},
        "test": {"caf\u00e9": 1},
    }


# --- the same samples in two formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said", "typed"),
    [
        (("data.csv", "data.parquet"), "data.csv and data.parquet", "*.csv"),
        (("train.csv", "train.jsonl", "test.jsonl"), "train.csv and train.jsonl", "*.jsonl"),
        (("train.csv", "train.csv.gz"), "train.csv and train.csv.gz", "*.csv"),
        (("corpus.txt", "corpus.txt.xz"), "corpus.txt and corpus.txt.xz", "*.txt"),
        (("csv/v1.2.csv", "parquet/v1.2.parquet"), "csv/v1.2.csv and parquet/v1.2.parquet", "**/*.csv"),
    ],
)
def test_one_name_in_two_formats_is_refused(tmp_path: Path, names: tuple[str, ...], said: str, typed: str) -> None:
    found = made(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        by_file(found, found.files)
    assert f"{said} differ only in their format" in str(caught.value)
    pattern = f"{tmp_path}/{typed}"
    assert f"--set 'trainer.task_options.data={pattern}'" in str(caught.value)
    taken = find(pattern)
    assert taken is not None
    by_file(taken, taken.files)


def test_other_names_in_two_formats_are_parts(tmp_path: Path) -> None:
    assert splits(tmp_path, "2023.csv", "2024.jsonl") == ({"train": ["2023.csv", "2024.jsonl"]}, [])


def test_a_format_of_another_split_is_no_twin(tmp_path: Path) -> None:
    assert splits(tmp_path, "train/a.csv", "test/a.jsonl")[0] == {"train": ["train/a.csv"], "test": ["test/a.jsonl"]}


def test_samples_of_classes_in_two_formats_are_noted(tmp_path: Path) -> None:
    found = made(tmp_path, "cat/1.jpg", "cat/1.png", "cat/2.jpg", "dog/1.jpg")
    assert sources.twins_note(found, found.files) == [
        "2 files differ from another one only in their format, such as cat/1.jpg and cat/1.png. If these hold the same "
        "sample, it counts twice: remove one"
    ]
