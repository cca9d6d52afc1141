"""What a run leaves behind: files, tags and their contents."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.distributed.jobs import ROOT, USER_TASKS, small_config, train
from tests.standing import run_ranks
from trainer.commands.cli import main as command_line
from trainer.config.keys import load_config
from trainer.errors import UserError
from trainer.ranks.workers import WorkerError
from trainer.tasks.digits import Digits, read_images

SUMMARY_KEYS = {
    "status", "parameters_sha256", "model_sha256", "world_size", "global_batch_size", "micro_batch_size", "steps",
    "metrics", "samples_per_s", "step_time_s", "started_at_s", "time_to_first_step_s", "wall_time_s", "exactness",
    "tokens_per_s", "model_tflops_per_s", "mfu", "best", "inexact", "rehearsal_s", "pack", "saved_model",
}  # fmt: skip
TAGS = {
    "train/loss", "train/learning_rate", "train/grad_norm", "train/epoch",
    "eval/validation/loss", "eval/validation/accuracy", "eval/test/loss", "eval/test/accuracy",
    "throughput/samples_per_s", "throughput/step_time_ms", "throughput/compute_ms", "throughput/reduce_ms",
    "throughput/optimizer_ms", "throughput/data_ms", "throughput/eval_ms", "memory/host_peak_gib",
    "run/world_size", "run/global_batch_size",
}  # fmt: skip


def test_the_output_folder_of_digits(tmp_path: Path) -> None:
    overrides = {"trainer.epochs": 3, "trainer.output_dir": str(tmp_path / "run"), "trainer.log_every_steps": 4}
    config = load_config(ROOT / "ds_configs" / "strong.json", overrides)
    run_ranks(train, 2, config)
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert (summary["world_size"], summary["global_batch_size"], summary["micro_batch_size"]) == (2, 256, 8)
    assert summary["steps"] == 15
    assert summary["samples_per_s"] * summary["step_time_s"] == pytest.approx(240, rel=0.1)
    assert 0 < summary["time_to_first_step_s"] < summary["wall_time_s"]

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["trainer"]["epochs"] == 3
    assert manifest["seed"] == 0
    assert manifest["samples"] == {"train": 1200, "validation": 297, "test": 300}
    assert set(manifest["data_sha256"]) == {"train", "validation", "test"}
    for fact in ("torch", "deepspeed", "python", "device_model", "cpu_threads", "code_sha256"):
        assert manifest["facts"][fact]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    windows = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in windows] == [4, 8, 12, 15]
    assert [line["epoch"] for line in windows] == [1, 2, 3, 3]
    phases = [sum(line[f"throughput/{p}_ms"] for p in ("data", "compute", "reduce", "optimizer")) for line in windows]
    for line, total in zip(windows, phases, strict=True):
        assert total <= line["throughput/step_time_ms"] * 1.01

    # The saved model is the measured one: its own test accuracy, computed here.
    task = Digits()
    model = task.model()
    model.load_state_dict(load_file(folder / "model" / "model.safetensors"))
    model.eval()
    test_split = task.splits()["test"]
    with torch.no_grad():
        accuracy = (model(test_split["image"]).argmax(1) == test_split["label"]).double().mean().item()
    assert summary["metrics"]["test"]["accuracy"] == pytest.approx(accuracy)
    assert "DeepSpeed" in (folder / "logs" / "deepspeed.log").read_text()


def test_tensorboard_has_every_tag(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    overrides = {"trainer.epochs": 2, "trainer.output_dir": str(tmp_path / "run"), "trainer.log_every_steps": 2}
    run_ranks(train, 1, load_config(ROOT / "ds_configs" / "strong.json", overrides))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= TAGS
    assert {"config/text_summary", "exactness/text_summary"} <= set(tags["tensors"])
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"train_batch_size": 256' in text
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [2, 4, 6, 8, 10]
    assert all(math.isfinite(event.value) for event in losses)


def test_quickstart_learns_the_digits(tmp_path: Path) -> None:
    """The default run, whole: what the README promises of it, with room for other machines' rounding."""
    config = load_config(ROOT / "ds_configs" / "strong.json", {"trainer.output_dir": str(tmp_path / "run")})
    summary = run_ranks(train, 2, config)[0]
    assert summary["metrics"]["test"]["accuracy"] >= 0.97


def test_predictions_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The quick start's model, on scikit-learn's own numbers: mostly right, whatever the size of a batch."""
    config = load_config(
        ROOT / "ds_configs" / "strong.json", {"trainer.output_dir": str(tmp_path / "run"), "trainer.epochs": 8}
    )
    run_ranks(train, 2, config)
    pixels, labels = read_images()
    np.savetxt(tmp_path / "digits.csv", pixels[:90], delimiter=",", fmt="%g")
    common = ["predict", "--model", str(tmp_path / "run"), "--input", str(tmp_path / "digits.csv")]
    said = []
    for size in ("7", "90"):
        assert command_line([*common, "--batch_size", size]) == 0
        said.append([line.split(",")[0] for line in capsys.readouterr().out.splitlines()])
    assert said[0] == said[1]
    assert said[0][0] == "label"
    assert np.mean(np.array(said[0][1:], dtype=int) == labels[:90]) > 0.9
    (tmp_path / "digits.csv").write_text("1,2,3\n")
    assert command_line(common) == 2
    assert "1 line of 3 numbers" in capsys.readouterr().err


def test_a_slip_in_the_metrics_does_not_cost_the_model(tmp_path: Path) -> None:
    task = f"{USER_TASKS}/bad_tasks.py:MetricsFail"
    with pytest.raises(WorkerError, match="a slip in the metrics"):
        run_ranks(train, 2, small_config(tmp_path / "run", task=task, max_steps=3))
    run_ranks(train, 1, small_config(tmp_path / "good", max_steps=3))
    kept, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "good"))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


@pytest.mark.parametrize("world_size", [1, 3])
def test_metrics_that_are_no_dictionary_are_one_message(tmp_path: Path, world_size: int) -> None:
    task = f"{USER_TASKS}/bad_tasks.py:MetricsOfOneNumber"
    with pytest.raises(UserError, match=r"MetricsOfOneNumber\.metrics\(\) must return a dictionary"):
        run_ranks(train, world_size, small_config(tmp_path / "run", task=task, max_steps=3))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_validation_and_test_may_be_missing(tmp_path: Path) -> None:
    """The user's task has no validation split: nothing is validated, the test metrics come at the end."""
    summary = run_ranks(train, 1, small_config(tmp_path / "run", max_steps=3))[0]
    assert set(summary["metrics"]) == {"test"}


