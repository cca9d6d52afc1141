"""One JSON file describes a run: DeepSpeed's own keys and the `"trainer"` block, every key of it checked.

The schema is the dataclasses below; a field declares its type, its range and its meaning in one place.
Only the standard library is imported, so that a bad config is reported before torch is loaded, a
process group exists or a device is claimed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import deepspeed_keys
from .batching import BatchPlan, resolve
from .errors import UserError


def option(
    default: Any, doc: str, *, minimum: float | None = None, above: float | None = None, below: float | None = None
) -> Any:
    """A config field: its default, its meaning, and the range its number must lie in."""
    metadata = {"doc": doc, "minimum": minimum, "above": above, "below": below}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class LearningRate:
    """`trainer.learning_rate`: what happens to `optimizer.params.lr` over a run."""

    scaling_rule: Literal["none", "linear", "sqrt"] = option(
        "none", "multiply the rate by the growth k of the global batch (linear) or by sqrt(k)"
    )
    base_global_batch_size: int | None = option(
        None, "the global batch the rate was chosen for; weak scaling takes that of one rank", minimum=1
    )
    warmup_epochs: float = option(0.0, "epochs of gradual warm-up, from the unscaled to the scaled rate", minimum=0)
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "the shape after warm-up")
    final_fraction: float = option(0.0, "where linear and cosine end, of the highest rate", minimum=0, below=1)


@dataclass(frozen=True)
class Trainer:
    """`trainer`: everything that DeepSpeed has no key for."""

    task: str = option("digits", "a task of trainer/tasks, or your own as path/to/file.py:ClassName")
    task_options: dict[str, Any] = option({}, "keyword arguments for the task")
    epochs: int = option(20, "passes over the training set", minimum=1)
    max_steps: int | None = option(None, "stop after so many optimizer steps, even inside an epoch", minimum=1)
    seed: int = option(0, "all randomness follows from it: weights, sample order, dropout, augmentation", minimum=0)
    drop_last: bool = option(False, "leave out an epoch's last, smaller global batch")
    output_dir: str | None = option(None, "where results go; without it a new folder runs/<config>-<number>")
    exactness: Literal["auto", "bitwise"] = option(
        "auto", "auto says in every result whether the run is bitwise; bitwise refuses what cannot be"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes GPUs where there are any")
    ranks_per_gpu: int = option(1, "ranks that share one GPU, over gloo: to check exactness, not for speed", minimum=1)
    cpu_threads: int = option(1, "intra-op threads of a rank; part of what the bits depend on", minimum=1)
    evaluate_every_epochs: int = option(1, "epochs between validations; 0 for none", minimum=0)
    evaluate_micro_batch_size: int = option(128, "samples of one forward in evaluation", minimum=1)
    log_every_steps: int = option(10, "length of the logging window in steps", minimum=1)
    guard_every_steps: int = option(50, "steps between comparisons of the ranks' parameters; 0 for none", minimum=0)
    learning_rate: LearningRate = option(LearningRate, "scaling rule, warm-up and schedule")


@dataclass(frozen=True)
class Optimizer:
    """`optimizer`, as DeepSpeed reads it."""

    type: str = option("AdamW", "Adam, AdamW and Lion are DeepSpeed's own; any other name is torch.optim's")
    params: dict[str, Any] = option({}, "the optimizer's arguments")


@dataclass(frozen=True)
class Scheduler:
    """`scheduler`, as DeepSpeed reads it; trainer.learning_rate is the other way to have one."""

    type: str = option("", "one of DeepSpeed's schedulers")
    params: dict[str, Any] = option({}, "the scheduler's arguments")


@dataclass(frozen=True)
class TorchAutocast:
    """`torch_autocast`, as DeepSpeed reads it."""

    enabled: bool = option(False, "run forward and loss under torch.autocast")
    dtype: Literal["bfloat16"] = option("bfloat16", "float16 would need loss scaling, which is not supported")


@dataclass(frozen=True)
class TensorBoard:
    """`tensorboard`, DeepSpeed's block, of which only the switch is ours to obey."""

    enabled: bool = option(True, "write TensorBoard events under <output_dir>/tensorboard")


