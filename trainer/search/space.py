"""What is searched: keys of a config, each with a list or a range. A point gives each of them a value."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import deepspeed_keys
from ..config.keys import OTHERS, SCHEMA_KEY, parse
from ..config.loggers import OFF
from ..config.schema import build, hints_of, lay_over, option
from ..errors import UserError

# Keys that cannot be searched, with the reason. A block stands for all keys in it. The longest entry that fits counts.
_WHERE_IT_RUNS = "it says where or how a run is made, and changes no bit of the model"
_OTHER_DATA = "it changes which samples are validated on, so the metric of two trials could not be compared"
_REFUSED = {
    "trainer.seed": "the best seed is luck. The fresh seeds at the end show how much it matters",
    "trainer.task": "metrics of different tasks cannot be compared",
    "trainer.cpu_threads": "it says how a run is made, and only rounding depends on it",
    **dict.fromkeys(
        (
            "trainer.output_dir", "trainer.device", "trainer.ranks_per_gpu", "trainer.log_every_steps",
            "trainer.guard_every_steps", "trainer.audit_every_steps", "trainer.pack", "trainer.checkpoint",
            "trainer.max_wall_time_s", "trainer.hang_timeout_s", "trainer.exactness", "trainer.gradient_noise",
            "trainer.exchange_bucket_mib", "trainer.cuda_graph", "trainer.gradient_checkpointing",
            "trainer.evaluate_micro_batch_size",
            "steps_per_print", "memory_breakdown", "dump_state", "disable_python_gc",
            *(name.partition(".")[0] for name in OFF),
        ),
        _WHERE_IT_RUNS,
    ),
    **dict.fromkeys(
        (
            "trainer.fold", "trainer.task_options.data", "trainer.task_options.validation_fraction",
            "trainer.task_options.test_fraction", "trainer.task_options.split_seed",
            "trainer.task_options.split_column", "trainer.task_options.group_column",
            "trainer.task_options.label_column", "trainer.task_options.max_samples",
        ),
        _OTHER_DATA,
    ),
    **dict.fromkeys((*OTHERS, SCHEMA_KEY), "it is no part of the config"),
    **dict.fromkeys(
        (f"{block}{name}" for block in ("", "trainer.") for name in ("ranks", "world_size", "world_sizes", "num_gpus")),
        "the number of ranks is no key of a config: it is chosen at the start, and changes no bit of the model",
    ),
}  # fmt: skip
# How many combinations, and how many values of one range, are tried against the config's rules at most.
_MOST_COMBINATIONS, _MOST_VALUES = 256, 200


@dataclass(frozen=True)
class Range:
    """Numbers from low to high."""

    low: float | int = option(0, "the lowest value")
    high: float | int = option(0, "the highest value")
    log: bool = option(False, "draw evenly by the logarithm")
    step: float | int | None = option(None, "only low, low + step, ...", above=0)


@dataclass(frozen=True)
class Parameter:
    """One key that is searched.

    Attributes:
        key: dotted.
        name: short, for the console and figures: unique among the parameters.
        choices: the values of a list; empty for a range.
        low, high, log, step: of a range.
        whole: whether a range is of whole numbers.
    """

    key: str
    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a trial may have this value."""
        if self.choices:
            return any(same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            return False
        if self.whole and value != int(value):
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        # Rounding may leave a little more or less than a whole number: 0.07 / 0.01 is 7.000000000000001.
        return math.isclose(steps, round(steps), abs_tol=1e-9)

    def every(self) -> list[Any] | None:
        """All of its values; None if there are infinitely many."""
        if self.choices:
            return list(self.choices)
        if self.step is None and not self.whole:
            return None
        step = self.step or 1
        values = [self.low + i * step for i in range(int((self.high - self.low) / step + 1e-9) + 1)]
        return [int(value) for value in values] if self.whole else values

    def examples(self) -> list[Any]:
        """Values that are tried against the config's rules: all of a list; of a range its ends, then some between."""
        if self.choices:
            return list(self.choices)
        ends = [int(self.low), int(self.high)] if self.whole else [self.low, self.high]
        between = self.every() or []
        every = max(1, len(between) // _MOST_VALUES)
        return [*ends, *between[1:-1][::every]]


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same: 1 and 1.0 are, 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def shown(value: Any) -> str:
    """A value for people: floats with four significant digits, texts as they are, all else as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Space:
    """The parameters of a search."""

    parameters: tuple[Parameter, ...]

    def laid_over(self, values: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
        """A config's values, overridden by those of a point (key -> value). A block comes before the keys in it."""
        result = copy.deepcopy(dict(values))
        for key in sorted(point, key=lambda key: key.count(".")):
            lay_over(result, key, copy.deepcopy(point[key]))
        return result

    def own_point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The file's own values of the parameters, without those that lie outside of their range or list."""
        found = {}
        for parameter in self.parameters:
            value: Any = values
            for name in parameter.key.split("."):
                value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
            if value is not _MISSING and parameter.holds(value):
                found[parameter.key] = value
        return found

    def with_fractions(self, keys: Sequence[str]) -> Space:
        """The same space; ranges of these keys are of numbers that need not be whole."""
        return Space(
            tuple(
                dataclasses.replace(p, low=float(p.low), high=float(p.high), whole=False) if p.key in keys else p
                for p in self.parameters
            )
        )

    def text(self, point: Mapping[str, Any]) -> str:
        """A point for people: lr 0.003, model cnn."""
        return ", ".join(f"{p.name} {shown(point[p.key])}" for p in self.parameters if p.key in point)

    def grid_size(self) -> int:
        """The number of all combinations. Raises UserError if there are infinitely many."""
        for parameter in self.parameters:
            if parameter.every() is None:
                raise UserError(
                    f'"search.sampler" is "grid", but "{parameter.key}" has infinitely many values. Give a list of '
                    'values, or a "step".'
                )
        return math.prod(len(parameter.every() or ()) for parameter in self.parameters)

    def grid_point(self, number: int) -> dict[str, Any]:
        """One combination of a grid, by its number from 0; the last parameter changes first."""
        point = {}
        for parameter in reversed(self.parameters):
            values = parameter.every() or []
            number, place = divmod(number, len(values))
            point[parameter.key] = values[place]
        return point


_MISSING = object()


def read_space(block: Mapping[str, Any], values: Mapping[str, Any]) -> Space:
    """The parameters in "search.parameters", checked against the config's rules.

    Args:
        block: dotted key -> list or range.
        values: of the config that they change.

    Raises:
        UserError: a range is malformed, a key is unknown or cannot be searched, or the config does not allow a value.
    """
    if not block:
        raise UserError(
            '"search.parameters" is empty. It must name keys with what to try, such as "optimizer.params.lr": '
            '{"low": 1e-4, "high": 1e-1, "log": true}.'
        )
    names = _short(list(block))
    found = [_parameter(key, names[key], given, values) for key, given in block.items()]
    space = Space(tuple(found))
    for parameter in found:
        _check_values(parameter, space, values)
    return space


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Dotted key -> its shortest ending that no other key has: optimizer.params.lr -> lr."""
    names = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [f".{other}" for other in keys if other != key]
        names[key] = next((e for e in endings if not any(o.endswith(f".{e}") for o in others)), key)
    return names


def _parameter(key: str, name: str, given: Any, values: Mapping[str, Any]) -> Parameter:
    where = f'"search.parameters": "{key}"'
    parts = key.split(".")
    if not all(parts):
        raise UserError(f"{where} is no dotted key, such as optimizer.params.lr.")
    for length in range(len(parts), 0, -1):
        reason = _REFUSED.get(".".join(parts[:length]))
        if reason is not None:
            raise UserError(f"{where} cannot be searched: {reason}.")
    if isinstance(given, list):
        if len(given) < 2 or any(same(a, b) for a, b in itertools.combinations(given, 2)):
            raise UserError(f"{where} is {json.dumps(given)}. A list must hold at least two values, each of them once.")
        return Parameter(key, name, choices=tuple(given))
    if not isinstance(given, dict):
        raise UserError(
            f'{where} is {json.dumps(given)}. It must be a list of values, or a range such as {{"low": 1, "high": 8}}.'
        )
    for end in ("low", "high"):
        if end not in given:
            raise UserError(f'{where} is a range without "{end}". A range has "low" and "high".')
    own: Range = build(Range, given, f"search.parameters.{key}.")
    written_whole = all(isinstance(n, int) for n in (own.low, own.high, own.step or 0))
    if own.low >= own.high:
        raise UserError(f'{where}: "low" ({own.low}) must be less than "high" ({own.high}).')
    if own.log and own.low <= 0:
        raise UserError(f'{where}: "log" needs a "low" above 0, and it is {own.low}.')
    if own.log and own.step is not None:
        raise UserError(f'{where} has both "log" and "step". Leave one of them out.')
    if own.step is not None and own.step > own.high - own.low:
        raise UserError(f'{where}: "step" ({own.step}) is more than "high" - "low" ({own.high - own.low}).')
    whole = written_whole and not takes_fractions(key, values)
    high = own.high
    if own.step is not None:  # the last value: "high" itself need not be one. 1e-9 allows for the division's rounding
        high = own.low + int((own.high - own.low) / own.step + 1e-9) * own.step
    low: float = own.low
    if not whole:
        low, high = float(low), float(high)
    return Parameter(key, name, (), low, high, own.log, own.step, whole)


def takes_fractions(key: str, values: Mapping[str, Any]) -> bool:
    """Whether the config declares a key as a number that need not be whole. False for a task's options: see `look`."""
    from ..config.keys import Config

    if key.startswith("optimizer.params."):
        optimizer = values.get("optimizer", {})
        kind = str(optimizer.get("type", "AdamW")).lower() if isinstance(optimizer, Mapping) else ""
        known = deepspeed_keys.OPTIMIZERS.get(kind, {})
        return float in known.get(key.removeprefix("optimizer.params."), ())
    cls: Any = Config
    for part in key.split("."):
        fields = getattr(cls, "__dataclass_fields__", {})
        if part not in fields:
            return False
        cls = hints_of({part: fields[part].type}, cls)[part]
    return cls is float or float in getattr(cls, "__args__", ())


def _check_values(parameter: Parameter, space: Space, values: Mapping[str, Any]) -> None:
    """Raises UserError unless each value is allowed, at least together with some values of the others."""
    for value in parameter.examples():
        error: UserError | None = None
        for others in combinations(parameter, space):
            try:
                parse(space.laid_over(values, {**others, parameter.key: value})).plan(1)
                break
            except UserError as refused:
                error = error or refused
        else:
            said = str(error).removeprefix("config: ").removeprefix("--set ")
            hint = ""
            if not parameter.choices and value not in (parameter.low, parameter.high):
                hint = f'\n{shown(value)} lies in the range. Give a "step", or a list.'
            raise UserError(f'"search.parameters": "{parameter.key}" with the value {shown(value)}: {said}{hint}')


def combinations(parameter: Parameter, space: Space) -> Iterator[dict[str, Any]]:
    """Values of the other parameters, to try a value together with them."""
    yield {}  # first none: the value is tried with the file's own
    others = [other for other in space.parameters if other.key != parameter.key]
    ends = [other.examples()[:8] for other in others]
    for combination in itertools.islice(itertools.product(*ends), _MOST_COMBINATIONS if others else 0):
        yield {other.key: value for other, value in zip(others, combination)}
