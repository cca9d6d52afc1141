"""One JSON file describes a run: DeepSpeed's own keys and the `"trainer"` block. Every key is checked.

The dataclasses below are the schema: a field declares its type, its range and its meaning in one place.
Only the standard library is imported. So a wrong config is reported before torch is loaded, before a process
group exists, and before a device is claimed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from ..exact.plan import BatchPlan, resolve
from . import deepspeed_keys
from .loggers import OFF, CometOptions, CsvMonitorOptions, MlflowOptions, WandbOptions
from .optimizer_names import optimizer_names
from .schema import build, check_arguments, convert, lay_over, near, option, read_json

# Tells editors where the JSON schema is. It is no setting: `Config` has no field for it, and DeepSpeed does not get it.
SCHEMA_KEY = "$schema"
# Blocks that only the command of this name reads. A plain run ignores them.
OTHERS = ("study", "search", "cross_validation")


@dataclass(frozen=True)
class LearningRateOptions:
    """`trainer.learning_rate`: how `optimizer.params.lr` changes over a run."""

    scaling_rule: Literal["none", "linear", "sqrt", "adascale"] = option(
        "none", "multiply the rate by the growth k of the global batch (linear), by sqrt(k), or by AdaScale's gain"
    )
    base_global_batch_size: int | None = option(
        None, "the global batch for which the rate was chosen; default under weak scaling: that of one rank", minimum=1
    )
    warmup_epochs: float = option(0.0, "epochs of gradual warm-up, from the unscaled to the scaled rate", minimum=0)
    schedule: Literal["constant", "linear", "cosine"] = option("constant", "the shape after warm-up")
    final_fraction: float = option(
        0.0, "the last rate of linear and cosine, as a fraction of the highest rate", minimum=0, below=1
    )
    adascale_steps: int | None = option(
        None,
        "the run ends when AdaScale's gains add up to this many steps; default: after trainer.epochs",
        minimum=1,
    )


@dataclass(frozen=True)
class BestOptions:
    """`trainer.best`: which model of a run is kept, and early stopping."""

    metric: str | None = option(
        "auto",
        "the metric on validation that chooses the model; auto is the task's own choice; null keeps the last model",
    )
    mode: Literal["auto", "min", "max"] = option(
        "auto", "whether a lower (min) or a higher (max) metric is better; auto knows usual names, such as accuracy"
    )
    patience_evaluations: int = option(
        0, "stop after this many validations without a better model; 0 for never", minimum=0
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """`trainer.checkpoint`: what an interrupted run continues from."""

    every_steps: int = option(
        500,
        "steps between checkpoints, besides the last step's; with 0, only a run that is stopped writes one",
        minimum=0,
    )
    keep: int = option(2, "the number of newest checkpoints to keep", minimum=1)


@dataclass(frozen=True)
class LoraOptions:
    """`trainer.lora`: train low-rank updates instead of the weights (Hu et al. 2021), with the package peft."""

    rank: int = option(8, "rank of the updates", minimum=1)
    alpha: int = option(16, "the updates are scaled by alpha / rank", minimum=1)
    dropout: float = option(0.0, "dropout on the updates' input", minimum=0, below=1)
    target_modules: list[str] = option([], "names of layers that get updates; default: all linear layers")
    also_train: list[str] = option([], "modules that are trained whole; default: a classifier's last layer")


@dataclass(frozen=True)
class FoldOptions:
    """`trainer.fold`: train on all folds of the data but one, and test on that one. `cross-validate` sets it."""

    folds: int = option(5, "how many there are", minimum=2)
    number: int = option(0, "the fold that is the test split, from 0", minimum=0)
    seed: int = option(0, "which samples go into which fold", minimum=0)
    stratified: bool | None = option(
        None, "each fold has its share of every class; default: wherever there are classes"
    )
    validation_fraction: float = option(
        0.0, "of the other folds, held out for validation; 0 for none", minimum=0, below=1
    )
    pool: list[str] = option(
        ["train", "validation", "test"], "the splits of the data that are put together, in this order, and then cut"
    )
    group_column: str | None = option(
        None, "of a task of your own: the array of groups (patients, ...) whose samples stay in one fold"
    )
    label_column: str | None = option(
        None, "of a task of your own: the array of classes; default: y, label, labels or target"
    )


@dataclass(frozen=True)
class TrainerOptions:
    """`trainer`: everything that DeepSpeed has no key for."""

    task: str = option("digits", "a task of trainer/tasks, or your own as path/to/file.py:ClassName")
    task_options: dict[str, Any] = option({}, "keyword arguments for the task")
    epochs: int = option(20, "passes over the training set", minimum=1)
    max_steps: int | None = option(None, "stop after this many optimizer steps, even inside an epoch", minimum=1)
    train_samples: int | None = option(
        None, "train on this many samples of the training split; the choice does not depend on the seed", minimum=1
    )
    seed: int = option(0, "determines all randomness: weights, sample order, dropout, augmentation", minimum=0)
    drop_last: bool = option(False, "leave out an epoch's last, smaller global batch")
    output_dir: str | None = option(None, "where results go; default: a new folder runs/<config>-<number>")
    exactness: Literal["auto", "bitwise"] = option(
        "auto", "auto labels every result as bitwise or tolerance; bitwise refuses a run that cannot be exact"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto takes GPUs if there are any")
    ranks_per_gpu: int = option(1, "ranks that share one GPU, over gloo: to check exactness, not for speed", minimum=1)
    tf32: bool = option(
        False, "on GPUs, compute float32 matrix products and convolutions in TF32: faster, less precise, as exact"
    )
    cpu_threads: int = option(1, "intra-op threads of a rank; the bits depend on it", minimum=1, maximum=1024)
    evaluate_every_epochs: int = option(1, "epochs between validations; 0 for none", minimum=0)
    evaluate_micro_batch_size: int = option(128, "samples of one forward in evaluation", minimum=1)
    log_every_steps: int = option(10, "length of the logging window in steps", minimum=1)
    guard_every_steps: int = option(50, "steps between comparisons of the ranks' parameters; 0 for none", minimum=0)
    audit_every_steps: int | None = option(
        None,
        "steps between audits, in which each rank computes a micro-batch of another rank again; 0 for none; default: "
        "as often as the guard, and less often if a rank has fewer than four micro-batches",
        minimum=0,
    )
    pack: int | str | None = option(
        None,
        "micro-batches that one forward computes at most. auto: each rank finds what is fastest while the run goes on, "
        "if it has 60 steps or more; 1: one at a time; default: auto for the trainer's own tasks, 1 for others",
    )
    cuda_graph: Literal["auto"] | None = option(
        None,
        "auto: on a GPU, launch what a rank computes as one CUDA graph where its first steps have the same bits; no "
        "GPU has run it yet",
    )
    exchange_bucket_mib: float | None = option(
        None,
        "exchange the gradient in parts of this many MiB or more, each as soon as a rank's last backward has computed "
        "it; default: in one piece, after the backward",
        above=0,
    )
    gradient_noise: bool = option(False, "measure the gradient noise scale, from the micro-batches' gradients")
    checkpoint: CheckpointOptions = option(CheckpointOptions, "what an interrupted run continues from")
    max_wall_time_s: float | None = option(
        None, "stop with a checkpoint after this many seconds (exit code 75)", above=0
    )
    hang_timeout_s: float = option(
        600.0, "give a rank up as lost if it does not answer for this many seconds", minimum=15
    )
    learning_rate: LearningRateOptions = option(LearningRateOptions, "scaling rule, warm-up and schedule")
    best: BestOptions = option(BestOptions, "which model is kept and tested, and early stopping")
    decay_biases_and_norms: bool = option(False, "apply weight decay to parameters of one dimension, too")
    parameter_groups: dict[str, Any] = option({}, "parameter name or pattern -> other optimizer.params for it")
    freeze: list[str] = option([], "names or patterns of parameters that are not trained")
    lora: LoraOptions | None = option(None, "train low-rank updates instead of the weights")
    fold: FoldOptions | None = option(None, "test on one fold of all samples instead of the task's own test split")
    gradient_checkpointing: bool = option(
        False, "compute activations a second time in the backward: less memory, more time"
    )
    compile: bool = option(False, "compile the model with torch.compile")


@dataclass(frozen=True)
class OptimizerOptions:
    """`optimizer`, as DeepSpeed reads it."""

    type: str = option(
        "AdamW", "Adam, AdamW and Lion are DeepSpeed's, LARS and LAMB are pytorch-optimizer's, all others torch.optim's"
    )
    params: dict[str, Any] = option({}, "the optimizer's arguments")


@dataclass(frozen=True)
class SchedulerOptions:
    """`scheduler`, as DeepSpeed reads it. trainer.learning_rate is the alternative."""

    type: str = option("", "one of DeepSpeed's schedulers")
    params: dict[str, Any] = option({}, "the scheduler's arguments")


@dataclass(frozen=True)
class TorchAutocastOptions:
    """`torch_autocast`, as DeepSpeed reads it."""

    enabled: bool = option(False, "run forward and loss under torch.autocast")
    dtype: Literal["bfloat16"] = option("bfloat16", "float16 would need loss scaling, which is not supported")


@dataclass(frozen=True)
class TensorBoardOptions:
    """`tensorboard`, DeepSpeed's block. Only its switch has an effect here."""

    enabled: bool = option(True, "write TensorBoard events under <output_dir>/tensorboard")