@dataclass(frozen=True)
class Config:
    """A whole config file: DeepSpeed's keys at the top level, ours under `trainer`."""

    train_batch_size: int | None = option(None, "global batch: given, the run is strong scaling", minimum=1)
    train_micro_batch_size_per_gpu: int | None = option(None, "samples of one forward/backward", minimum=1)
    gradient_accumulation_steps: int | None = option(None, "micro-steps of a rank, for weak scaling", minimum=1)
    gradient_clipping: float = option(1.0, "largest gradient norm (DeepSpeed's default is 1.0); 0 for none", minimum=0)
    optimizer: Optimizer = option(Optimizer, "")
    scheduler: Scheduler | None = option(None, "")
    torch_autocast: TorchAutocast = option(TorchAutocast, "")
    tensorboard: TensorBoard = option(TensorBoard, "")
    zero_optimization: dict[str, Any] = option({}, "DeepSpeed's ZeRO; stages 1 to 3 make the run tolerance")
    zero_allow_untested_optimizer: bool | None = option(None, "DeepSpeed's, with ZeRO")
    zero_force_ds_cpu_optimizer: bool | None = option(None, "DeepSpeed's, with ZeRO")
    communication_data_type: str | None = option(None, "DeepSpeed's, with ZeRO")
    prescale_gradients: bool | None = option(None, "DeepSpeed's, with ZeRO")
    gradient_predivide_factor: float | None = option(None, "DeepSpeed's, with ZeRO", above=0)
    gradient_allreduce_op: str | None = option(None, "DeepSpeed's, with ZeRO")
    steps_per_print: int | None = option(None, "DeepSpeed's progress line, in its log file", minimum=1)
    memory_breakdown: bool = option(False, "DeepSpeed's memory report, in its log file")
    dump_state: bool = option(False, "DeepSpeed's settings, in its log file")
    disable_python_gc: bool = option(False, "DeepSpeed switches Python's garbage collector off")
    trainer: Trainer = option(Trainer, "")

    @property
    def zero_stage(self) -> int:
        """0 for none; 1 to 3 let DeepSpeed reduce gradients its own way."""
        return int(self.zero_optimization.get("stage", 0))

    def plan(self, world_size: int) -> BatchPlan:
        """The batch plan at a world size. Raises UserError where there is none."""
        return resolve(
            world_size,
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
        )

    def base_global_batch_size(self) -> int:
        """The global batch for which `optimizer.params.lr` was chosen."""
        if self.trainer.learning_rate.base_global_batch_size is not None:
            return self.trainer.learning_rate.base_global_batch_size
        return self.plan(1).global_batch_size

    def as_dict(self) -> dict[str, Any]:
        """The config as resolved, defaults included, ready for JSON."""
        return dataclasses.asdict(self)


def load(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a config file, lays overrides over it and checks the whole.

    Args:
        path: the JSON file.
        overrides: dotted key -> value ("trainer.seed" -> 3); they win over the file.

    Raises:
        UserError: the file is missing or malformed, or any key or value is wrong.
    """
    values = _read_json(Path(path))
    for key, value in (overrides or {}).items():
        _lay_over(values, key, value)
    return parse(values, str(path))


def parse(values: dict[str, Any], source: str = "config") -> Config:
    """The checked config for a dictionary of JSON values. Raises UserError; `source` names its origin."""
    try:
        _check_top_level(values)
        config: Config = _build(Config, values, "")
        _check_contradictions(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return config


def parse_override(text: str) -> tuple[str, Any]:
    """`dotted.key=value` as (key, value); the value is JSON where it reads as JSON, else a string."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set {text}: expected dotted.key=value, for example --set trainer.epochs=5.")
    try:
        return key, json.loads(value, parse_constant=_reject_constant)
    except ValueError:
        return key, value


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise UserError(f'the key "{key}" stands twice in the same block.')
        result[key] = value
    return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f" In {path.parent} there are: {', '.join(p.name for p in near)}." if near else ""
        raise UserError(f"The config file {path} does not exist.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} cannot be read: {error}.") from None
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_reject_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object {{...}}, not {_kind(values)}.")
    return values


