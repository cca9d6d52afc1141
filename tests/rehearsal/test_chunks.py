"""Which augmentations may see several micro-batches at once: those of the built-in tasks, and none by mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tasks.test_audio_classification import built as built_of_sound
from tests.tasks.test_image_classification import built
from tests.tasks.test_nodules import write_balls
from trainer.exact.order import SampleRandom
from trainer.rehearsal.chunks import objection
from trainer.tasks.protocol import load_task

Load = Callable[[range, bool], list[dict[str, Tensor]]]


def loader(augment: Callable[..., Any], arrays: dict[str, Tensor], size: int, samples: int) -> Load:
    """Micro-batches of `size` samples, augmented together or each by itself."""
    random = SampleRandom(0, samples, torch.device("cpu"))

    def load(micro_batches: range, together: bool) -> list[dict[str, Tensor]]:
        def of(first: int, last: int) -> dict[str, Tensor]:
            indices = torch.arange(first * size, last * size)
            gathered = {name: array.index_select(0, indices) for name, array in arrays.items()}
            return dict(augment(gathered, random.of(indices)))

        if not together:
            return [of(j, j + 1) for j in micro_batches]
        whole = of(micro_batches.start, micro_batches.stop)
        rows = [slice(k * size, (k + 1) * size) for k in range(len(micro_batches))]
        return [{name: array[row] for name, array in whole.items()} for row in rows]

    return load


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_built_in_tasks_keep_their_word(tmp_path: Path, size: int, own_caches: None) -> None:
    """The same bits together and alone, and no operator that could make a difference elsewhere."""
    digits: Any = load_task("digits", {})
    options = {"crop_padding": 2, "flip": True, "erasing": 0.7}
    images, _, _ = built(tmp_path, **options)
    sound, _, _ = built_of_sound(tmp_path, each=8, shift_seconds=0.1, mask_seconds=0.1, mask_bands=9)
    nodules: Any = load_task("nodules", {"data": str(write_balls(tmp_path / "balls.npz"))})
    for task in (digits, images, sound, nodules):
        train = task.splits()["train"]
        arrays = train if isinstance(train, dict) else train.arrays
        assert task.augment_in_chunks
        count = min(5, len(next(iter(arrays.values()))) // size)
        samples = len(next(iter(arrays.values())))
        assert objection(loader(task.augment, arrays, size, samples), range(count)) is None, type(task).__name__


X = {"x": torch.linspace(-2, 2, 35 * 19).view(35, 19)}


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (lambda batch, random: {"x": batch["x"] * torch.sigmoid(batch["x"])}, "it calls sigmoid"),
        (lambda batch, random: {"x": batch["x"] ** 1.7}, "it calls pow"),
        (lambda batch, random: {"x": batch["x"] @ torch.eye(19)}, "mm, which may give"),
        (lambda batch, random: {"x": batch["x"] + random.normal(19)}, "log1p"),
        (lambda batch, random: {"x": torch.add(batch["x"], batch["x"], alpha=0.3)}, "it calls add with alpha"),
        (lambda batch, random: {"x": batch["x"].flip(0)}, "it gives other values for 'x'"),
        (lambda batch, random: {"x": batch["x"] - batch["x"][:1]}, "it gives other values for 'x'"),
    ],
)
def test_what_could_depend_on_the_size_is_found(augment: Callable[..., Any], words: str) -> None:
    assert words in str(objection(loader(augment, X, 7, 35), range(5)))


def test_gathers_and_plain_arithmetic_pass() -> None:
    def augment(batch: dict[str, Tensor], random: SampleRandom) -> dict[str, Tensor]:
        x = torch.where(random.uniform(1) < 0.5, batch["x"], batch["x"].flip(1))
        x = x.gather(1, random.integers(19, 19)).clamp(-1, 1)
        return {"x": (0.1 * random.uniform(19) + x) / 3 - x.abs().sqrt()}

    assert objection(loader(augment, X, 7, 35), range(5)) is None