@dataclass(frozen=True)
class Config:
    """A whole config file: DeepSpeed's keys at the top level, ours under `trainer`."""

    train_batch_size: int | None = option(None, "global batch; if it is given, the run is strong scaling", minimum=1)
    train_micro_batch_size_per_gpu: int | None = option(None, "samples of one forward/backward", minimum=1)
    gradient_accumulation_steps: int | None = option(None, "micro-steps of a rank, for weak scaling", minimum=1)
    gradient_clipping: float = option(1.0, "largest gradient norm (DeepSpeed's default is 1.0); 0 for none", minimum=0)
    optimizer: OptimizerOptions = option(OptimizerOptions, "the optimizer")
    scheduler: SchedulerOptions | None = option(None, "DeepSpeed's schedule of the learning rate")
    torch_autocast: TorchAutocastOptions = option(TorchAutocastOptions, "mixed precision")
    tensorboard: TensorBoardOptions = option(TensorBoardOptions, "events")
    wandb: WandbOptions = option(WandbOptions, "Weights & Biases")
    comet: CometOptions = option(CometOptions, "Comet")
    csv_monitor: CsvMonitorOptions = option(CsvMonitorOptions, "CSV files")
    mlflow: MlflowOptions = option(MlflowOptions, "MLflow")
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
    disable_python_gc: bool = option(False, "let DeepSpeed switch Python's garbage collector off")
    trainer: TrainerOptions = option(TrainerOptions, "everything that DeepSpeed has no key for")

    @property
    def zero_stage(self) -> int:
        """ZeRO's stage; 0 for no ZeRO. At stages 1 to 3, DeepSpeed reduces gradients in its own order."""
        return int(self.zero_optimization.get("stage", 0))

    def plan(self, world_size: int) -> BatchPlan:
        """The batch plan at a world size. Raises UserError if there is none."""
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

    def unlogged(self) -> Config:
        """This config with every logger switched off."""
        blocks = {name.partition(".")[0] for name in OFF}
        return dataclasses.replace(
            self, **{name: dataclasses.replace(getattr(self, name), enabled=False) for name in blocks}
        )

    def as_dict(self) -> dict[str, Any]:
        """The config with all defaults, as nested dictionaries for JSON."""
        return dataclasses.asdict(self)


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a config file, applies overrides and checks the result.

    Args:
        path: the JSON file.
        overrides: dotted key -> value ("trainer.seed" -> 3). They override the file.

    Raises:
        UserError: the file is missing or malformed, or any key or value is wrong.
    """
    values = read_json(Path(path))
    for key, value in (overrides or {}).items():
        lay_over(values, key, value)
    try:
        return parse(values, str(path))
    except UserError as error:
        # A wrong override is not in the file, where people would look for it.
        words = str(error).removeprefix(f"{path}: ")
        given = next((key for key in overrides or {} if f'"{key}"' in words), None)
        if given is None:
            raise
        text = json.dumps((overrides or {})[given], default=str)
        raise UserError(f"{path} with {given}={text[:60]}: {words}") from None


def parse(values: dict[str, Any], source: str = "config") -> Config:
    """The checked config for a dictionary of JSON values.

    Args:
        values: as read from a file.
        source: where they come from, for messages.

    Raises:
        UserError: a key or a value is wrong, or two keys contradict one another.
    """
    try:
        config: Config = build(Config, _check_top_level(values), "")
        _check_contradictions(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return config


def _check_top_level(values: dict[str, Any]) -> dict[str, Any]:
    """The values without keys that ask for nothing here. Raises UserError for unknown keys and for refused ones."""
    known = [f.name for f in dataclasses.fields(Config)]
    for key, value in values.items():
        if key in OTHERS:
            continue
        if key == SCHEMA_KEY:
            convert(str, value, key)
            continue
        if key in deepspeed_keys.REFUSED:
            # Many templates contain {"enabled": false}, which asks for nothing.
            if value is False or value is None or (isinstance(value, dict) and value.get("enabled") is False):
                continue
            raise UserError(f'"{key}" is a DeepSpeed key without effect here: {deepspeed_keys.REFUSED[key]}.')
        if key == "comet" and isinstance(value, dict) and "samples_log_interval" in value:
            raise UserError(
                '"comet.samples_log_interval" has no effect here: records come every trainer.log_every_steps steps. '
                "Leave it out."
            )
        if key not in known:
            ours = [f.name for f in dataclasses.fields(TrainerOptions)]
            if key in ours:
                raise UserError(f'unknown key "{key}". It belongs in the "trainer" block: trainer.{key}.')
            raise UserError(f'unknown key "{key}". {near(key, [*known, *OTHERS, SCHEMA_KEY, *deepspeed_keys.REFUSED])}')
    return {key: value for key, value in values.items() if key in known}


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
                "trainer.learning_rate.base_global_batch_size, the batch for which the rate was chosen."
            )
    elif rate.base_global_batch_size is not None:
        raise UserError('trainer.learning_rate.base_global_batch_size has no effect with scaling_rule "none".')
    if rate.adascale_steps is not None and rate.scaling_rule != "adascale":
        raise UserError(
            f'trainer.learning_rate.adascale_steps has no effect with scaling_rule "{rate.scaling_rule}".\n'
            'Leave it out, or set the rule to "adascale".'
        )
    _check_model_options(config)
    if rate.final_fraction and rate.schedule == "constant":
        raise UserError('trainer.learning_rate.final_fraction has no effect with schedule "constant".')


def _check_fold(fold: FoldOptions) -> None:
    if fold.number >= fold.folds:
        raise UserError(
            f'"trainer.fold.number" is {fold.number}, but there are {fold.folds} folds, counted from 0: it must be at '
            f"most {fold.folds - 1}."
        )
    if not fold.pool or len(set(fold.pool)) < len(fold.pool) or set(fold.pool) - {"train", "validation", "test"}:
        raise UserError(
            f'"trainer.fold.pool" is {json.dumps(fold.pool)}. It must name at least one of train, validation and '
            "test, and each of them once."
        )


def _check_model_options(config: Config) -> None:
    options = config.trainer
    if options.fold is not None:
        _check_fold(options.fold)
    best = options.best
    if best.mode != "auto" and best.metric in ("auto", None):
        raise UserError(
            f'"trainer.best.mode" is "{best.mode}", but trainer.best.metric names no metric. Name one, such as '
            '"accuracy", or leave the mode out.'
        )
    if best.patience_evaluations and (best.metric is None or not options.evaluate_every_epochs):
        cause = "trainer.best.metric is null" if best.metric is None else "trainer.evaluate_every_epochs is 0"
        raise UserError(f"trainer.best.patience_evaluations has no effect, because {cause}.")
    if options.pack not in (None, "auto") and (not isinstance(options.pack, int) or options.pack < 1):
        raise UserError(
            f'"trainer.pack" is {json.dumps(options.pack)}. It must be "auto", or a whole number of at least 1.'
        )
    if options.exchange_bucket_mib is not None and (config.zero_stage or options.compile):
        other = f'"zero_optimization.stage" {config.zero_stage}' if config.zero_stage else '"trainer.compile"'
        raise UserError(f'"trainer.exchange_bucket_mib" has no effect with {other}. Leave one of them out.')
    if options.cuda_graph is not None and (config.zero_stage or options.compile):
        other = f'"zero_optimization.stage" {config.zero_stage}' if config.zero_stage else '"trainer.compile"'
        raise UserError(f'"trainer.cuda_graph" has no effect with {other}. Leave one of them out.')
    for pattern in options.freeze:
        if not isinstance(pattern, str):
            raise UserError(f'"trainer.freeze" holds {pattern!r}. It must be a list of parameter names or patterns.')
    for pattern, changes in options.parameter_groups.items():
        where = f'"trainer.parameter_groups.{pattern}"'
        if not isinstance(changes, dict) or not changes:
            raise UserError(f'{where} must be a block of optimizer arguments, such as {{"lr": 0.001}}.')
        for key, value in changes.items():
            if key not in ("lr", "weight_decay", "betas", "eps", "momentum"):
                raise UserError(f"{where}: {near(key, ('lr', 'weight_decay', 'betas', 'eps', 'momentum'))}")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key != "betas" and (not number or not 0 <= value < math.inf):
                raise UserError(f"{where}: {key} is {value!r}. It must be a number of at least 0.")
        if "lr" in changes and config.scheduler is not None:
            raise UserError(
                f'{where} sets a learning rate, but "scheduler" sets that of all groups. Use trainer.learning_rate: '
                "its schedule multiplies each group's own rate."
            )
    if options.compile and config.zero_stage:
        raise UserError('"trainer.compile" works only at ZeRO stage 0. Leave one of them out.')
    if options.lora is not None and options.freeze:
        raise UserError('"trainer.lora" freezes all weights itself. Leave "trainer.freeze" out.')


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
        return
    whole = None  # the setting, if there is one, that needs the whole gradient of a micro-batch or of a parameter
    if config.trainer.gradient_noise:
        whole = '"trainer.gradient_noise"'
    elif config.trainer.learning_rate.scaling_rule == "adascale":
        whole = 'trainer.learning_rate.scaling_rule "adascale"'
    elif config.optimizer.type.lower() in deepspeed_keys.LAYERWISE:
        whole = f'"optimizer.type" {config.optimizer.type}'
    if whole is not None:
        raise UserError(
            f"{whole} works only at ZeRO stage 0, but zero_optimization.stage is {stage}: ZeRO reduces and keeps "
            "gradients in pieces that belong to no micro-batch and no layer. Leave one of them out."
        )
    if config.trainer.exactness == "bitwise":
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
    # Without names (torch's source cannot be read), any name passes here. It is checked again when torch is loaded.
    elif lower not in deepspeed_keys.LAYERWISE and optimizer_names() and name not in optimizer_names():
        known = [other for other in optimizer_names() if other.lower() not in deepspeed_keys.REFUSED_OPTIMIZERS]
        raise UserError(f'unknown optimizer "{name}". {near(name, [*known, "FusedAdam", "LARS", "LAMB"])}')
    if lower == "lars" and config.trainer.decay_biases_and_norms:
        raise UserError(
            '"trainer.decay_biases_and_norms" has no effect with LARS, which never decays parameters of one dimension. '
            "Leave it out."
        )
    if lower in ("adam", "adamw"):
        torch_adam = bool(params.get("torch_adam"))
        for key in params:
            if key in deepspeed_keys.ADAM_TORCH_ONLY and not torch_adam:
                raise UserError(
                    f"\"optimizer.params.{key}\" belongs to torch's {name}, but this config asks for DeepSpeed's "
                    'FusedAdam. Add "torch_adam": true, or leave it out.'
                )
            if key in deepspeed_keys.ADAM_DEEPSPEED_ONLY and torch_adam:
                raise UserError(
                    f'"optimizer.params.{key}" belongs to DeepSpeed\'s FusedAdam, but "torch_adam": true asks for '
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
    if isinstance(betas, list) and not (len(betas) == 2 and all(type(b) in (int, float) and 0 <= b < 1 for b in betas)):
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
    if config.trainer.learning_rate != LearningRateOptions():
        raise UserError(
            '"scheduler" and "trainer.learning_rate" both set the learning rate of every step. Leave one of them out.'
        )
