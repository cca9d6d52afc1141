"""The task digits: scikit-learn's images in fixed splits, moved by whole pixels, and told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.errors import UserError
from trainer.exact.order import SampleRandom
from trainer.tasks.digits import Digits, digit_moves, read_images

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_images_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    theirs: Any = load_digits()
    images, labels = read_images()
    np.testing.assert_array_equal(images, theirs.data)
    np.testing.assert_array_equal(labels, theirs.target)
    assert (images.dtype, labels.dtype) == (np.float32, np.int64)


def test_where_scikit_learn_keeps_its_file_elsewhere_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_images()
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="pip install scikit-learn"):
            read_images()
    for ours, theirs in zip(read_images(), expected):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def rows(splits: dict[str, Any], name: str) -> list[bytes]:
    images, labels = splits[name]["image"].numpy(), splits[name]["label"].numpy()
    return [image.tobytes() + label.tobytes() for image, label in zip(images, labels)]


def test_every_image_is_in_one_split() -> None:
    splits = Digits().splits()
    assert {name: len(split["label"]) for name, split in splits.items()} == {
        "train": 1200,
        "validation": 297,
        "test": 300,
    }
    for split in splits.values():
        assert split["image"].shape[1:] == (1, 8, 8)
        assert split["image"].dtype == torch.float32
        assert float(split["image"].min()) == 0.0 and float(split["image"].max()) == 1.0
    images, labels = read_images()
    every = [image.tobytes() + label.tobytes() for image, label in zip(images / 16, labels)]
    assert sorted(row for name in splits for row in rows(splits, name)) == sorted(every)


def test_the_split_follows_its_own_seed() -> None:
    first, same, other = (Digits(split_seed=seed).splits() for seed in (0, 0, 1))
    assert rows(first, "test") == rows(same, "test")
    assert set(rows(first, "test")) != set(rows(other, "test"))
    # Results of other versions can be compared as long as it stays.
    assert first["train"]["label"][:10].tolist() == [2, 8, 5, 6, 0, 7, 2, 3, 4, 2]


def drawn(samples: int) -> SampleRandom:
    return SampleRandom(0, samples, torch.device("cpu")).of(torch.arange(samples))


@pytest.mark.parametrize("shift", [1, 2])
def test_images_move_by_whole_pixels_and_every_move_comes_up(shift: int) -> None:
    task = Digits(shift=shift)
    train = task.splits()["train"]
    moved = task.augment(train, drawn(1200))
    assert torch.equal(moved["label"], train["label"])
    steps = range(-shift, shift + 1)
    padded = F.pad(train["image"], (shift,) * 4)
    # (moves, 1200): which move could have made each image.
    possible = torch.stack(
        [
            (padded[:, :, shift + y : shift + y + 8, shift + x : shift + x + 8] == moved["image"]).flatten(1).all(1)
            for y in steps
            for x in steps
        ]
    )
    assert possible.any(0).all(), "each is its image moved, with background behind it"
    assert possible.any(1).all(), "and each move is used"
    alone = possible[:, possible.sum(0) == 1].sum(1)
    assert alone.min() > 0.5 * alone.sum() / len(possible), "about equally often"


def test_moves_are_places_in_a_padded_image() -> None:
    assert digit_moves(0).tolist() == [list(range(64))]
    image = torch.arange(64.0).view(1, 1, 8, 8)
    padded = F.pad(image, (1, 1, 1, 1)).flatten()
    moves = digit_moves(1)
    assert moves.shape == (9, 64)
    assert torch.equal(padded[moves[4]], image.flatten()), "the middle one leaves it where it is"
    assert torch.equal(padded[moves[0]].view(8, 8)[1:, 1:], image[0, 0, :-1, :-1])


def test_without_a_shift_nothing_is_drawn() -> None:
    train = Digits().splits()["train"]
    assert Digits(shift=0).augment(train, None) is train  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, {nn.BatchNorm2d: 3, nn.Dropout: 1, nn.Conv2d: 3}),
        ({"norm": "group", "width": 8}, {nn.GroupNorm: 3, nn.BatchNorm2d: 0}),
        ({"model": "mlp", "width": 32}, {nn.Linear: 3, nn.Conv2d: 0}),
    ],
)
def test_the_models_that_the_options_name(options: dict[str, Any], layers: dict[type, int]) -> None:
    task = Digits(dropout=0.25, **options)
    model = task.model()
    batch = {name: array[:5] for name, array in task.splits()["train"].items()}
    with torch.no_grad():
        outputs = task.forward(model, batch)
    assert outputs.shape == (5, 10)
    found = [type(module) for module in model.modules()]
    assert {kind: found.count(kind) for kind in layers} == layers
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}
    first = next(p for p in model.parameters())
    assert len(first) == options.get("width", 16)
    loss, count = task.loss(outputs, batch)
    assert count == 5
    assert float(loss) == pytest.approx(5 * float(F.cross_entropy(outputs, batch["label"])), rel=1e-6)


@pytest.mark.parametrize("options", [{"model": "mlp"}, {"width": 6}])
def test_group_norm_needs_channels_that_four_divides(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r'"trainer\.task_options\.norm": "group" needs the cnn, with a width that 4'):
        Digits(norm="group", **options)


def test_accuracy_is_the_share_of_right_answers() -> None:
    logits = torch.eye(10)[[3, 1, 4, 1]]
    assert Digits().metrics(logits, {"label": torch.tensor([3, 1, 4, 5])}) == {"accuracy": 0.75}


def test_predictions_come_in_order_whatever_the_batch(tmp_path: Path) -> None:
    task = Digits(model="mlp")
    torch.manual_seed(0)
    model = task.model().eval()
    pixels, _ = read_images()
    np.savetxt(tmp_path / "digits.csv", pixels[:10], delimiter=",", fmt="%g")
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels[:10]).view(-1, 1, 8, 8) / 16).argmax(1).tolist()
        for size in (1, 3, 10):
            found = list(task.predict(model, tmp_path / "digits.csv", size))
            assert [row["label"] for row in found] == [str(digit) for digit in expected]
            assert all(0.1 <= row["score"] <= 1 for row in found), "the likeliest of ten"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1,2,3\n", "has 1 line of 3 numbers.\nEach line is one digit: 64 numbers from 0 to 16"),
        (",".join(["0"] * 64) + "\n" + ",".join(["17"] * 64), "row 2 (row 1 is the first sample) has a number below 0"),
        (",".join(["-1"] * 64), "has a number below 0 or above 16"),
        (",".join(["nan"] * 64), "has a number below 0 or above 16"),
        (
            ",".join(["pixel_0_0"] * 64),
            "line 1 holds 'pixel_0_0', which is no number. It looks like a header: remove it.\n",
        ),
        (",".join(["1"] * 64) + "\n" + ",".join(["a"] * 64), "line 2 holds 'a', which is no number.\nEach line"),
        (",".join(["1"] * 64) + "\n1,2,3\n", "line 2 holds 3 numbers, not 64.\nEach line"),
        ("", "has 0 lines"),
        (None, "cannot be read: it is not there"),
    ],
)
def test_an_input_that_holds_no_digits(content: str | None, words: str, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    if content is not None:
        source.write_text(content)
    task = Digits(model="mlp")
    with pytest.raises(UserError) as caught:
        list(task.predict(task.model(), source, 4))
    assert words in str(caught.value)
    assert f"--input {source}" in str(caught.value)
