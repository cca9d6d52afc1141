"""Reading and decoding images, and what is done to whole batches of them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.data import image_data
from trainer.data.image_data import read_images
from trainer.data.images import decode, erase, normalise, shift_and_flip
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")


def some_images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def class_folders(folder: Path, splits: tuple[str, ...] = ("train", "test"), side: int = 6) -> Path:
    """Two classes of three RGB images in each split."""
    for i, split in enumerate(splits):
        for j, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for k in range(3):
                pixels = some_images(side, side, 3, seed=100 * i + 10 * j + k)
                Image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    return folder


# ---------------------------------------------------------------- batches


def shifted_and_flipped(image: np.ndarray, padding: int, row: int, column: int, flipped: bool) -> np.ndarray:
    """The slow reference, for one image (C, H, W)."""
    C, H, W = image.shape
    padded = np.zeros((C, H + 2 * padding, W + 2 * padding), image.dtype)
    padded[:, padding : padding + H, padding : padding + W] = image
    crop = padded[:, row : row + H, column : column + W]
    return crop[:, :, ::-1] if flipped else crop


@pytest.mark.parametrize("shape", [(9, 1, 7, 5), (9, 3, 6, 8)])
@pytest.mark.parametrize(("padding", "mirror"), [(0, True), (2, False), (3, True)])
def test_crops_and_flips_against_one_image_at_a_time(shape: tuple[int, ...], padding: int, mirror: bool) -> None:
    pixels = some_images(*shape)
    rng = np.random.default_rng(1)
    moves = rng.integers(0, 2 * padding + 1, (len(pixels), 2))
    flipped = rng.random(len(pixels)) < 0.5
    assert 0 < flipped.sum() < len(flipped)
    ours = shift_and_flip(
        torch.from_numpy(pixels), padding, torch.from_numpy(moves), torch.from_numpy(flipped) if mirror else None
    )
    assert ours.is_contiguous()
    for image, (row, column), flip, result in zip(pixels, moves, flipped, ours.numpy()):
        np.testing.assert_array_equal(result, shifted_and_flipped(image, padding, row, column, mirror and bool(flip)))


def erased(image: np.ndarray, probability: float, draws: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """The slow reference, for one image (C, H, W); draws (5,) float32."""
    image, (_, H, W) = image.copy(), image.shape
    whether, area, ratio, row, column = (np.float32(d) for d in draws)
    if whether >= probability:
        return image
    area = (np.float32(0.02) + np.float32(0.4 - 0.02) * area) * np.float32(H * W)
    ratio = np.float32(0.3) + np.float32(1 / 0.3 - 0.3) * ratio
    height = min(max(int(np.round(np.sqrt(area * ratio))), 1), H)
    width = min(max(int(np.round(np.sqrt(area / ratio))), 1), W)
    top, left = int(row * np.float32(H - height + 1)), int(column * np.float32(W - width + 1))
    image[:, top : top + height, left : left + width] = fill[:, None, None]
    return image


def test_erasing_against_one_image_at_a_time() -> None:
    pixels, fill = some_images(200, 3, 9, 11), np.array([7, 8, 9], np.uint8)
    draws = np.random.default_rng(2).random((200, 5), dtype=np.float32)
    ours = erase(torch.from_numpy(pixels), 0.7, torch.from_numpy(draws), torch.from_numpy(fill)).numpy()
    for image, numbers, result in zip(pixels, draws, ours):
        np.testing.assert_array_equal(result, erased(image, 0.7, numbers, fill))
    changed = (ours != pixels).any(axis=(1, 2, 3))
    assert 0.6 < changed.mean() < 0.8
    # All of an image's area is within reach, its corners included.
    assert (ours != pixels).any(axis=(0, 1)).all()


def test_normalisation_against_float64() -> None:
    pixels = some_images(4, 3, 5, 5)
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    scale, shift = ((torch.from_numpy(v).float().view(1, 3, 1, 1)) for v in (1 / (255 * std), -mean / std))
    ours = normalise(torch.from_numpy(pixels), scale, shift)
    expected = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- one image


def test_grey_stays_grey_unless_told() -> None:
    pixels = some_images(5, 7)
    data = encoded(Image.fromarray(pixels))
    np.testing.assert_array_equal(decode(data, None, None)[0], pixels)
    np.testing.assert_array_equal(decode(data, 3, None)[0], np.repeat(pixels[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 65535, 32768]], np.uint16)
    pixels, done = decode(encoded(Image.fromarray(values)), None, None)
    np.testing.assert_array_equal(pixels, [[0, 1, 255, 128]])
    assert "16 bits" in done


def test_orientation_transparency_palette_and_one_bit() -> None:
    picture = Image.fromarray(some_images(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    pixels, done = decode(encoded(picture, exif=exif.tobytes()), None, None)
    np.testing.assert_array_equal(pixels, np.rot90(np.array(picture), -1))
    assert "EXIF" in done

    clear = picture.convert("RGBA")
    clear.putalpha(3)
    pixels, done = decode(encoded(clear), None, None)
    np.testing.assert_array_equal(pixels, np.array(picture))
    assert "transparency" in done

    palette = picture.quantize(8)
    assert decode(encoded(palette), None, None)[0].shape == (4, 6, 3)
    assert "transparency" in decode(encoded(palette, transparency=b"\x00\x80"), None, None)[1]
    assert set(np.unique(decode(encoded(picture.convert("1")), None, None)[0])) <= {0, 255}
    assert "made grey" in decode(encoded(picture), 1, None)[1]


def test_resizing_is_pillows_bilinear() -> None:
    picture = Image.fromarray(some_images(8, 6, 3))
    pixels, done = decode(encoded(picture), None, (4, 5))
    np.testing.assert_array_equal(pixels, np.array(picture.resize((5, 4), Image.Resampling.BILINEAR)))
    assert "resized to 4 x 5" in done


def test_pixels_that_are_no_bytes_are_refused() -> None:
    for values in (np.full((2, 2), 0.5, np.float32), np.array([[1, 70000]], np.int32), np.array([[-1, 3]], np.int32)):
        with pytest.raises(ValueError, match="8 or 16 bits"):
            decode(encoded(Image.fromarray(values), "tiff"), None, None)
    small = np.array([[1, 255]], np.int32)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(small), "tiff"), None, None)[0], small)


# ---------------------------------------------------------------- datasets


def test_class_folders(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets")
    found = read_images(str(folder))
    assert found.classes == ["cat", "dog"]
    assert list(found.splits) == ["train", "test"]
    assert found.splits["train"].image.shape == (6, 3, 6, 6)
    assert found.splits["test"].label.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(found.splits["train"].image[4].permute(1, 2, 0), some_images(6, 6, 3, seed=11))
    assert found.notes == []


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
        found = read_images(str(tmp_path / name), image_column="photo", label_column="kind")
        assert found.classes == ["a", "b"]
        assert found.splits["train"].label.tolist() == [1, 0, 1, 0]
        np.testing.assert_array_equal(found.splits["train"].image.permute(0, 2, 3, 1), pixels)
    with pytest.raises(UserError, match=r"image_column.* is needed.*photo, kind"):
        read_images(str(tmp_path / "table.parquet"), label_column="kind")
    with pytest.raises(UserError, match="have no labels, only the columns photo, kind, n"):
        read_images(str(tmp_path / "table.parquet"), image_column="photo")
    with pytest.raises(UserError, match=r'The column "n" holds .*int64.*, not images'):
        read_images(str(tmp_path / "table.parquet"), image_column="n", label_column="kind")


def test_npz_of_every_style(tmp_path: Path) -> None:
    x, y = some_images(5, 4, 4), np.array([0, 1, 0, 1, 1])
    np.savez(tmp_path / "ours.npz", train_x=x, train_y=y, validation_x=x[:2], validation_y=y[:2], test_index=y)
    np.savez(tmp_path / "keras.npz", x_train=x, y_train=y, x_test=x[2:], y_test=y[2:])
    np.savez(tmp_path / "medmnist.npz", train_images=x, train_labels=y[:, None], val_images=x, val_labels=y[:, None])
    np.savez(tmp_path / "plain.npz", x=x[..., None], y=np.array(["v", "u", "v", "u", "u"]))
    for name, splits in (
        ("ours", {"train": 5, "validation": 2}),
        ("keras", {"train": 5, "test": 3}),
        ("medmnist", {"train": 5, "validation": 5}),
        ("plain", {"train": 5}),
    ):
        found = read_images(str(tmp_path / f"{name}.npz"))
        assert {n: len(s.image) for n, s in found.splits.items()} == splits
        np.testing.assert_array_equal(found.splits["train"].image[:, 0], x)
        expected = [1, 0, 1, 0, 0] if name == "plain" else y.tolist()
        assert found.splits["train"].label.tolist() == expected
    assert found.classes == ["u", "v"]


def test_grey_and_colour_together_become_colour(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets", ("train",))
    grey = some_images(6, 6, seed=5)
    Image.fromarray(grey).save(folder / "train" / "cat" / "1.png")
    found = read_images(str(folder))
    np.testing.assert_array_equal(found.splits["train"].image[1], np.stack([grey] * 3))
    assert found.notes == ["1 image had to be made RGB, since others are not grey"]
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


# ---------------------------------------------------------------- what must change


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
    with pytest.raises(UserError, match=r"row 1 of train \(missing\)"):
        read_images(str(tmp_path / "a.parquet"))
    datasets.Dataset.from_dict({"image": [good, good], "label": ["a", None]}, features).to_parquet(
        tmp_path / "b.parquet"
    )
    with pytest.raises(UserError, match=r'1 value of the column "label" in train is missing \(row 1'):
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
        ({"x": x / 255, "y": y}, r"(?s)x is float64 of shape \(4, 5, 5\).*astype\(numpy.uint8\)"),
        ({"x": x.reshape(4, 1, 5, 5), "y": y}, r"(?s)shape \(4, 1, 5, 5\).*transpose"),
        ({"x": x, "y": y[:3]}, r"y has the shape \(3,\), but x has 4 images"),
        ({"x": x, "y": y / 2}, "A label in train is 0.0. Labels are whole numbers or strings"),
        ({"x": x, "y": np.array([0, None, 1, 0], dtype=object)}, "(?s)Python objects.*not loaded"),
        ({"x": x[:0], "y": y[:0]}, "the split train of .* is empty"),
        ({"x": x, "y": y, "test_x": x, "test_y": y + 1}, "(?s)label 2 occurs 2 times in test, but never in train"),
        ({"x": x, "y": y * 0}, "at least two classes"),
        ({"x": x, "y": y, "test_x": x[:, 1:], "test_y": y}, r"(?s)differ in size.*5 x 5.*4 x 5.*Set image_size"),
    ]
    for arrays, message in cases:
        with pytest.raises(UserError, match=message):
            read_images(npz(tmp_path, **arrays))
    (tmp_path / "bad.npz").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
        read_images(str(tmp_path / "bad.npz"))
    with pytest.raises(UserError, match="does not exist"):
        read_images(str(tmp_path / "none.npz"))


def test_files_of_a_folder_come_by_name(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "pets", ("train",))
    (folder / "notes.txt").write_text("no image")
    names = [str(p.relative_to(folder)) for p in image_data.files_in(folder)]
    assert names == [f"train/{c}/{k}.png" for c in ("cat", "dog") for k in range(3)]
