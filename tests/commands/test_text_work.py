"""How much each micro-batch of texts has to compute, as `plan --data` counts it."""

from __future__ import annotations

import re
from typing import Any

import torch

from trainer.commands.show_plan import Work, plan_table
from trainer.commands.text_work import work_of
from trainer.config.keys import parse
from trainer.exact.splits import Split


def test_padding_and_uneven_ranks_of_texts_are_counted() -> None:
    config = parse({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1})
    x = torch.zeros(4, 9, dtype=torch.long)
    even = Split({"x": x}, lengths=torch.tensor([3, 3, 3, 3]), padded=("x",))
    uneven = Split({"x": x}, lengths=torch.tensor([1, 1, 1, 9]), padded=("x",))
    assert "0.0% of the computed tokens are padding" in plan_table(config, [2], work_of(config, even))
    assert re.search(r"^2 .* 2\.00 +yes$", plan_table(config, [2], work_of(config, even)), re.MULTILINE)
    assert re.search(
        r"^2 .* 1\.20 +yes$", plan_table(config, [2], work_of(config, uneven)), re.MULTILINE
    )  # 12 tokens / 10
    wide = parse({"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2})
    assert "40.0% of the computed tokens are padding" in plan_table(wide, [2], work_of(wide, uneven))  # 8 of 20


def texts(*lengths: int) -> Split:
    x = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    return Split({"x": x}, lengths=torch.tensor(lengths), padded=("x",))


def work(split: Split, **keys: Any) -> list[Work]:
    return work_of(parse(keys), split)


def test_a_micro_batch_counts_its_longest_text_for_each_of_its_samples() -> None:
    """The texts of a step are sorted by length, so the two short ones share a micro-batch."""
    (step,) = work(texts(2, 9, 3, 8), train_batch_size=4, train_micro_batch_size_per_gpu=2)
    assert sorted(step.micro_batches) == [2 * 3, 2 * 9]
    assert step.tokens == 2 + 9 + 3 + 8


def test_an_epochs_last_smaller_step_counts_unless_it_is_dropped() -> None:
    split, keys = texts(5, 5, 5, 5, 5, 5), {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
    assert [step.micro_batches for step in work(split, **keys)] == [[10, 10], [10]]
    assert [step.tokens for step in work(split, **keys, trainer={"drop_last": True})] == [20]


def test_with_one_shape_every_micro_batch_is_as_long_as_the_longest_text_of_all() -> None:
    """As under `trainer.compile`, where another length would be compiled anew."""
    keys: dict[str, Any] = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "trainer": {"compile": True}}
    (step,) = work(texts(2, 9, 3, 8), **keys)
    assert step.micro_batches == [2 * 9, 2 * 9]


def test_without_lengths_or_under_weak_scaling_there_is_nothing_to_count() -> None:
    keys = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2}
    assert work(Split({"x": torch.zeros(4, 9)}), **keys) == []
    assert work(texts(2, 9, 3, 8), train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=1) == []
