"""The arms of a study: from a base config to the config of one run on one rank. Pure arithmetic.

A run's bits do not depend on how many ranks compute it, so weak scaling on W ranks is the run of one rank with a
W times larger global batch and the same micro-batches. An arm says what else changes with that batch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .batching import micro_batch_bounds, rank_block
from .config import Config, parse
from .errors import UserError

Budget = Literal["epochs", "updates"]


@dataclass(frozen=True)
class Arm:
    """What one arm does on W ranks to a config whose hyper-parameters were chosen for one.

    Attributes:
        title: for people.
        rule: of trainer.learning_rate.scaling_rule, in the growth W of the global batch.
        warmup_epochs: of trainer.learning_rate; None for the base config's own.
        scales_adam: change Adam's betas and eps with the batch as well.
    """

    title: str
    rule: Literal["none", "linear", "sqrt"] = "none"
    warmup_epochs: float | None = None
    scales_adam: bool = False


SEQUENTIAL, STRONG = "sequential", "strong"
WEAK = {
    "weak": Arm("weak, learning rate unchanged"),
    # Goyal et al. 2017, arXiv 1706.02677, sections 2.1 and 2.2.
    "weak_linear": Arm("weak, linear rule", "linear"),
    "weak_linear_warmup": Arm("weak, linear rule, warm-up over 5 epochs", "linear", warmup_epochs=5.0),
    # Krizhevsky 2014, arXiv 1404.5997; Hoffer et al. 2017, arXiv 1705.08741. The rate alone.
    "weak_sqrt": Arm("weak, square-root rule", "sqrt"),
    # Malladi et al. 2022, arXiv 2205.10287.
    "weak_sqrt_adam": Arm("weak, square-root rule with Adam's betas and eps", "sqrt", scales_adam=True),
}
NAMES = (SEQUENTIAL, STRONG, *WEAK)


class ImpossibleError(UserError):
    """This arm cannot be run on so many ranks; the message says why. The study reports it and goes on."""


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
        ("scheduler", config.scheduler is not None, "arms scale the rate by trainer.learning_rate, its other way"),
        ("trainer.max_steps", trainer.max_steps is not None, "a study gives runs equal epochs or equal updates"),
        ("trainer.max_wall_time_s", trainer.max_wall_time_s is not None, "every run must have its whole budget"),
        ("trainer.output_dir", trainer.output_dir is not None, "results go to study.output_dir"),
        ("zero_optimization.stage", config.zero_stage != 0, "only exact runs can stand for runs on many ranks"),
    ):
        if is_set:
            raise UserError(f'{source}: "{key}" has no place in the base config of a study: {why}. Leave it out.')
    return config


def steps_per_epoch(samples: int, global_batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of an epoch over `samples`."""
    return samples // global_batch_size if drop_last else -(-samples // global_batch_size)


