"""Datasets of images: folders, tables and arrays become splits of bytes, or one message says what must change."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_images import encoded, some_images
from trainer.data import sources, targets
from trainer.data.image_data import read_images, stacked
from trainer.data.image_files import IMAGES
from trainer.data.labelled_files import chosen
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")


def class_folders(folder: Path, splits: tuple[str, ...] = ("train", "test"), side: int = 6) -> Path:
    """Two classes of three RGB images in each split."""
    for i, split in enumerate(splits):
        for j, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for k in range(3):
                pixels = some_images(side, side, 3, seed=100 * i + 10 * j + k)
                Image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    return folder


def test_class_folders(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets")
    found = read_images(str(folder))
    assert found.classes == ["cat", "dog"]
    assert list(found.splits) == ["train", "test"]
    assert found.splits["train"].image.shape == (6, 3, 6, 6)
    assert found.splits["test"].label.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.splits["train"].image[4].permute(1, 2, 0), some_images(6, 6, 3, seed=11))
    assert found.notes == []


def test_files_are_where_they_are_today(tmp_path: Path) -> None:
    """Also if the cache was made where they were yesterday."""
    folder = class_folders(tmp_path / "pets")
    for name in ("pets", "moved"):
        found = read_images(str(tmp_path / name))
        assert found.files is not None
        files = found.files()
        assert files["test"][1] == f"{tmp_path}/{name}/test/cat/1.png"
        for split, part in found.splits.items():
            pixels = [np.array(Image.open(file)).transpose(2, 0, 1) for file in files[split]]
            np.testing.assert_array_equal(part.image, pixels)
        if name == "pets":
            folder.rename(tmp_path / "moved")
    np.savez(tmp_path / "a.npz", x=some_images(4, 5, 5, 3), y=[0, 1, 0, 1])
    assert read_images(str(tmp_path / "a.npz")).files is None


def test_parquet_and_save_to_disk_with_labels_as_strings(tmp_path: Path) -> None:
    import datasets

    pixels = some_images(4, 5, 5, 3)
    table = datasets.Dataset.from_dict(
        {
            "photo": [{"bytes": encoded(Image.fromarray(p)), "path": None} for p in pixels],
            "kind": ["b", "a", "b", "a"],
            "n": [1, 2, 3, 4],
        }
    )
    table.to_parquet(tmp_path / "table.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("table.parquet", "saved"):
        found = read_images(str(tmp_path / name), image_column="photo", wish=targets.Wish(column="kind"))
        assert found.classes == ["a", "b"]
        assert found.splits["train"].label.tolist() == [1, 0, 1, 0]
        np.testing.assert_array_equal(found.splits["train"].image.permute(0, 2, 3, 1), pixels)
    with pytest.raises(UserError, match=r"image_column.* is needed.*photo, kind"):
        read_images(str(tmp_path / "table.parquet"), wish=targets.Wish(column="kind"))
    with pytest.raises(UserError, match="have no labels, only the columns photo, kind, n"):
        read_images(str(tmp_path / "table.parquet"), image_column="photo")
    with pytest.raises(UserError, match=r'The column "n" holds 1 \(int\), not images\. Name the right one'):
        read_images(str(tmp_path / "table.parquet"), image_column="n", wish=targets.Wish(column="kind"))


def test_grey_and_colour_together_become_colour(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets", ("train",))
    grey = some_images(6, 6, seed=5)
    Image.fromarray(grey).save(folder / "train" / "cat" / "1.png")
    found = read_images(str(folder))
    np.testing.assert_array_equal(found.splits["train"].image[1], np.stack([grey] * 3))
    assert found.notes == ["1 image had to be made RGB, because others are not grey"]
    assert read_images(str(folder), channels=1).splits["train"].image.shape == (6, 1, 6, 6)


def test_the_second_call_reads_the_cache_and_needs_no_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = class_folders(tmp_path / "pets")
    first = read_images(str(folder), size=(5, 5))
    assert first.notes == ["12 images had to be resized to 5 x 5"]
    for name in ("datasets", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)  # any import of it is an error
    again = read_images(str(folder), size=(5, 5))
    assert torch.equal(again.splits["test"].image, first.splits["test"].image)
    assert torch.equal(again.splits["test"].digest, first.splits["test"].digest)
    assert (again.classes, again.notes) == (first.classes, first.notes)
    with pytest.raises(ImportError):
        read_images(str(folder), size=(4, 4))
    (folder / "train" / "cat" / "0.png").write_bytes((folder / "train" / "cat" / "1.png").read_bytes())
    with pytest.raises(ImportError):
        read_images(str(folder), size=(5, 5))


def test_mean_and_std_of_any_choice(tmp_path: Path) -> None:
    x, y = some_images(9, 4, 6, 3), np.arange(9) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    rows = np.array([1, 2, 5, 8])
    mean, std = read_images(str(tmp_path / "a.npz")).splits["train"].select(rows).mean_and_std()
    np.testing.assert_allclose(mean, (x[rows] / 255).mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(std, (x[rows] / 255).std((0, 1, 2)), atol=1e-6)


def test_a_channel_that_is_constant_is_only_centred(tmp_path: Path) -> None:
    x = some_images(4, 5, 5, 3)
    x[..., 1] = 51
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(4) % 2)
    mean, std = read_images(str(tmp_path / "a.npz")).splits["train"].mean_and_std()
    assert (mean[1], std[1]) == (0.2, 1.0)
    assert std[0] < 0.5


def test_images_are_the_same_where_their_digests_are(tmp_path: Path) -> None:
    x = some_images(4, 5, 5)
    x[2] = x[0]
    x[3] = x[1]
    x[3, 0, 0] ^= 1
    np.savez(tmp_path / "a.npz", train_x=x, train_y=[0, 1, 0, 1], test_x=x[:1], test_y=[0])
    splits = read_images(str(tmp_path / "a.npz")).splits
    digests = [bytes(row.tolist()) for row in splits["train"].digest]
    assert digests[0] == digests[2] == bytes(splits["test"].digest[0].tolist())
    assert len(set(digests)) == 3


def test_some_images_of_a_split_keep_their_labels_and_digests(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=some_images(6, 4, 4), y=np.arange(6) % 3)
    whole = read_images(str(tmp_path / "a.npz")).splits["train"]
    rows = [4, 0, 5]
    some = whole.select(np.array(rows))
    for name in ("image", "label", "sums", "digest"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[rows]), name


def test_stacking_does_not_hold_the_images_twice() -> None:
    """Grey images among colour ones get three channels alike; the list gives up what it held."""
    colour, grey = some_images(5, 6, 3), some_images(5, 6, seed=1)
    images = [colour, grey]
    result = stacked(images, 3).numpy()
    np.testing.assert_array_equal(result[0], colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(result[1], np.stack([grey] * 3))
    assert [image.size for image in images] == [0, 0]


# ---------------------------------------------------------------- what must change


def test_splits_of_one_dataset_have_the_same_columns_and_classes(tmp_path: Path) -> None:
    import datasets

    picture = {"bytes": encoded(Image.fromarray(some_images(4, 4))), "path": None}

    def table(name: str, classes: list[str], column: str = "label") -> str:
        features = datasets.Features({"image": datasets.Image(), column: datasets.ClassLabel(names=classes)})
        datasets.Dataset.from_dict({"image": [picture] * 2, column: [0, 1]}, features).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    train = table("train.parquet", ["cat", "dog"])
    turned = read_images({"train": train, "test": table("turned.parquet", ["dog", "cat"])})
    assert turned.splits["test"].label.tolist() == [1, 0], "classes are the same by their names"
    with pytest.raises(UserError, match='the split test has no column "label", only image, kind'):
        read_images({"train": train, "test": table("other.parquet", ["cat", "dog"], "kind")})


@pytest.mark.parametrize("option", ["config_name", "split_column", "image_column", "group_column"])
def test_options_of_tables_are_refused_for_arrays(option: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=some_images(2, 4, 4), y=[0, 1])
    with pytest.raises(UserError, match=rf'"trainer\.task_options\.{option}" has no effect on an \.npz file'):
        read_images(str(tmp_path / "a.npz"), **{option: "x"})  # type: ignore[arg-type]


def test_unreadable_images_are_named_all_at_once(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets")
    (folder / "train" / "cat" / "1.png").write_bytes(b"nonsense")
    whole = (folder / "test" / "dog" / "2.png").read_bytes()
    (folder / "train" / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError, match=r"(?s)2 images cannot be read:\n.*cat/1\.png \(no kind of image.*dog/2\.png \("
    ):
        read_images(str(folder))
    assert not list((tmp_path / "cache").glob("*.safetensors"))


def test_missing_images_and_labels(tmp_path: Path) -> None:
    import datasets

    good = {"bytes": encoded(Image.fromarray(some_images(4, 4))), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": [good, None], "label": ["a", "b"]}, features).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"row 2 of train \(missing\)"):
        read_images(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_dict({"image": [good, good], "label": ["a", None]}, features).to_parquet(
        tmp_path / "b.parquet"
    )
    with pytest.raises(UserError, match=r'1 value of the column "label" in train is missing \(row 2'):
        read_images(str(tmp_path / "b.parquet"))


def test_a_table_that_only_names_its_images(tmp_path: Path) -> None:
    Image.fromarray(some_images(4, 4)).save(tmp_path / "1.png")
    (tmp_path / "table.csv").write_text(f"image,label\n{tmp_path}/1.png,a\n{tmp_path}/1.png,b\n")
    with pytest.raises(UserError, match=r"(?s)only names its images.*metadata\.csv"):
        read_images(str(tmp_path / "table.csv"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        Image.fromarray(some_images(4, 4)).save(folder / name)
    (folder / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\n")
    assert read_images(str(folder)).classes == ["a", "b"]


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path / "bad.npz", **arrays)
    return str(path / "bad.npz")


def test_npz_files_that_must_change(tmp_path: Path) -> None:
    x, y = some_images(4, 5, 5), np.array([0, 1, 0, 1])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a": x}, "needs the arrays train_x and train_y.*It has a"),
        ({"x": x, "y": y[:3]}, r"y has the shape \(3,\), but x has 4 images"),
        ({"x": x, "y": y / 2}, "A label in train is 0.5. .*.problem_type.: .regression."),
        ({"x": x[:0], "y": y[:0]}, "the split train of .* is empty"),
        ({"x": x, "y": y, "test_x": x, "test_y": y + 1}, "The label 2 occurs 2 times in test, but never in train"),
        ({"x": x, "y": y * 0}, "at least two classes"),
        ({"x": x, "y": y, "test_x": x[:, 1:], "test_y": y}, r"(?s)differ in size.*5 x 5.*4 x 5.*Set image_size"),
    ]
    for arrays, message in cases:
        with pytest.raises(UserError, match=message):
            read_images(npz(tmp_path, **arrays))
    with pytest.raises(UserError, match="does not exist"):
        read_images(str(tmp_path / "none.npz"))


def test_files_of_a_folder_come_by_name(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets", ("train",))
    (folder / "notes.txt").write_text("no image")
    (folder / "train" / "cat" / "2.png").rename(folder / "train" / "cat" / "2.PNG")
    (folder / "train" / "folder.png").mkdir()
    found = sources.find(str(folder))
    assert found is not None
    names = [found.name(p).lower() for p in chosen(found, IMAGES)[0]]
    assert names == [f"train/{name}.png" for name in ("cat/0", "cat/1", "cat/2", "dog/0", "dog/1", "dog/2")]
