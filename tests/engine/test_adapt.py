"""What a config asks of any model."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from trainer.config.keys import parse
from trainer.engine.adapt import adapt
from trainer.errors import UserError


def frozen(*patterns: str) -> Any:
    optimizer = {"type": "AdamW", "params": {"lr": 0.1}}
    trainer = {"task": "digits", "freeze": list(patterns)}
    config = parse(
        {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "optimizer": optimizer} | {"trainer": trainer}
    )
    return adapt(nn.Sequential(*(nn.Linear(2, 2) for _ in range(6))), config)


def test_a_pattern_freezes_what_it_covers() -> None:
    model = frozen("0", "*.bias")
    assert [name for name, q in model.named_parameters() if q.requires_grad] == [f"{k}.weight" for k in range(1, 6)]


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("encoder", "It has 0.weight, 0.bias, 1.weight, 1.bias, 2.weight, 2.bias, 3.weight, 3.bias, ..."),
        ("0.wieght", 'Did you mean "0.weight"?'),
    ],
)
def test_a_pattern_without_a_parameter_is_refused_with_the_names_said_once(pattern: str, hint: str) -> None:
    with pytest.raises(UserError) as refused:
        frozen(pattern)
    assert str(refused.value) == f'"trainer.freeze": "{pattern}" matches no parameter of the model. {hint}'