def _lay_over(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    block = values
    for name in parents:
        block = block.setdefault(name, {})
        if not isinstance(block, dict):
            raise UserError(f'--set {dotted}: "{name}" is {_kind(block)}, not a block.')
    block[last] = value


def near(name: str, valid: typing.Iterable[str]) -> str:
    """A sentence naming the valid key closest to `name`, or all of them where none is close."""
    valid = list(valid)
    matches = difflib.get_close_matches(name.lower(), [v.lower() for v in valid], n=1, cutoff=0.6)
    if matches:
        return f'Did you mean "{next(v for v in valid if v.lower() == matches[0])}"?'
    return f"Known: {', '.join(valid)}." if valid else "It takes none."


def _check_top_level(values: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(Config)]
    for key, value in values.items():
        if key in deepspeed_keys.REFUSED:
            # {"enabled": false} is what many templates carry along, and asks for nothing.
            if value is False or value is None or (isinstance(value, dict) and value.get("enabled") is False):
                continue
            raise UserError(f'"{key}" is a DeepSpeed key without effect here: {deepspeed_keys.REFUSED[key]}.')
        if key not in known:
            ours = [f.name for f in dataclasses.fields(Trainer)]
            if key in ours:
                raise UserError(f'unknown key "{key}". It belongs into the "trainer" block: trainer.{key}.')
            raise UserError(f'unknown key "{key}". {near(key, [*known, *deepspeed_keys.REFUSED])}')


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    """An instance of a schema dataclass from JSON values; `path` is its dotted place with a dot at the end."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            if not path and key in deepspeed_keys.REFUSED:
                continue
            raise UserError(f'unknown key "{path}{key}". {near(key, fields)}')
        arguments[key] = _convert(hints[key], value, path + key, fields[key].metadata)
    return cls(**arguments)


def _convert(hint: Any, value: Any, path: str, metadata: typing.Mapping[str, Any]) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        if value is None and len(arms) < len(typing.get_args(hint)):
            return None
        (hint,) = arms
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f'"{path}" must be a block {{...}}, not {_kind(value)}.')
        return _build(typing.cast(type, hint), value, path + ".")
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool):
            listed = ", ".join(json.dumps(c) for c in choices)
            raise UserError(f'"{path}" is {json.dumps(value)}. It must be one of {listed}.')
        return value
    _check_size(value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wanted = typing.get_origin(hint) or hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f'"{path}" must be {_article(wanted)}, not {_kind(value)}.')
    _check_range(value, path, metadata)
    return value


def _check_size(value: Any, path: str) -> None:
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UserError(f'"{path}" has {len(str(abs(value)))} digits. It must fit into 64 bits.')


def _check_range(value: Any, path: str, metadata: typing.Mapping[str, Any]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    minimum, above, below = (metadata.get(k) for k in ("minimum", "above", "below"))
    if not math.isfinite(value):
        raise UserError(f'"{path}" is {value}. It must be finite.')
    if minimum is not None and value < minimum:
        raise UserError(f'"{path}" is {value}. It must be at least {minimum}.')
    if above is not None and value <= above:
        raise UserError(f'"{path}" is {value}. It must be above {above}.')
    if below is not None and value >= below:
        raise UserError(f'"{path}" is {value}. It must be below {below}.')


_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a block {...}"}


def _article(wanted: type) -> str:
    return _NAMES.get(wanted, wanted.__name__)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return {dict: "a block {...}", list: "a list [...]"}[type(value)]
    return f"{json.dumps(value)} ({_NAMES[type(value)]})" if not isinstance(value, bool) else json.dumps(value)


def check_arguments(values: dict[str, Any], types_by_name: dict[str, tuple[type, ...]], path: str) -> None:
    """Checks the names and JSON types of a free block (optimizer or scheduler arguments, ZeRO)."""
    for key, value in values.items():
        _check_size(value, f"{path}.{key}")
        if key not in types_by_name:
            raise UserError(f'unknown key "{path}.{key}". {near(key, types_by_name)}')
        allowed = types_by_name[key]
        if value == "auto":
            raise UserError(f'"{path}.{key}" is "auto", which only the Hugging Face Trainer fills in. Give a value.')
        if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
            names = {list: "a list [...]", **_NAMES}
            wanted = "a number" if float in allowed else " or ".join(names[t] for t in allowed)
            raise UserError(f'"{path}.{key}" must be {wanted}, not {_kind(value)}.')


def _check_contradictions(config: Config) -> None:
    _check_zero(config)
    _check_optimizer(config)
    _check_scheduler(config)
    rate = config.trainer.learning_rate
    if rate.scaling_rule != "none":
        if "lr" not in config.optimizer.params:
            raise UserError('trainer.learning_rate.scaling_rule scales "optimizer.params.lr", which is not given.')
        if config.train_batch_size is not None and rate.base_global_batch_size is None:
            raise UserError(
                f'trainer.learning_rate.scaling_rule "{rate.scaling_rule}" has nothing to scale under strong scaling: '
                f"the global batch is {config.train_batch_size} at every world size.\nLeave it out, or give "
                "trainer.learning_rate.base_global_batch_size, the batch the rate was chosen for."
            )
    elif rate.base_global_batch_size is not None:
        raise UserError('trainer.learning_rate.base_global_batch_size has no effect with scaling_rule "none".')
    if rate.final_fraction and rate.schedule == "constant":
        raise UserError('trainer.learning_rate.final_fraction has no effect with schedule "constant".')


def _check_zero(config: Config) -> None:
    check_arguments(config.zero_optimization, deepspeed_keys.ZERO, "zero_optimization")
    stage = config.zero_stage
    if stage not in (0, 1, 2, 3):
        raise UserError(f'"zero_optimization.stage" is {stage}. It must be 0, 1, 2 or 3.')
    if stage == 0:
        extra = [k for k in config.zero_optimization if k != "stage"]
        extra += [k for k in deepspeed_keys.ONLY_WITH_ZERO if getattr(config, k) is not None]
        if extra:
            raise UserError(
                f'"{extra[0]}" has no effect at ZeRO stage 0: the trainer reduces gradients along its own tree.\n'
                "Leave it out, or set zero_optimization.stage to 1, 2 or 3 (the run is then labelled tolerance)."
            )
    elif config.trainer.exactness == "bitwise":
        raise UserError(
            f'trainer.exactness "bitwise" and zero_optimization.stage {stage} contradict one another: DeepSpeed '
            "reduces gradients in an order that depends on the number of ranks.\n"
            'Use stage 0, or exactness "auto", which labels the run tolerance.'
        )


def _check_optimizer(config: Config) -> None:
    name, params = config.optimizer.type, config.optimizer.params
    lower = name.lower()
    if lower in deepspeed_keys.REFUSED_OPTIMIZERS:
        raise UserError(f'"optimizer.type" {name} cannot be used: {deepspeed_keys.REFUSED_OPTIMIZERS[lower]}.')
    if lower in deepspeed_keys.OPTIMIZERS:
        check_arguments(params, deepspeed_keys.OPTIMIZERS[lower], "optimizer.params")
    if lower in ("adam", "adamw"):
        torch_adam = bool(params.get("torch_adam"))
        for key in params:
            if key in deepspeed_keys.ADAM_TORCH_ONLY and not torch_adam:
                raise UserError(
                    f"\"optimizer.params.{key}\" belongs to torch's {name}, and this config asks for DeepSpeed's "
                    'FusedAdam. Add "torch_adam": true, or leave it out.'
                )
            if key in deepspeed_keys.ADAM_DEEPSPEED_ONLY and torch_adam:
                raise UserError(
                    f'"optimizer.params.{key}" belongs to DeepSpeed\'s FusedAdam, and "torch_adam": true asks for '
                    f"torch's {name}. Leave one of them out."
                )
        if lower == "adamw" and params.get("adam_w_mode") is False:
            raise UserError('"optimizer.params.adam_w_mode": false has no effect with type AdamW. Use type Adam.')
        if "fp32_optimizer_states" in params and not config.zero_optimization.get("offload_optimizer"):
            raise UserError('"optimizer.params.fp32_optimizer_states" has no effect without ZeRO\'s offload_optimizer.')
        if params.get("amsgrad") and not torch_adam:
            raise UserError(
                '"optimizer.params.amsgrad": DeepSpeed\'s FusedAdam has no AMSGrad. Add "torch_adam": true.'
            )
    for key, low, high in (("lr", 0.0, math.inf), ("weight_decay", 0.0, math.inf), ("eps", 0.0, math.inf)):
        value = params.get(key)
        if isinstance(value, (int, float)) and not (low <= value < high):
            raise UserError(f'"optimizer.params.{key}" is {value}. It must be at least {low:g} and finite.')
    betas = params.get("betas")
    if isinstance(betas, list) and not (
        len(betas) == 2 and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas)
    ):
        raise UserError(f'"optimizer.params.betas" is {betas}. It must be two numbers of at least 0 and below 1.')


def _check_scheduler(config: Config) -> None:
    scheduler = config.scheduler
    if scheduler is None:
        return
    if scheduler.type not in deepspeed_keys.SCHEDULERS:
        raise UserError(f'"scheduler.type" is "{scheduler.type}". {near(scheduler.type, deepspeed_keys.SCHEDULERS)}')
    check_arguments(scheduler.params, deepspeed_keys.SCHEDULERS[scheduler.type], "scheduler.params")
    for key in deepspeed_keys.SCHEDULER_REQUIRED.get(scheduler.type, ()):
        if key not in scheduler.params:
            raise UserError(f'"scheduler.params.{key}" is missing: {scheduler.type} needs it.')
    if config.trainer.learning_rate != LearningRate():
        raise UserError(
            '"scheduler" and "trainer.learning_rate" both set the learning rate of every step. Leave one of them out.'
        )
