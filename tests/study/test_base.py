"""What a base config must leave to a study, and how far strong scaling of it goes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.study.test_arms import base
from trainer.config.keys import parse
from trainer.errors import UserError
from trainer.study.arms import ImpossibleError
from trainer.study.base import check_base, check_strong


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": {"scaling_rule": "linear", "base_global_batch_size": 8}}, "scaling_rule"),
        ({"max_steps": 5}, "max_steps"),
        ({"max_wall_time_s": 5}, "max_wall_time_s"),
        ({"output_dir": "x"}, "output_dir"),
    ],
)
def test_what_a_base_must_leave_to_the_study(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_base(base(**change), "study.json")
    assert check_base(base(), "study.json").train_batch_size == 32


@settings(deadline=None, max_examples=60)
@given(B=st.integers(1, 300), m=st.integers(1, 40), W=st.integers(1, 40), samples=st.integers(300, 700))
def test_strong_is_possible_up_to_as_many_ranks_as_micro_batches(B: int, m: int, W: int, samples: int) -> None:
    config = parse({**base(), "train_batch_size": max(B, m), "train_micro_batch_size_per_gpu": m})
    micro_batches = -(-max(B, m) // m)
    if micro_batches >= W:
        assert check_strong(config, W, samples) == micro_batches
    else:
        with pytest.raises(ImpossibleError, match="ranks are more than"):
            check_strong(config, W, samples)
