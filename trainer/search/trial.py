"""What the processes of a search do: look at the data once, and make one run after the other."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config.keys import Config
from ..config.schema import hints_of
from ..errors import NonFiniteError, Stopped, UserError
from ..ranks.place import Ranks
from .space import Space, combinations, shown

# The reason that a run is given when it is stopped because it is worse than others. A signal has another reason.
PRUNED = "the search ends this trial early"
_OPTIONS = "trainer.task_options."

Ask = Callable[[Any], Any]


def look(ranks: Ranks, config: Config, space: Space, values: Mapping[str, Any], ask: Ask) -> dict[str, Any]:
    """What a search needs to know of the data and the task, before the first trial.

    Args:
        ranks: of this process.
        config: of the file, without any trial's values.
        space: what is searched. Options of the task among it are checked here, because here the task can be loaded.
        values: of the config, as in the file.
        ask: not used.

    Returns:
        "samples" and "data_sha256" of each split; "facts" of the machine; "metrics": the names of those on validation;
        "best_metric": the task's, as [name, mode], or None; "numbers": the keys of options that the task declares as
        numbers that need not be whole.

    Raises:
        UserError: the task refuses an option, has no data for validation, or cannot be evaluated.
    """
    from ..api.evaluation import untrained_metrics
    from ..engine import deepspeed_engine as engine
    from ..engine import device as devices
    from ..engine.optimizers import check_optimizer
    from ..exact.order import key, seed_python
    from ..run.build import splits_of
    from ..tasks.own_code import task_code_sha256
    from ..tasks.protocol import load_task

    device, _ = devices.choose(config, ranks)
    devices.settle(config)
    check_optimizer(config)
    seed_python(key(config.trainer.seed, "task"))
    task = load_task(config.trainer.task, config.trainer.task_options)
    splits = splits_of(task, config)
    if "validation" not in splits:
        raise UserError(
            f"The task {config.trainer.task} has no validation split, but trials are compared on validation. The test "
            "split is only for the end.\nHold data out: "
            + (
                'let splits() return a part of the training samples as "validation".'
                if ":" in config.trainer.task
                else "--set trainer.task_options.validation_fraction=0.15"
            )
        )
    numbers = []
    for parameter in space.parameters:
        if not parameter.key.startswith(_OPTIONS):
            continue
        if _declared(type(task), parameter.key.removeprefix(_OPTIONS)) is float:
            numbers.append(parameter.key)
        for value in parameter.examples()[:20]:
            _check_option(config.trainer.task, parameter.key, value, combinations(parameter, space), space, values)
    best = getattr(task, "best_metric", None)
    return {
        "samples": {name: len(split) for name, split in splits.items()},
        "data_sha256": {name: split.data_hash() for name, split in splits.items()},
        "task_code_sha256": task_code_sha256(task, config.trainer.task),
        "facts": devices.facts(device, engine.VERSION),
        "metrics": list(untrained_metrics(task, config, splits["validation"], device)),
        "best_metric": None if best is None else list(best),
        "numbers": numbers,
    }


def _check_option(task: str, key: str, value: Any, others: Any, space: Space, values: Mapping[str, Any]) -> None:
    """Raises UserError unless the task takes a value, at least together with some values of the other parameters."""
    from ..tasks.protocol import load_task

    first: UserError | None = None
    for point in others:
        laid = space.laid_over(values, {**point, key: value})
        try:
            load_task(task, laid["trainer"]["task_options"])
            return
        except UserError as error:
            first = first or error
    raise UserError(f'"search.parameters": "{key}" with the value {shown(value)}: {first}')


def _declared(cls: type, name: str) -> Any:
    """The type that a task declares for an option; None if it declares none."""
    options = getattr(cls, "Options", None)
    if dataclasses.is_dataclass(options):
        found = {field.name: field.type for field in dataclasses.fields(options)}
        return hints_of({name: found[name]}, options)[name] if name in found else None  # type: ignore[arg-type]
    annotations = getattr(cls.__init__, "__annotations__", {})  # type: ignore[misc]
    return hints_of({name: annotations[name]}, cls)[name] if name in annotations else None


def make(ranks: Ranks, config: Config, folder: str, tested: bool, ask: Ask) -> dict[str, Any]:
    """Makes one run, and removes its folder afterwards. Collective: every rank.

    Args:
        ranks: of this process.
        config: of the run.
        folder: its output folder.
        tested: whether the test split is evaluated at the end.
        ask: called on rank 0 with each validation, {"epoch", "metrics"}. It returns why the run has to stop, or None.
            With several ranks it is also called with None, to get an answer that has come meanwhile.

    Returns:
        The summary; "status" is also "not finite" or "pruned". With "curves", metric on validation
        -> {"epoch", "value"}, and "validation_samples".
    """
    from ..run.run import run

    config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, output_dir=folder))

    curves: dict[str, dict[str, list[float]]] = {}

    def hear(kind: str, record: dict[str, Any]) -> str | None:
        if kind != "evaluation" or record["split"] != "validation":
            # At one rank, in a slot, the answer to a validation comes at once. Several ranks get it only with a later
            # question. So each other record asks, too.
            return ask(None) if ranks.world_size > 1 else None
        prefix = "eval/validation/"
        metrics = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
        for name, value in metrics.items():
            curve = curves.setdefault(name, {"epoch": [], "value": []})
            curve["epoch"].append(record["epoch"])
            curve["value"].append(value)
        reason: str | None = ask({"epoch": int(record["epoch"]), "metrics": metrics})
        return reason

    began_at_s, began_s = time.time(), time.monotonic()
    summary: dict[str, Any]
    try:
        summary = run(
            config, ranks, config_name="search", started_at_s=began_at_s, began_s=began_s, listener=hear, tested=tested
        )
    except NonFiniteError as error:
        summary = {"status": "not finite", "steps": error.good_steps, "metrics": {}, "reason": str(error)}
    except Stopped as stopped:
        if stopped.reason != PRUNED:
            raise
        summary = {"status": "pruned", "metrics": {}}
    finally:
        samples = None
        if ranks.first:
            samples = _held(folder)
            shutil.rmtree(folder, ignore_errors=True)
        gc.collect()  # an engine refers to itself, so only the collector frees its memory before the next trial
    defaults = {"started_at_s": began_at_s, "wall_time_s": time.monotonic() - began_s}
    return defaults | summary | {"curves": curves, "validation_samples": samples}


def _held(folder: str) -> int | None:
    """How many samples a run's validation split had; None if its manifest cannot be read."""
    try:
        manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    samples: int | None = manifest["samples"].get("validation")
    return samples
