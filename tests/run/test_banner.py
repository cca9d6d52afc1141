"""What a run says of itself before its first step and after its last one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.run.small import config_of, pieces_of
from trainer.run.banner import banner, result_table

AUDIT: Any = SimpleNamespace(every_steps=50)


def said(audit: Any = AUDIT, inexact: tuple[str, ...] = (), **trainer: Any) -> str:
    pieces = pieces_of(config_of(**trainer))
    pieces.inexact += inexact
    return "\n".join(banner(pieces, audit, 0.025))


def test_the_batch_the_length_and_the_precision() -> None:
    lines = said().splitlines()
    assert lines.pop(3).startswith("data: first sample: x = ")
    assert lines == [
        "strong scaling: global batch 8 samples = 2 micro-batches x 4 samples; 1 rank x 2 micro-batches",
        "task mine.py:Task: 30 train / 10 validation / 10 test samples; 4 steps an epoch x 3 epochs = 12 steps",
        "data: one sample: x (2,) float32, y () float32",
        "SGD, learning rate 0.025 at the first step, gradients clipped at norm 1; float32 on a processor",
        "note: a note of the task",
        "exactness: bitwise (rehearsed, audited every 50 steps and in the last). Any 1 to 2 ranks give this very "
        "model, on this device model and these versions",
    ]


def test_a_part_of_an_epoch_and_one_epoch() -> None:
    assert "4 steps an epoch x 1.5 epochs = 6 steps" in said(max_steps=6)
    assert "4 steps an epoch x 1 epoch = 4 steps" in said(epochs=1)


def test_no_clipping_and_bfloat16() -> None:
    text = said(gradient_clipping=0.0, torch_autocast={"enabled": True, "dtype": "bfloat16"})
    assert "no clipping; bfloat16 autocast on a processor" in text


def test_tf32_is_said_where_it_is_used() -> None:
    pieces = pieces_of(config_of(tf32=True))
    assert "TF32" not in "\n".join(banner(pieces, AUDIT, 0.1)), "a processor has none"
    pieces.device = torch.device("cuda")
    assert "; float32, products in TF32 on " in "\n".join(banner(pieces, AUDIT, 0.1))


def test_a_warm_up_that_never_ends_is_noted() -> None:
    note = "note: warm-up (12 steps) is as long as the run, so it never reaches the full rate"
    assert note in said(learning_rate={"warmup_epochs": 3})
    assert "warm-up" not in said(learning_rate={"warmup_epochs": 2})


def test_adascale_makes_a_run_shorter() -> None:
    rate = {"scaling_rule": "adascale", "base_global_batch_size": 4, "adascale_steps": 9}
    assert "= at most 12 steps" in said(learning_rate=rate)


def test_frozen_parameters_are_counted() -> None:
    pieces = pieces_of(config_of())
    assert "parameters are trained" not in "\n".join(banner(pieces, AUDIT, 0.1))
    for parameter in list(pieces.engine.model.parameters())[:2]:
        parameter.requires_grad_(False)
    assert "10 of 19 parameters are trained, the others are frozen" in banner(pieces, AUDIT, 0.1)


@pytest.mark.parametrize("key", [{"lora": {"rank": 1}}, {"freeze": ["0"]}, {}])
def test_random_weights_that_stay_as_they_are_are_noted(key: dict[str, Any]) -> None:
    pieces = pieces_of(config_of(**key))
    note = "keeps weights as they are, and those of this model are random"
    assert note not in "\n".join(banner(pieces, AUDIT, 0.1))
    pieces.task.random_weights = True  # type: ignore[attr-defined]
    text = "\n".join(banner(pieces, AUDIT, 0.1))
    assert (note in text) == bool(key)
    assert ("adapter/ is of no use without" in text) == ("lora" in key)


def test_an_inexact_run_says_why_and_promises_nothing() -> None:
    text = said(inexact=("the device model differs", "ZeRO reduces"))
    assert text.endswith("exactness: tolerance, because the device model differs; ZeRO reduces")
    assert "bitwise" not in text


def test_a_run_without_audits_says_so() -> None:
    assert "exactness: bitwise (rehearsed, not audited)." in said(audit=None)


def test_weak_scaling_is_the_run_of_one_rank_with_the_whole_batch() -> None:
    text = said(train_batch_size=None, gradient_accumulation_steps=2)
    assert text.startswith("weak scaling: global batch 8 samples")
    assert "One rank with train_batch_size=8 and this learning rate gives this very model" in text


# The end


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "metrics": {"validation": {"loss": 0.3}, "test": {"loss": 0.25, "accuracy": 0.98765}}, "steps": 1200,
        "status": "finished", "tokens_per_s": None, "samples_per_s": 1234.5, "step_time_s": 0.0123,
        "wall_time_s": 61.2, "time_to_first_step_s": 3.4, "parameters_sha256": "ab" * 32, "exactness": "bitwise",
    } | changes  # fmt: skip


def rows(tensorboard: bool = False, **changes: Any) -> dict[str, str]:
    text = result_table(summary(**changes), Path("elsewhere/mine"), tensorboard)
    cells = [line.strip().split("  ", 1) for line in text.splitlines()]
    return {name: value.strip() for name, value in cells}


def test_the_table_at_the_end() -> None:
    assert rows() == {
        "test loss": "0.2500", "test accuracy": "0.9877", "steps": "1,200", "samples/s": "1,234",
        "step time": "12.30 ms", "wall time": "61.2 s (3.4 s to the first step)",
        "parameters": "sha256 abababababababab... (bitwise)", "results": "elsewhere/mine",
    }  # fmt: skip


def test_what_is_in_the_table_where_there_is_more() -> None:
    best = {"step": 900, "metric": "accuracy", "mode": "max", "value": 0.99}
    found = rows(True, best=best, tokens_per_s=50_000.4, status="stopped early", exactness="tolerance")
    assert found["kept model"] == "of step 900, accuracy 0.9900 on validation"
    assert found["tokens/s"] == "50,000"
    assert found["steps"] == "1,200 (stopped early)"
    assert found["parameters"].endswith("(tolerance)")
    assert found["TensorBoard"] == "tensorboard --logdir elsewhere/mine/tensorboard"


@pytest.mark.parametrize(
    ("metrics", "first"), [({"validation": {"loss": 0.3}}, "validation loss"), ({}, "steps")], ids=["one", "none"]
)
def test_without_a_test_split_the_validation_is_shown(metrics: dict[str, Any], first: str) -> None:
    assert next(iter(rows(metrics=metrics))) == first


def test_work_and_efficiency_are_said_with_what_they_are_compared_with() -> None:
    found = rows(model_tflops_per_s=12.3456, mfu=0.4123)
    assert found["model TFLOP/s"] == "12.3, 41.2% of the devices' peak (MFU)"
    assert rows(model_tflops_per_s=0.00213, mfu=None)["model TFLOP/s"] == "0.00213"
    assert rows(model_flops_not_counted="torch has no formula for my.op")["model TFLOP/s"] == (
        "not counted: torch has no formula for my.op"
    )
    baseline = {"folder": "digits-001", "world_size": 1}
    found = rows(strong_efficiency=0.934, efficiency_baseline=baseline)
    assert found["strong efficiency"] == "0.93 against 1 rank (digits-001)"
    found = rows(weak_efficiency=1.02, efficiency_baseline=baseline | {"world_size": 4})
    assert found["weak efficiency"] == "1.02 against 4 ranks (digits-001)"
