"""What is searched: short names, kinds of numbers, grids, and the file's own values."""

from __future__ import annotations

from typing import Any

import pytest

from tests.search.small import BASE
from trainer.errors import UserError
from trainer.run.same_run import _HARMLESS
from trainer.search.space import Parameter, read_space, takes_fractions

LR, HIDDEN = "optimizer.params.lr", "trainer.task_options.hidden"


def test_a_range_is_of_whole_numbers_unless_the_key_is_a_number() -> None:
    block = {
        LR: {"low": 0, "high": 1},
        HIDDEN: {"low": 8, "high": 64},
        "trainer.task_options.x": {"low": 0.0, "high": 1},
    }
    lr, hidden, x = read_space(block, BASE).parameters
    assert (lr.whole, hidden.whole, x.whole) == (False, True, False)
    (again,) = read_space({HIDDEN: {"low": 8, "high": 64}}, BASE).with_fractions([HIDDEN]).parameters
    assert not again.whole and again.every() is None


@pytest.mark.parametrize(
    ("key", "fractions"),
    [("trainer.learning_rate.warmup_epochs", True), ("trainer.epochs", False), (LR, True)],
)
def test_what_the_config_declares(key: str, fractions: bool) -> None:
    assert takes_fractions(key, BASE) == fractions


def test_what_may_change_while_a_run_goes_on_is_not_searched() -> None:
    """So a new key of that kind is not forgotten here."""
    steps = {"trainer.epochs", "trainer.max_steps"}
    batch = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    for key in set(_HARMLESS) - steps - batch:
        with pytest.raises(UserError, match="cannot be searched"):
            read_space({key: [1, 2]}, BASE)


def test_a_grid_has_every_combination_once() -> None:
    block: dict[str, Any] = {LR: [0.1, 0.2, 0.3], HIDDEN: {"low": 8, "high": 31, "step": 8}}
    space = read_space(block, BASE)
    points = [tuple(space.grid_point(i).values()) for i in range(space.grid_size())]
    assert len(points) == len(set(points)) == 9
    assert {hidden for hidden, _ in points} == {8, 16, 24}


def test_names_are_as_short_as_tells_them_apart() -> None:
    keys = [LR, "trainer.task_options.lr", "trainer.epochs"]
    names = [p.name for p in read_space({key: [1, 2] for key in keys}, BASE).parameters]
    assert names == ["params.lr", "task_options.lr", "epochs"]


def test_the_files_own_values_are_taken_where_they_lie_in_the_ranges() -> None:
    block = {LR: {"low": 0.2, "high": 0.3}, "train_batch_size": [16, 32], HIDDEN: [8, 16]}
    assert read_space(block, BASE).own_point(BASE) == {"train_batch_size": 16}


def test_a_block_is_laid_over_before_the_keys_in_it() -> None:
    space = read_space({LR: [0.5, 0.6], "optimizer": [{"type": "SGD", "params": {}}, {"type": "Adagrad"}]}, BASE)
    laid = space.laid_over(BASE, {LR: 0.5, "optimizer": {"type": "SGD", "params": {"momentum": 0.9}}})
    assert laid["optimizer"] == {"type": "SGD", "params": {"momentum": 0.9, "lr": 0.5}}
    assert BASE["optimizer"]["params"]["lr"] == 0.1


@pytest.mark.parametrize("step", [0.01, 0.05, 0.1, 0.3, 1e-4])
def test_every_step_of_a_range_is_one_of_its_values(step: float) -> None:
    """In floating point, 0.07 / 0.01 is a little more than 7, and 0.29 / 0.01 a little less than 29."""
    parameter = Parameter(LR, "lr", low=0.0, high=101 * step, step=step)
    assert all(parameter.holds(count * step) and parameter.holds(round(count * step, 9)) for count in range(101))
    assert not parameter.holds(7.5 * step)
