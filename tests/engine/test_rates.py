"""The learning rate of every step, as a config asks for it."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.keys import parse
from trainer.engine.rates import Rates
from trainer.exact.gradient_noise import Noise


def rates(W: int = 1, *, batch: dict[str, int] | None = None, **rate: Any) -> Rates:
    values: dict[str, Any] = {
        **(batch or {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}),
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "trainer": {"learning_rate": rate},
    }
    config = parse(values)
    return Rates(config, config.plan(W), steps_per_epoch=10, total_steps=100)


def test_a_constant_rate() -> None:
    assert [rates().factor(step) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]


def test_warm_up_counts_epochs_and_the_schedule_the_run() -> None:
    found = rates(warmup_epochs=1, schedule="linear")
    assert found.factor(4) == pytest.approx(0.5)
    assert found.factor(55) == pytest.approx(0.5)
    assert found.factor(100) == pytest.approx(0.0)


def test_a_rule_scales_by_the_growth_of_the_batch() -> None:
    weak = {"train_micro_batch_size_per_gpu": 8}
    assert rates(4, batch=weak, scaling_rule="linear").factor(0) == 4.0
    assert rates(4, batch=weak, scaling_rule="sqrt").factor(0) == 2.0


def test_adascale_moves_with_what_it_observes() -> None:
    found = rates(4, batch={"train_micro_batch_size_per_gpu": 8}, scaling_rule="adascale")
    assert found.adascale is not None
    assert found.factor(0) == 1.0
    found.adascale.observe(Noise(trace=1e6, gradient_squared=0.0))  # all noise: a step is worth four
    assert found.factor(1) == pytest.approx(4.0)


def test_deepspeeds_scheduler_is_left_alone() -> None:
    config = parse(
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 8,
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        }
    )
    assert Rates(config, config.plan(1), 10, 100).factor(3) is None
