"""The budgets of a study: how many epochs its runs have, and what a weak run shares with the sequential run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..config.keys import Config
from ..errors import UserError
from .arms import EQUAL_UPDATES


def budget_variants(epochs: Sequence[int], own: int) -> dict[str, dict[str, Any]]:
    """Name -> changes of the base config, for budgets in epochs. The base's own budget is no variant."""
    return {variant_of(n, own): {"trainer.epochs": n} for n in sorted(epochs) if n != own}


def variant_of(epochs: int, own: int) -> str:
    """The name of the variant with a budget in epochs; "" for the base's own."""
    return "" if epochs == own else f"{epochs:,} epochs"


def check_budgets(
    source: str,
    arms: Collection[str],
    budgets: Collection[str],
    epochs: Sequence[int],
    own: int,
    max_epochs: int | None,
    variants: Collection[str],
) -> None:
    """Raises UserError where declared budgets contradict one another.

    Args:
        source: of the declaration, for the message.
        arms, budgets, epochs, max_epochs: of the study.
        own: epochs of the base.
        variants: names of the user's own variants.
    """
    longest = max(own, *epochs) if epochs else own
    if max_epochs is not None and "updates" not in budgets:
        raise UserError(f'{source}: "study.max_epochs" has no effect without the budget "updates". Leave it out.')
    if max_epochs is not None and max_epochs < longest:
        what = "trainer.epochs" if longest == own else f'{longest} in "study.epochs"'
        raise UserError(
            f'{source}: "study.max_epochs" ({max_epochs}) is less than {what}. It must be at least as large.'
        )
    if EQUAL_UPDATES in arms and "epochs" not in budgets:
        raise UserError(
            f'{source}: "study.arms" holds {EQUAL_UPDATES}. It has the updates of a weak run at equal epochs, but '
            f'"study.budgets" is {list(budgets)}. Add "epochs" to it, or leave the arm out.'
        )
    for name in budget_variants(epochs, own):
        if name in variants:
            raise UserError(
                f'{source}: "study.variants" holds "{name}", which is the name of one in "study.epochs". Rename it.'
            )


def work(config: Config, samples: int) -> int:
    """The samples that a run processes. All runs have the same micro-batches, so its time is proportional to them."""
    trainer = config.trainer
    whole = trainer.epochs * samples
    return whole if trainer.max_steps is None else min(whole, trainer.max_steps * config.plan(1).global_batch_size)