def adam_for(params: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Adam's betas and eps for a k times larger batch; the rate is scaled by sqrt(k) elsewhere.

    Malladi et al. 2022: beta -> 1 - k (1 - beta) for both, eps -> eps / sqrt(k). Weight decay is left as it is, on
    which the paper is silent.

    Raises:
        ImpossibleError: a beta would be negative, beyond k = 1 / (1 - beta).
    """
    betas, eps = params.get("betas", (0.9, 0.999)), params.get("eps", 1e-8)
    scaled = [1.0 - k * (1.0 - beta) for beta in betas]
    for i, (beta, new) in enumerate(zip(betas, scaled), start=1):
        if new < 0:
            raise ImpossibleError(
                f"beta{i} = 1 - {k} (1 - {beta:g}) = {new:.3g} is negative: the rule ends at a {1 / (1 - beta):.4g} "
                "times larger batch"
            )
    return {**params, "betas": scaled, "eps": eps / k**0.5}


def values_of(
    base: Mapping[str, Any],
    arm: str,
    world_size: int,
    budget: Budget,
    seed: int,
    samples: int,
    max_epochs: int | None = None,
) -> dict[str, Any]:
    """The config values of one run, on one rank.

    Equal epochs keep `trainer.epochs`. Equal updates (Hoffer et al. 2017: large batches generalise worse because they
    make fewer updates) give exactly the sequential run's number of optimizer steps; warm-up and the time between
    validations are stretched alike, so that every run makes about as many validations to choose its model from.

    Args:
        base: config values that `check_base` has passed.
        arm: "sequential" or a key of WEAK.
        world_size: W; 1 for the sequential arm.
        budget: what this run has in common with the sequential one.
        seed: of the run.
        samples: of the training set.
        max_epochs: the most epochs that equal updates may take; beyond, the run is as long as this allows.

    Raises:
        ImpossibleError: the global batch is larger than the training set, or the arm's rule ends before W.
    """
    config = parse(dict(base))
    B, trainer = config.plan(1).global_batch_size, config.trainer
    values = copy.deepcopy(dict(base))
    values.pop("gradient_accumulation_steps", None)
    values["train_batch_size"] = B * world_size
    block: dict[str, Any] = values.setdefault("trainer", {})
    block["seed"] = seed
    if arm == SEQUENTIAL:
        assert world_size == 1
        return values
    if B * world_size > samples:
        raise ImpossibleError(
            f"the global batch {world_size} x {B} = {B * world_size:,} is larger than the training set of {samples:,}"
        )
    this = WEAK[arm]
    warmup_epochs = trainer.learning_rate.warmup_epochs if this.warmup_epochs is None else this.warmup_epochs
    if budget == "updates":
        every = steps_per_epoch(samples, B, trainer.drop_last)
        own = steps_per_epoch(samples, B * world_size, trainer.drop_last)
        stretch, epochs = every / own, -(-every * trainer.epochs // own)
        if max_epochs is not None and epochs > max_epochs:
            epochs, stretch = max_epochs, max_epochs / trainer.epochs
        else:
            block["max_steps"] = every * trainer.epochs
        block["epochs"] = epochs
        warmup_epochs *= stretch
        if trainer.evaluate_every_epochs:
            block["evaluate_every_epochs"] = max(1, round(trainer.evaluate_every_epochs * stretch))
    rate: dict[str, Any] = block.setdefault("learning_rate", {})
    if warmup_epochs:
        rate["warmup_epochs"] = warmup_epochs
    if this.rule != "none":
        if "lr" not in config.optimizer.params:
            raise UserError(f'The arm {arm} scales "optimizer.params.lr", which is not given.')
        rate |= {"scaling_rule": this.rule, "base_global_batch_size": B}
    if this.scales_adam:
        if config.optimizer.type.lower() not in ("adam", "adamw"):
            raise UserError(f"The arm {arm} is a rule for Adam and AdamW; this optimizer is {config.optimizer.type}.")
        values["optimizer"]["params"] = adam_for(config.optimizer.params, world_size)
    return values


def run_id(config: Config) -> str:
    """16 hexadecimal digits that follow from everything a run is configured by: equal configs are one run."""
    values = config.as_dict()
    del values["trainer"]["output_dir"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def check_strong(config: Config, world_size: int, samples: int) -> int:
    """Checks that strong scaling on W ranks computes what one rank does; returns M.

    The micro-batches of a step and the tree that adds their gradients follow from the global batch and the micro-batch
    size alone; W only deals them out. So it is left to check that every micro-batch of every kind of step (an
    epoch's last one may be smaller) is dealt to exactly one rank, in order.

    Raises:
        ImpossibleError: there are more ranks than micro-batches.
    """
    try:
        plan = config.plan(world_size)
    except UserError as error:
        raise ImpossibleError(str(error).splitlines()[0]) from None
    B, m = plan.global_batch_size, plan.micro_batch_size
    rest = 0 if config.trainer.drop_last else samples % B
    for size in [B, *([rest] if rest else [])]:
        bounds = micro_batch_bounds(size, m)
        dealt = [j for rank in range(world_size) for j in rank_block(len(bounds), world_size, rank)]
        assert dealt == list(range(len(bounds))), (dealt, bounds)
    return plan.micro_batches
