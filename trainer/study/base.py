"""Checks the base config of a study: it must not set what the arms set. And how far strong scaling of it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.keys import Config, parse
from ..errors import UserError
from ..exact.plan import micro_batch_bounds, rank_block
from .arms import ImpossibleError


def check_base(base: Mapping[str, Any], source: str) -> Config:
    """The checked base config of a study.

    Raises:
        UserError: it is wrong, or sets what the arms set.
    """
    config = parse(dict(base), source)
    config.plan(1)
    rate, trainer = config.trainer.learning_rate, config.trainer
    for key, is_set, why in (
        ("trainer.learning_rate.scaling_rule", rate.scaling_rule != "none", "each arm sets it"),
        ("scheduler", config.scheduler is not None, "arms set the rate with trainer.learning_rate, its alternative"),
        ("trainer.max_steps", trainer.max_steps is not None, "a study gives runs equal epochs or equal updates"),
        ("trainer.max_wall_time_s", trainer.max_wall_time_s is not None, "every run must have its whole budget"),
        ("trainer.output_dir", trainer.output_dir is not None, "results go to study.output_dir"),
        ("zero_optimization.stage", config.zero_stage != 0, "only exact runs can stand for runs on many ranks"),
    ):
        if is_set:
            raise UserError(f'{source}: "{key}" has no place in the base config of a study: {why}. Leave it out.')
    return config


def check_strong(config: Config, world_size: int, samples: int) -> int:
    """Checks that strong scaling on W ranks computes what one rank does; returns M.

    The micro-batches of a step and the tree that adds their gradients follow from the global batch and the micro-batch
    size alone; W only deals them out. So one thing is left to check: every micro-batch is dealt to exactly one rank, in
    order. This is checked for every kind of step, because an epoch's last one may be smaller.

    Raises:
        ImpossibleError: there are more ranks than micro-batches.
    """
    try:
        plan = config.plan(world_size)
    except UserError as error:
        # Its other lines advise other batches, and a study keeps its base's.
        raise ImpossibleError(str(error).splitlines()[0]) from None
    B, m = plan.global_batch_size, plan.micro_batch_size
    rest = 0 if config.trainer.drop_last else samples % B
    for size in [B, *([rest] if rest else [])]:
        bounds = micro_batch_bounds(size, m)
        dealt = [j for rank in range(world_size) for j in rank_block(len(bounds), world_size, rank)]
        assert dealt == list(range(len(bounds))), (dealt, bounds)
    return plan.micro_batches
