"""Images in .npz files: the arrays of each split are found by their names, and others than images are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_images import some_images
from trainer.data.image_arrays import pairs, read_npz_images
from trainer.data.image_data import read_images
from trainer.errors import UserError

pytestmark = pytest.mark.usefixtures("own_caches")


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


def test_an_array_without_its_labels_or_of_no_split_is_left_out() -> None:
    names = ["train_x", "train_y", "test_x", "validation_labels", "x_extra_train", "y_mean", "Val_Images", "val_label"]
    assert pairs(names) == {"train": ("train_x", "train_y"), "validation": ("Val_Images", "validation_labels")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x / 255, r"(?s)x is float64 of shape \(4, 5, 5\).*astype\(numpy.uint8\)"),
        (lambda x: x.reshape(4, 1, 5, 5), r"(?s)shape \(4, 1, 5, 5\).*transpose"),
        (lambda x: x[0], r"x is uint8 of shape \(5, 5\)\. Images must be uint8"),
        (lambda x: np.stack([x, x], axis=3), r"\(4, 5, 5, 2\)"),
    ],
)
@pytest.mark.parametrize("predicting", [False, True])
def test_what_is_no_array_of_images_is_refused_with_a_remedy(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], message: str, predicting: bool
) -> None:
    """In training and in prediction alike."""
    np.savez(tmp_path / "bad.npz", x=change(some_images(4, 5, 5)), y=[0, 1, 0, 1])
    with pytest.raises(UserError, match=message):
        read_npz_images(tmp_path / "bad.npz") if predicting else read_images(str(tmp_path / "bad.npz"))


def test_images_to_predict_on_are_those_named_x_or_the_only_ones(tmp_path: Path) -> None:
    x = some_images(3, 4, 4, 1)
    np.savez(tmp_path / "a.npz", x=x, other_x=x[:1], y=[1, 2, 3])
    np.testing.assert_array_equal(read_npz_images(tmp_path / "a.npz"), x[..., 0])
    np.savez(tmp_path / "b.npz", test_images=x, test_labels=[1, 2, 3])
    np.testing.assert_array_equal(read_npz_images(tmp_path / "b.npz"), x[..., 0])
    np.savez(tmp_path / "c.npz", train_x=x, test_x=x)
    with pytest.raises(UserError, match=r"c\.npz needs an array x of images\. It has train_x, test_x"):
        read_npz_images(tmp_path / "c.npz")
