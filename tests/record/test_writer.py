"""What a run writes down while it goes on: a line of JSON a record, and the same in TensorBoard."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.record.writer import Writer


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = events_of(folder)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_record(tmp_path: Path) -> None:
    writer = Writer(tmp_path, tensorboard=False)
    writer.describe({"config": "x"}, {"run/world_size": 2})
    writer.write({"step": 10, "epoch": 1, "train/loss": 0.1 + 0.2})
    # Readable while the run goes on.
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 10, "epoch": 1, "train/loss": 0.1 + 0.2}
    writer.write({"step": 20, "epoch": 1, "train/loss": math.nan})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail) == {"step": 20, "epoch": 1, "train/loss": None}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    writer = Writer(tmp_path, tensorboard=True)
    writer.describe({"config": "a text"}, {"run/world_size": 2})
    writer.write({"step": 10, "epoch": 1, "train/loss": 0.5})
    writer.write({"step": 20, "epoch": 2, "eval/test/accuracy": 0.75})
    writer.close()
    assert scalars(tmp_path) == {
        "run/world_size": [(0, 2.0)],
        "train/loss": [(10, 0.5)],
        "train/epoch": [(10, 1.0), (20, 2.0)],
        "eval/test/accuracy": [(20, 0.75)],
    }
    (text,) = events_of(tmp_path).Tensors("config/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (0, [b"a text"])


def test_pictures_are_in_tensorboard_pixel_by_pixel(tmp_path: Path) -> None:
    picture = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    writer = Writer(tmp_path, tensorboard=True)
    writer.draw({"test/slice": picture}, 7)
    writer.close()
    (event,) = events_of(tmp_path).Images("test/slice")
    assert event.step == 7
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert np.array_equal(shown, picture.permute(1, 2, 0).numpy())


def test_without_tensorboard_nothing_is_drawn(tmp_path: Path) -> None:
    writer = Writer(tmp_path, tensorboard=False)
    writer.draw({"test/slice": torch.zeros(3, 4, 5, dtype=torch.uint8)}, 7)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# A run that goes on


def test_a_run_that_goes_on_makes_later_records_anew(tmp_path: Path) -> None:
    """It was killed after step 30, and its last checkpoint is of step 20."""
    killed = Writer(tmp_path, tensorboard=True)
    for step in (10, 20, 30):
        killed.write({"step": step, "epoch": 1, "train/loss": 1.0})
    killed.close()
    writer = Writer(tmp_path, tensorboard=True, after_step=20)
    assert [record["step"] for record in records(tmp_path)] == [10, 20]
    for step in (30, 40):
        writer.write({"step": step, "epoch": 2, "train/loss": 0.5})
    writer.close()
    expected = [(10, 1.0), (20, 1.0), (30, 0.5), (40, 0.5)]
    assert [(record["step"], record["train/loss"]) for record in records(tmp_path)] == expected
    assert scalars(tmp_path)["train/loss"] == expected


@pytest.mark.parametrize(
    "damage",
    ['{"step": 20, "epoch": 1, "train/lo', '{"step": 20}', "\n\n", "not JSON\n", "[20]\n", '{"epoch": 1}\n', "3\n"],
    ids=["a line that was cut off", "one without its end", "empty", "no JSON", "a list", "without a step", "a number"],
)
def test_lines_that_are_damaged_are_dropped(tmp_path: Path, damage: str) -> None:
    good = '{"step": 10, "epoch": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(good + damage)
    writer = Writer(tmp_path, tensorboard=False, after_step=50)
    writer.write({"step": 60, "epoch": 2})
    writer.close()
    assert records(tmp_path) == [{"step": 10, "epoch": 1}, {"step": 60, "epoch": 2}]


def test_a_run_that_goes_on_without_its_log(tmp_path: Path) -> None:
    """As where only the checkpoint was copied."""
    writer = Writer(tmp_path, tensorboard=False, after_step=50)
    writer.write({"step": 60, "epoch": 2})
    writer.close()
    assert records(tmp_path) == [{"step": 60, "epoch": 2}]


def test_a_new_run_keeps_nothing_of_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "epoch": 0}\n')
    Writer(tmp_path, tensorboard=False).close()
    assert records(tmp_path) == []
