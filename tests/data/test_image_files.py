"""Folders of images: which files are images, in training and in prediction alike, and what their classes are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.test_images import some_images
from trainer.data import sources
from trainer.data.image_data import read_images
from trainer.data.image_files import IMAGES, is_image
from trainer.data.labelled_files import chosen
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")


def picture(path: Path, kind: str = "PNG", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(some_images(6, 6, 3, seed=seed)).save(path, kind)


def counts(folder: Path, **options: Any) -> dict[str, dict[str, int]]:
    """Split -> class -> number of images that are read."""
    found = read_images(str(folder), **options)
    return {
        split: {name: int((images.label == i).sum()) for i, name in enumerate(found.classes)}
        for split, images in found.splits.items()
    }


KINDS = {"a.avif": "AVIF", "b.jfif": "JPEG", "c.pgm": "PPM", "d": "PNG", "e.JPE": "JPEG", "f.img": "PNG",
         "g.tif": "TIFF", "h.webp": "WEBP", "i.12": "BMP", "train [1] *?.png": "PNG", "-j.png": "PNG",
         "ü.png": "PNG"}  # fmt: skip


def test_one_list_of_images_for_training_and_prediction(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("cat", "dog"):
        for i, (file, kind) in enumerate(KINDS.items()):
            picture(folder / name / file, kind, seed=i)
    (folder / "cat" / "notes.doc").write_text("no image")
    (folder / "cat" / "d2").write_text("no image")
    (folder / "labels.csv").write_text("a,b\n")
    assert counts(folder) == {"train": {"cat": len(KINDS), "dog": len(KINDS)}}
    assert read_images(str(folder)).notes == [
        "3 files left out (no image in a folder of a class): cat/d2, cat/notes.doc, labels.csv"
    ]
    found = sources.find(str(folder))
    assert found is not None
    images, others = chosen(found, IMAGES)
    assert (len(images), len(others)) == (2 * len(KINDS), 3)
    assert all(is_image(folder / "cat" / name) for name in KINDS)


def test_a_broken_image_is_an_error_and_not_left_out(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        picture(tmp_path / name)
    (tmp_path / "dog" / "2.heic").write_bytes(b"of a telephone")
    with pytest.raises(UserError, match=r"2\.heic \(no kind of image that Pillow knows\)"):
        read_images(str(tmp_path))


def test_no_image_is_left_out_for_its_name(tmp_path: Path) -> None:
    names = ["train-1", "2", "test_3", "valid 4", "cat.train.5"]
    for name in ("cat", "dog"):
        for i, file in enumerate(names):
            picture(tmp_path / name / f"{file}.png", seed=i)
    assert counts(tmp_path) == {"train": {"cat": 5, "dog": 5}}


def test_classes_are_the_folders_at_the_top_also_behind_links(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i, name in enumerate(("cat/a/1", "cat/b/1", "dog/a/1")):
        picture(data / f"{name}.png", seed=i)
    picture(tmp_path / "elsewhere" / "bird" / "1.png", seed=9)
    (data / "bird").symlink_to(tmp_path / "elsewhere" / "bird")
    assert counts(data) == {"train": {"bird": 1, "cat": 2, "dog": 1}}
    (tmp_path / "elsewhere" / "bird" / "2.png").write_bytes((data / "dog/a/1.png").read_bytes())
    assert counts(data) == {"train": {"bird": 2, "cat": 2, "dog": 1}}, "a new image behind a link"


def test_classes_of_test_are_those_of_train_by_name(tmp_path: Path) -> None:
    for i, name in enumerate(("train/cat/1", "train/dog/1", "test/dog/1", "test/dog/2")):
        picture(tmp_path / f"{name}.png", seed=i)
    assert counts(tmp_path) == {"train": {"cat": 1, "dog": 1}, "test": {"cat": 0, "dog": 2}}
    picture(tmp_path / "test" / "cow" / "1.png")
    with pytest.raises(UserError, match="The label 'cow' occurs 1 time in test, but never in train"):
        read_images(str(tmp_path))


def test_many_classes_of_numbers_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    """As in torchvision, and as before."""
    for i in range(11):
        picture(tmp_path / str(i) / "1.png", seed=i)
    assert read_images(str(tmp_path)).classes == sorted(str(i) for i in range(11))


def test_folders_without_classes_say_what_to_do(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    with pytest.raises(UserError, match=r"(?s)the images of .* have no labels.*metadata.csv"):
        read_images(str(tmp_path / "a"))
    picture(tmp_path / "b" / "PetImages" / "cat" / "1.png")
    picture(tmp_path / "b" / "PetImages" / "dog" / "1.png")
    with pytest.raises(UserError, match=r"(?s)lie in one folder, PetImages.*give that folder"):
        read_images(str(tmp_path / "b"))


def test_labels_in_metadata(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "one" / "images" / f"{i}.png", seed=i)
    rows = "".join(f"images/{i}.png,{'007' if i % 2 else 'NA'},p{i // 2}\n" for i in range(3))
    (tmp_path / "one" / "metadata.csv").write_text("file_name,label,patient\n" + rows)
    found = read_images(str(tmp_path / "one"), group_column="patient")
    assert counts(tmp_path / "one") == {"train": {"007": 1, "NA": 2}}
    assert found.groups == {"train": ["p0", "p0", "p1"]}
    assert found.notes == ["1 file left out (not named by the metadata): images/3.png"]
    for split in ("train", "test"):
        for i in range(2):
            picture(tmp_path / "two" / split / f"{i}.png", seed=i)
        (tmp_path / "two" / split / "metadata.jsonl").write_text(
            '{"file_name": "0.png", "label": 0}\n{"file_name": "1.png", "label": 1}\n'
        )
    assert counts(tmp_path / "two") == {"train": {"0": 1, "1": 1}, "test": {"0": 1, "1": 1}}
    (tmp_path / "one" / "metadata.csv").write_text("file_name,label\n../outside.png,a\n")
    with pytest.raises(UserError, match=r"names .*outside.png, which is no image in"):
        read_images(str(tmp_path / "one"))


@pytest.mark.parametrize("label", ["a", "b"])
def test_an_image_that_metadata_name_twice(tmp_path: Path, label: str) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png", seed=i)
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n0.png,a\n1.png,b\n./0.png,{label}\n")
    with pytest.raises(UserError, match=r"0\.png has two rows in .*metadata\.csv, so it would count twice"):
        read_images(str(tmp_path))


def test_images_twice_in_two_formats(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/1.bmp", "dog/1.png"):
        picture(tmp_path / name, name[-3:].upper())
    assert (
        "2 files differ from another one only in their format, such as cat/1.bmp" in read_images(str(tmp_path)).notes[0]
    )
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/1.png,a\ndog/1.png,b\n")
    assert counts(tmp_path) == {"train": {"a": 1, "b": 1}}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat/1.png", "label": "a"}\n')
    with pytest.raises(UserError, match=r"metadata.csv and metadata.jsonl describe the same images"):
        read_images(str(tmp_path))
