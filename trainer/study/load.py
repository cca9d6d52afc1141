"""The file of a study: read, checked, and laid over its base config for each variant."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.keys import SCHEMA_KEY
from ..config.schema import build, lay_over, near, read_json
from ..errors import UserError
from .arms import NAMES, momentum_key
from .base import check_base
from .budgets import budget_variants, check_budgets
from .declaration import OPERATION, SYNCHRONISED, Study, Variant
from .splits import check_base_splits, check_splits
from .tuning import FIRST_SEED

# More seeds would tell no more, and the numbers of the sign test still fit into a float.
_MOST_SEEDS = 1000


def load_study(path: str, overrides: Mapping[str, Any] | None = None) -> tuple[Study, list[Variant]]:
    """The study in a file, and its base configs, checked: the first is the base itself.

    Args:
        path: the JSON file.
        overrides: dotted key -> value, of the base config or of the study ("study.seeds" -> 5); they override the file.

    Raises:
        UserError: anything in it is wrong.
    """
    values = read_json(Path(path))
    for key, value in (overrides or {}).items():
        lay_over(values, key, value)
    block = values.pop("study", None)
    # For editors alone. Left in, it would be a part of the declaration.
    values.pop(SCHEMA_KEY, None)
    if not isinstance(block, dict):
        raise UserError(f'{path}: a study needs a "study" block {{...}} beside the config that it varies.')
    try:
        study = _checked(block)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    base = check_base(values, path)
    epochs = base.trainer.epochs
    check_budgets(path, study.arms, study.budgets, study.epochs, epochs, study.max_epochs, study.variants)
    if "weak_tuned" in study.arms and "lr" not in base.optimizer.params:
        raise UserError(
            f'{path}: the arm weak_tuned searches around "optimizer.params.lr", which is not given. Give it.'
        )
    if "weak_tuned" in study.arms and study.tuning.momentum and momentum_key(base.optimizer.type) is None:
        raise UserError(
            f'{path}: the arm weak_tuned tries "study.tuning.momentum", and {base.optimizer.type} has no momentum. '
            'Set "study.tuning.momentum" to [].'
        )
    for world_size in study.timing.world_sizes if study.timing is not None else []:
        try:
            base.plan(world_size)
        except UserError as error:
            raise UserError(f'{path}: "study.timing.world_sizes" holds {world_size}: {error}') from None
    changes: dict[str, dict[str, Any]] = {"": {}}
    changes |= {f"{n:,} samples": {"trainer.train_samples": n} for n in study.dataset_sizes}
    if twice := sorted(changes.keys() & study.variants.keys()):
        raise UserError(
            f'{path}: "study.variants" holds "{twice[0]}", the name of one in "study.dataset_sizes". Rename it.'
        )
    changes |= budget_variants(study.epochs, epochs) | study.variants
    variants = []
    for name, change in changes.items():
        own, source = copy.deepcopy(values), f'{path}: study.variants "{name}"' if name else path
        for key, value in change.items():
            # Variants are compared with the base by seed, and judged by the same rules.
            if key.startswith("study.") or key == "trainer.seed":
                why = "every arm sets it" if key == "trainer.seed" else "it belongs to the whole study"
                raise UserError(f"{source} sets {key}, and no variant can: {why}.")
            if key != SYNCHRONISED:
                try:
                    lay_over(own, key, value)
                except UserError as error:
                    raise UserError(f"{source}: {error}") from None
        if name in study.variants and own == values and not change.get(SYNCHRONISED):
            raise UserError(f"{source} changes nothing: it has the values of the base config.")
        config = check_base(own, source)
        check_base_splits(study.splits, config, source)
        # After the checks, so that they speak of what the user wrote.
        for key, value in OPERATION.items():
            lay_over(own, key, value)
        variants.append(Variant(name, own, config, bool(change.get(SYNCHRONISED, False))))
    return study, variants


def _checked(block: Mapping[str, Any]) -> Study:
    count = block.get("seeds")
    if isinstance(count, int) and not isinstance(count, bool):
        block = {**block, "seeds": list(range(min(count, _MOST_SEEDS + 1)))}
    study: Study = build(Study, dict(block), "study.")
    if len(study.seeds) < 2:
        raise UserError('"study.seeds" must be at least 2: one seed says nothing of how much runs vary.')
    if len(study.seeds) > _MOST_SEEDS:
        raise UserError(f'"study.seeds" asks for more than {_MOST_SEEDS:,} seeds. No study takes more: use fewer.')
    for name, given, known in (("arms", study.arms, NAMES), ("budgets", study.budgets, ("epochs", "updates"))):
        for value in given:
            if value not in known:
                raise UserError(f'"study.{name}" holds {value!r}. {near(str(value), known)}')
    lists = [
        ("seeds", study.seeds, 0),
        ("world_sizes", study.world_sizes, 1),
        ("dataset_sizes", study.dataset_sizes, 1),
        ("epochs", study.epochs, 1),
    ]
    lists += [("timing.world_sizes", study.timing.world_sizes, 1)] if study.timing is not None else []
    for name, numbers, least in lists:
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or not least <= number < 1 << 63:
                raise UserError(f'"study.{name}" holds {number!r}. It must hold whole numbers of at least {least}.')
        if len(set(numbers)) < len(numbers):
            raise UserError(f'"study.{name}" is {numbers}. It must name each of them once.')
    for name in ("arms", "budgets", "seeds", "world_sizes"):
        values = getattr(study, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f'"study.{name}" is {values}. It must name at least one, and each of them once.')
    if study.world_sizes == [1]:
        raise UserError('"study.world_sizes" is [1]. One rank is the sequential run itself: name at least one above 1.')
    for name, change in study.variants.items():
        if not name or not isinstance(change, dict) or not change:
            raise UserError(
                f'"study.variants" holds {name!r}: {change!r}. It must be a name and a block of dotted config keys, '
                f'such as {{"trainer.task_options.model": "cnn"}}, or "{SYNCHRONISED}": true.'
            )
        if not isinstance(change.get(SYNCHRONISED, False), bool):
            raise UserError(f'"study.variants.{name}.{SYNCHRONISED}" must be true or false.')
    check_splits(study.splits, study.seeds)
    if max(study.seeds) >= FIRST_SEED:
        raise UserError(f'"study.seeds" holds {max(study.seeds)}. Seeds from {FIRST_SEED} on belong to searches.')
    for name, tried, most in (
        ("warmup_epochs", study.tuning.warmup_epochs, math.inf),
        ("momentum", study.tuning.momentum, 1),
    ):
        if not all(0 <= number < most for number in tried) or len(set(tried)) < len(tried):
            rule = "at least 0" + (" and below 1" if most == 1 else "")
            raise UserError(f'"study.tuning.{name}" is {tried}. It must hold different numbers of {rule}.')
    for name, metric in (("metric", study.metric), ("tuning.metric", study.tuning.metric)):
        if (metric.count("/") != 1 or not all(metric.split("/"))) and (metric or name == "metric"):
            raise UserError(f'"study.{name}" is "{metric}". It must be <split>/<metric>, such as test/accuracy.')
    if study.tuning.metric.startswith("test/"):
        raise UserError(
            f'"study.tuning.metric" is "{study.tuning.metric}". A rate that is chosen on the test set would make the '
            "test meaningless. Use a metric of validation."
        )
    if study.metric.endswith("/loss") and study.direction == "max":
        raise UserError(
            f'"study.metric" is "{study.metric}" and "study.direction" is "max", but a loss is better when it is low. '
            'Set "study.direction" to "min".'
        )
    if study.collapse is not None and study.collapse < study.margin:
        raise UserError(
            f'"study.collapse" ({study.collapse:g}) is less than "study.margin" ({study.margin:g}): a collapse is more '
            "than a loss that matters."
        )
    if not study.output_dir:
        raise UserError(
            '"study.output_dir" is missing: the folder for the results, in which a stopped study continues.'
        )
    return study