# Of studies the first: the others are bases of the same tasks, and planned in tests/distributed/test_study.py.
CONFIGS = [file for file in sorted((ROOT / "ds_configs").glob("*.json")) if not file.stem.startswith("study_")]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_every_config_runs_as_it_is(tmp_path: Path, file: Path) -> None:
    if "fused_adam" in file.stem:
        pytest.skip("DeepSpeed builds a kernel for a minute or more: see the slow test")
    overrides: dict[str, Any] = {"trainer.output_dir": str(tmp_path / "run"), "trainer.max_steps": 2}
    own = json.loads(file.read_text())["trainer"]
    data = small_data(own["task"], tmp_path, own.get("task_options", {}).get("problem_type"))
    if data is not None:
        overrides["trainer.task_options.data"] = str(data)
    summary = run_ranks(train, 2, load_config(file, overrides), environment={"TRAINER_CACHE": str(tmp_path / "cache")})[
        0
    ]
    assert summary["steps"] == 2


def small_data(task: str, folder: Path, problem: str | None = None) -> Path | None:
    """A little of what a task reads, where its config names a file of the user's."""
    random = np.random.default_rng(0)
    if problem is not None:  # several labels, or numbers
        labels = ["red|big", "red", "big"] if problem.startswith("multi") else ["0.5", "2", "-1"]
        texts = task == "text_classification"
        names = [f"{i} words" if texts else f"{i}.png" for i in range(300)]
        rows = [f"{name},{labels[i % 3]}" for i, name in enumerate(names)]
        table = folder / "train.csv" if texts else folder / "images" / "metadata.csv"
        table.parent.mkdir(exist_ok=True)
        table.write_text("\n".join(["text,label" if texts else "file_name,label", *rows]) + "\n")
        for name in () if texts else names:
            Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(table.with_name(name))
        return table if texts else table.parent
    if task == "token_classification":
        (folder / "train.conll").write_text("".join(f"Ann{i} B-name\ngoes O\nhome O\n\n" for i in range(300)))
        return folder / "train.conll"
    if task == "text_classification":
        rows = [f"{word} {other},{word}" for word in ("red", "green") for other in map(str, range(80))]
        (folder / "train.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
        return folder / "train.csv"
    if task == "tabular":
        rows = [f"{x:.3f},{'ab'[i % 2]},{i % 3}" for i, x in enumerate(random.normal(size=160))]
        (folder / "train.csv").write_text("x,kind,label\n" + "\n".join(rows) + "\n")
        return folder / "train.csv"
    if task == "causal_lm":
        (folder / "input.txt").write_text("".join(random.choice(list("abcd \n"), 20_000)))
        return folder / "input.txt"
    if task == "image_classification":
        arrays = {"x": random.integers(0, 255, (300, 12, 12, 3), dtype=np.uint8), "y": np.arange(300) % 3}
        np.savez(folder / "images.npz", **arrays)
        return folder / "images.npz"
    if task == "audio_classification":
        pytest.importorskip("soundfile")
        from tests.data.test_audio_data import tones

        return tones(folder / "tones", ("train", "test"), each=40)
    if task == "image_segmentation":
        masks = np.zeros((40, 128, 128), dtype=np.uint8)
        masks[:, 30:70, 30:70] = 1
        np.savez(folder / "masks.npz", x=random.integers(0, 255, masks.shape, dtype=np.uint8), y=masks)
        return folder / "masks.npz"
    if task == "nodules":
        masks = np.zeros((160, 32, 32, 32), dtype=np.uint8)
        masks[:, 12:20, 12:20, 12:20] = 1
        patient = np.array([f"p{i // 4}" for i in range(160)])
        np.savez(folder / "masks.npz", masks_packed=np.packbits(masks.reshape(160, -1), axis=1), patient=patient)
        return folder / "masks.npz"
    return None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(" " in sys.prefix, reason="DeepSpeed's build takes no path with a space")
def test_deepspeeds_fused_adam_is_exact(tmp_path: Path) -> None:
    def run(W: int) -> list[dict[str, str]]:
        overrides = {"trainer.output_dir": str(tmp_path / str(W)), "trainer.max_steps": 4}
        return run_ranks(train, W, load_config(ROOT / "ds_configs" / "strong_fused_adam.json", overrides))[0]["trace"]

    assert run(1) == run(3)
