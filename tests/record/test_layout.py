"""What TensorBoard's Custom Scalars tab shows of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.record.board import provider_of
from tests.record.test_writer import events_of
from trainer.record.layout import stacked
from trainer.record.writer import Writer

PHASES = {"throughput/data_ms": 1.0, "throughput/compute_ms": 5.0, "throughput/reduce_ms": 2.0}
PHASES |= {"throughput/optimizer_ms": 0.5, "throughput/step_time_ms": 9.0}


def charts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Category -> chart -> its patterns, of all runs in a folder together, as the tab gets them."""
    from tensorboard import context
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

    plugin = CustomScalarsPlugin(base_plugin.TBContext(data_provider=provider_of(folder), logdir=str(folder)))
    found: Any = json.loads(plugin.layout_impl(context.RequestContext(), "x"))
    return {c["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in c["chart"]} for c in found["category"]}


def test_the_time_of_a_step_is_a_stack() -> None:
    assert list(stacked(PHASES).values()) == [1.0, 6.0, 8.0, 8.5, 9.0]
    assert stacked({"eval/test/loss": 0.5}) == {}


def test_loss_validation_throughput_and_the_time_of_a_step_come_first(tmp_path: Path) -> None:
    for name, tokens in (("a", False), ("b", True), ("c", False)):
        (tmp_path / name).mkdir()
        writer = Writer(tmp_path / name, tensorboard=True)
        writer.arrange(tokens=tokens, mfu=False)
        writer.write({"step": 10, "epoch": 1, "train/loss": 0.5, "throughput/samples_per_s": 3.0} | PHASES)
        writer.write({"step": 10, "epoch": 1, "eval/validation/loss": 0.5, "eval/validation/accuracy": 0.7})
        writer.close()
    found = charts(tmp_path)
    assert list(found)[:3] == ["Model", "Throughput", "Time of a step"]
    assert list(found["Model"]) == ["loss", "validation and test"]
    assert set(found["Throughput"]) == {"samples a second", "tokens a second", "model TFLOP/s"}, "no MFU: no peak"

    provider = provider_of(tmp_path)
    from tensorboard import context

    tags = provider.list_scalars(context.RequestContext(), experiment_id="x", plugin_name="scalars")["a/tensorboard"]

    def shown(category: str, title: str) -> list[str]:
        return [tag for tag in tags if any(re.match(pattern, tag) for pattern in found[category][title])]

    assert set(shown("Model", "loss")) == {"train/loss", "eval/validation/loss"}
    assert shown("Model", "validation and test") == ["eval/validation/accuracy"]
    assert shown("Throughput", "samples a second") == ["throughput/samples_per_s"]
    assert len(shown("Time of a step", "milliseconds, stacked")) == 5
    assert len(shown("Time of a step", "milliseconds of each phase")) == 4


def test_the_stack_is_for_tensorboard_only(tmp_path: Path) -> None:
    writer = Writer(tmp_path, tensorboard=True)
    writer.write({"step": 10, "epoch": 1} | PHASES)
    writer.close()
    assert "step_time_ms/" not in (tmp_path / "metrics.jsonl").read_text()
    assert events_of(tmp_path).Scalars("step_time_ms/5_to_end")[0].value == pytest.approx(9.0)
