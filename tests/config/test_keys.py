"""The keys of a config: every error with its numbers and names, contradictions, and that every field is read."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from trainer.config import deepspeed_keys
from trainer.config import keys as config
from trainer.config.keys import Config
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ADAM = {"type": "AdamW", "params": {"lr": 0.001}}
BASE = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "optimizer": ADAM}


def base(**changes: Any) -> dict[str, Any]:
    """A valid config with some top-level keys changed."""
    return {**BASE, **changes}


def adam(**params: Any) -> dict[str, Any]:
    return base(optimizer={"type": "AdamW", "params": params})


def rate(**values: Any) -> dict[str, Any]:
    return base(trainer={"learning_rate": values})


def write(folder: Path, text: str, name: str = "run.json") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        config.parse(values, "run.json")
    message = str(caught.value)
    assert message.startswith("run.json: "), message
    assert caught.value.exit_code == 2
    return message


def check_words(message: str, words: tuple[str, ...]) -> None:
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


# What a file may say


def test_smallest_config_and_its_defaults() -> None:
    c = config.parse({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8})
    assert (c.optimizer.type, c.optimizer.params) == ("AdamW", {})
    assert (c.trainer.task, c.trainer.epochs, c.trainer.seed, c.trainer.max_steps) == ("digits", 20, 0, None)
    assert (c.zero_stage, c.scheduler, c.torch_autocast.enabled, c.gradient_clipping) == (0, None, False, 1.0)
    assert c.trainer.learning_rate == config.LearningRateOptions()
    plan = c.plan(4)
    assert (plan.scaling, plan.global_batch_size, plan.micro_batches) == ("strong", 64, 8)


def test_default_blocks_are_not_shared() -> None:
    one, other = config.parse(BASE), config.parse(BASE)
    one.trainer.task_options["width"] = 3
    one.zero_optimization["stage"] = 1
    assert other.trainer.task_options == {} and other.zero_optimization == {}


def test_integers_pass_as_floats_and_arrive_as_floats() -> None:
    c = config.parse(base(gradient_clipping=2, trainer={"learning_rate": {"warmup_epochs": 3}}))
    assert isinstance(c.gradient_clipping, float) and c.gradient_clipping == 2.0
    assert isinstance(c.trainer.learning_rate.warmup_epochs, float) and c.trainer.learning_rate.warmup_epochs == 3.0


def test_as_dict_can_be_read_back() -> None:
    values = base(
        trainer={"task_options": {"width": 8}, "seed": 5, "learning_rate": {"schedule": "cosine"}},
        zero_optimization={"stage": 1},
        prescale_gradients=False,
    )
    c = config.parse(values)
    assert config.parse(json.loads(json.dumps(c.as_dict()))) == c


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    c = config.load_config(path)
    assert c.plan(1).micro_batches >= 1


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (base(), 64),
        ({"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3, "optimizer": ADAM}, 24),
        (rate(scaling_rule="sqrt", base_global_batch_size=16), 16),
    ],
)
def test_base_global_batch_size(values: dict[str, Any], wanted: int) -> None:
    """As given; else the batch of one rank."""
    assert config.parse(values).base_global_batch_size() == wanted


# Keys

UNKNOWN = [
    (base(train_batch_sise=3), ('unknown key "train_batch_sise"', '"train_batch_size"')),
    (base(Gradient_Clipping=3), ('unknown key "Gradient_Clipping"', '"gradient_clipping"')),
    (base(zero_optimisation={}), ('unknown key "zero_optimisation"', '"zero_optimization"')),
    (base(wall_clock_breakdwn=True), ('"wall_clock_breakdwn"', '"wall_clock_breakdown"')),
    (base(epochs=3), ('unknown key "epochs"', '"trainer" block', "trainer.epochs")),
    (base(learning_rate={}), ('unknown key "learning_rate"', "trainer.learning_rate")),
    (base(xyzzy=3), ('unknown key "xyzzy"', "Known: ", "train_batch_size", "trainer")),
    (base(trainer={"epoch": 3}), ('unknown key "trainer.epoch"', '"epochs"')),
    (base(trainer={"guard_every_step": 3}), ('"trainer.guard_every_step"', '"guard_every_steps"')),
    (rate(warmup_epoch=3), ('"trainer.learning_rate.warmup_epoch"', '"warmup_epochs"')),
    (rate(shedule="cosine"), ('"trainer.learning_rate.shedule"', '"schedule"')),
    (base(optimizer={"typ": "Adam"}), ('unknown key "optimizer.typ"', '"type"')),
    (adam(weight_decy=0.1), ('unknown key "optimizer.params.weight_decy"', '"weight_decay"')),
    (adam(adam_w_mode=False), ("adam_w_mode", "Use type Adam")),
    (adam(fp32_optimizer_states=True), ("fp32_optimizer_states", "offload_optimizer")),
    (adam(lr=10**400), ('"optimizer.params.lr"', "401 digits")),
    (adam(max_grad_norm=1.0), ('unknown key "optimizer.params.max_grad_norm"',)),
    (base(optimizer={"type": "Lion", "params": {"eps": 1e-8}}), ('unknown key "optimizer.params.eps"',)),
    (base(zero_optimization={"stag": 1}), ('unknown key "zero_optimization.stag"', '"stage"')),
    (
        base(zero_optimization={"stage": 2, "overlap_coms": True}),
        ('unknown key "zero_optimization.overlap_coms"', '"overlap_comm"'),
    ),
    (base(scheduler={"type": "WarmupLR", "prams": {}}), ('unknown key "scheduler.prams"', '"params"')),
    (base(scheduler={"type": "WarmupRL"}), ('"scheduler.type" is "WarmupRL"', '"WarmupLR"')),
    (base(scheduler={}), ('"scheduler.type" is ""', "Known: ", "OneCycle")),
    (
        base(scheduler={"type": "WarmupLR", "params": {"warmup_steps": 3}}),
        ('unknown key "scheduler.params.warmup_steps"', '"warmup_num_steps"'),
    ),
    (base(torch_autocast={"enable": True}), ('unknown key "torch_autocast.enable"', '"enabled"')),
    (base(tensorboard={"enabled": True, "output_path": "x"}), ('unknown key "tensorboard.output_path"',)),
]


@pytest.mark.parametrize(("values", "words"), UNKNOWN, ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_unknown_keys_name_the_nearest(values: dict[str, Any], words: tuple[str, ...]) -> None:
    check_words(error_of(values), words)


TYPES = [
    (base(train_batch_size="64"), ('"train_batch_size" must be a whole number, not "64" (a string)',)),
    (base(train_batch_size=64.0), ('"train_batch_size" must be a whole number, not 64.0 (a number)',)),
    (base(train_batch_size=True), ('"train_batch_size" must be a whole number, not true',)),
    (base(train_batch_size=[64]), ('"train_batch_size" must be a whole number, not a list [...]',)),
    (base(train_batch_size="auto"), ('"train_batch_size" must be a whole number', '"auto"')),
    (base(gradient_clipping="1"), ('"gradient_clipping" must be a number, not "1" (a string)',)),
    (base(gradient_clipping=True), ('"gradient_clipping" must be a number, not true',)),
    (base(gradient_clipping=None), ('"gradient_clipping" must be a number, not null',)),
    (base(dump_state=1), ('"dump_state" must be true or false, not 1 (a whole number)',)),
    (base(communication_data_type=16), ('"communication_data_type" must be a string, not 16',)),
    (base(optimizer="AdamW"), ('"optimizer" must be a block {...}, not "AdamW" (a string)',)),
    (base(optimizer={"type": 3}), ('"optimizer.type" must be a string, not 3',)),
    (base(optimizer={"params": [1]}), ('"optimizer.params" must be a block {...}, not a list [...]',)),
    (base(trainer=[]), ('"trainer" must be a block {...}, not a list [...]',)),
    (base(trainer=None), ('"trainer" must be a block {...}, not null',)),
    (base(trainer={"epochs": 1.5}), ('"trainer.epochs" must be a whole number, not 1.5',)),
    (base(trainer={"epochs": None}), ('"trainer.epochs" must be a whole number, not null',)),
    (base(trainer={"drop_last": "yes"}), ('"trainer.drop_last" must be true or false, not "yes"',)),
    (base(trainer={"task_options": []}), ('"trainer.task_options" must be a block {...}',)),
    (base(trainer={"learning_rate": 0.1}), ('"trainer.learning_rate" must be a block {...}, not 0.1 (a number)',)),
    (rate(schedule="exponential"), ('"trainer.learning_rate.schedule" is "exponential"', '"linear", "cosine"')),
    (rate(scaling_rule=True), ('"trainer.learning_rate.scaling_rule" is true', '"none", "linear", "sqrt"')),
    (base(trainer={"device": "gpu"}), ('"trainer.device" is "gpu"', '"auto", "cpu", "cuda"')),
    (base(trainer={"exactness": []}), ('"trainer.exactness" is []', '"auto", "bitwise"')),
    (base(torch_autocast={"enabled": True, "dtype": "float16"}), ('"torch_autocast.dtype" is "float16"', "bfloat16")),
    (base(zero_optimization=True), ('"zero_optimization" must be a block {...}, not true',)),
    (base(zero_optimization={"stage": "1"}), ('"zero_optimization.stage" must be a whole number, not "1"',)),
    (base(zero_optimization={"stage": True}), ('"zero_optimization.stage" must be a whole number, not true',)),
    (
        base(zero_optimization={"stage": 1, "overlap_comm": 1}),
        ('"zero_optimization.overlap_comm" must be true or false, not 1',),
    ),
    (
        base(zero_optimization={"stage": 1, "reduce_bucket_size": "big"}),
        ('"zero_optimization.reduce_bucket_size" must be a number, not "big"',),
    ),
    (
        base(zero_optimization={"stage": 1, "reduce_bucket_size": "auto"}),
        ('"zero_optimization.reduce_bucket_size" is "auto"', "Hugging Face"),
    ),
    (adam(lr="auto"), ('"optimizer.params.lr" is "auto"', "Hugging Face")),
    (adam(lr="1e-3"), ('"optimizer.params.lr" must be a number, not "1e-3" (a string)',)),
    (adam(lr=True), ('"optimizer.params.lr" must be a number, not true',)),
    (adam(betas=0.9), ('"optimizer.params.betas" must be a list [...], not 0.9',)),
    (adam(torch_adam=1), ('"optimizer.params.torch_adam" must be true or false, not 1',)),
    (
        base(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 1.5}}),
        ('"scheduler.params.warmup_num_steps" must be a whole number, not 1.5',),
    ),
    (
        base(scheduler={"type": "WarmupLR", "params": {"warmup_type": 1}}),
        ('"scheduler.params.warmup_type" must be a string, not 1',),
    ),
]


@pytest.mark.parametrize(("values", "words"), TYPES, ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_wrong_types(values: dict[str, Any], words: tuple[str, ...]) -> None:
    check_words(error_of(values), words)


INT_MINIMA = {
    ("train_batch_size",): 1,
    ("train_micro_batch_size_per_gpu",): 1,
    ("gradient_accumulation_steps",): 1,
    ("steps_per_print",): 1,
    ("trainer", "epochs"): 1,
    ("trainer", "max_steps"): 1,
    ("trainer", "train_samples"): 1,
    ("trainer", "seed"): 0,
    ("trainer", "ranks_per_gpu"): 1,
    ("trainer", "cpu_threads"): 1,
    ("trainer", "evaluate_every_epochs"): 0,
    ("trainer", "evaluate_micro_batch_size"): 1,
    ("trainer", "log_every_steps"): 1,
    ("trainer", "guard_every_steps"): 0,
    ("trainer", "audit_every_steps"): 0,
    ("trainer", "learning_rate", "base_global_batch_size"): 1,
    ("trainer", "learning_rate", "adascale_steps"): 1,
    ("trainer", "best", "patience_evaluations"): 0,
    ("trainer", "lora", "rank"): 1,
    ("trainer", "checkpoint", "every_steps"): 0,
    ("trainer", "checkpoint", "keep"): 1,
    ("trainer", "lora", "alpha"): 1,
    ("trainer", "fold", "folds"): 2,
    ("trainer", "fold", "number"): 0,
    ("trainer", "fold", "seed"): 0,
}


@pytest.mark.parametrize(
    ("keys", "minimum"), INT_MINIMA.items(), ids=lambda v: ".".join(v) if isinstance(v, tuple) else ""
)
def test_integer_minima(keys: tuple[str, ...], minimum: int) -> None:
    def nested(value: int) -> dict[str, Any]:
        block: Any = value
        for name in reversed(keys):
            block = {name: block}
        return {**BASE, **block}

    name = ".".join(keys)
    assert f'"{name}" is {minimum - 1}. It must be at least {minimum}.' in error_of(nested(minimum - 1))
    if keys[:2] != ("trainer", "learning_rate"):  # these contradict the default rule
        config.parse(nested(minimum))


def test_every_integer_field_has_a_tested_minimum() -> None:
    """A new field of the schema declares its range, and the table above checks it."""

    def integers(cls: type, path: tuple[str, ...]) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for name, hint in typing.get_type_hints(cls).items():
            arms = [a for a in typing.get_args(hint) or (hint,) if a is not type(None)]
            if arms == [int]:
                found.add((*path, name))
            elif len(arms) == 1 and dataclasses.is_dataclass(arms[0]):
                found |= integers(arms[0], (*path, name))  # type: ignore[arg-type]
        return found

    assert integers(Config, ()) == set(INT_MINIMA)


RANGES = [
    (base(gradient_clipping=-0.5), ('"gradient_clipping" is -0.5', "at least 0")),
    (base(gradient_clipping=math.inf), ('"gradient_clipping" is inf', "finite")),
    (base(gradient_clipping=math.nan), ('"gradient_clipping" is nan', "finite")),
    (rate(warmup_epochs=-1), ('"trainer.learning_rate.warmup_epochs" is -1.0', "at least 0")),
    (rate(warmup_epochs=math.nan), ('"trainer.learning_rate.warmup_epochs" is nan', "finite")),
    (rate(schedule="linear", final_fraction=1), ('"trainer.learning_rate.final_fraction" is 1.0', "below 1")),
    (rate(schedule="linear", final_fraction=-0.1), ("final_fraction", "-0.1", "at least 0")),
    (
        base(zero_optimization={"stage": 1}, gradient_predivide_factor=0),
        ('"gradient_predivide_factor" is 0.0', "above 0"),
    ),
    (base(zero_optimization={"stage": 4}), ('"zero_optimization.stage" is 4', "0, 1, 2 or 3")),
    (base(zero_optimization={"stage": -1}), ('"zero_optimization.stage" is -1', "0, 1, 2 or 3")),
    (adam(lr=-0.1), ('"optimizer.params.lr" is -0.1', "at least 0 and finite")),
    (adam(lr=math.nan), ('"optimizer.params.lr" is nan', "finite")),
    (adam(lr=math.inf), ('"optimizer.params.lr" is inf', "finite")),
    (adam(weight_decay=-1), ('"optimizer.params.weight_decay" is -1',)),
    (adam(eps=-1e-8), ('"optimizer.params.eps" is -1e-08',)),
    (adam(betas=[0.9]), ('"optimizer.params.betas" is [0.9]', "two numbers")),
    (adam(betas=[0.9, 1.0]), ('"optimizer.params.betas" is [0.9, 1.0]', "below 1")),
    (adam(betas=[-0.1, 0.9]), ('"optimizer.params.betas" is [-0.1, 0.9]', "at least 0")),
    (adam(betas=[0.9, "0.99"]), ('"optimizer.params.betas"', "two numbers")),
    (base(optimizer={"type": "SGD", "params": {"lr": -1}}), ('"optimizer.params.lr" is -1',)),
]


@pytest.mark.parametrize(("values", "words"), RANGES, ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_ranges(values: dict[str, Any], words: tuple[str, ...]) -> None:
    check_words(error_of(values), words)


def test_a_number_beyond_any_float_is_an_error_too(tmp_path: Path) -> None:
    """1e999 is how JSON spells infinity."""
    with pytest.raises(UserError, match=r'"gradient_clipping" is inf\. It must be finite'):
        config.load_config(write(tmp_path, '{"train_batch_size": 8, "gradient_clipping": 1e999}'))


@pytest.mark.parametrize(
    "values", [base(gradient_clipping=10**400), base(trainer={"seed": 10**400})], ids=["float", "int"]
)
def test_an_integer_beyond_any_float_is_an_error_too(values: dict[str, Any]) -> None:
    assert error_of(values)


CONTRADICTIONS = [
    (base(trainer={"cpu_threads": 100_000}), ('"trainer.cpu_threads" is 100000. It must be at most 1024.',)),
    (base(trainer={"pack": "fast"}), ('"trainer.pack" is "fast"', '"auto", or a whole number of at least 1')),
    (base(trainer={"pack": 0}), ('"trainer.pack" is 0',)),
    (
        base(trainer={"exchange_bucket_mib": 4, "compile": True}),
        ('"trainer.exchange_bucket_mib" has no effect with "trainer.compile"',),
    ),
    (
        base(trainer={"exchange_bucket_mib": 4}, zero_optimization={"stage": 2}),
        ('has no effect with "zero_optimization.stage" 2',),
    ),
    (
        base(zero_optimization={"reduce_scatter": True}),
        ('"reduce_scatter" has no effect at ZeRO stage 0', "stage to 1, 2 or 3"),
    ),
    *(
        (base(**{key: value}), (f'"{key}" has no effect at ZeRO stage 0',))
        for key, value in {
            "communication_data_type": "fp32",
            "prescale_gradients": True,
            "gradient_predivide_factor": 2.0,
            "gradient_allreduce_op": "sum",
            "zero_allow_untested_optimizer": False,
            "zero_force_ds_cpu_optimizer": True,
        }.items()
    ),
    (
        base(zero_optimization={"stage": 2}, trainer={"exactness": "bitwise"}),
        ('trainer.exactness "bitwise"', "zero_optimization.stage 2", "contradict", 'exactness "auto"'),
    ),
    (
        base(scheduler={"type": "WarmupLR"}, trainer={"learning_rate": {"warmup_epochs": 1}}),
        ('"scheduler"', '"trainer.learning_rate"', "Leave one of them out"),
    ),
    (base(scheduler={"type": "OneCycle"}), ('"scheduler.params.cycle_min_lr" is missing', "OneCycle")),
    (
        base(scheduler={"type": "OneCycle", "params": {"cycle_min_lr": 0.1}}),
        ('"scheduler.params.cycle_max_lr" is missing',),
    ),
    (base(scheduler={"type": "WarmupDecayLR"}), ('"scheduler.params.total_num_steps" is missing',)),
    (base(scheduler={"type": "WarmupCosineLR"}), ('"scheduler.params.total_num_steps" is missing',)),
    (
        rate(scaling_rule="linear"),
        ('scaling_rule "linear"', "nothing to scale", "64", "base_global_batch_size"),
    ),
    (
        base(
            optimizer={"type": "AdamW"},
            trainer={"learning_rate": {"scaling_rule": "sqrt", "base_global_batch_size": 8}},
        ),
        ("scaling_rule", '"optimizer.params.lr"', "not given"),
    ),
    (rate(base_global_batch_size=8), ("base_global_batch_size has no effect", 'scaling_rule "none"')),
    (rate(scaling_rule="adascale"), ('scaling_rule "adascale"', "nothing to scale", "64", "base_global_batch_size")),
    (rate(adascale_steps=8), ("adascale_steps has no effect", 'scaling_rule "none"', 'the rule to "adascale"')),
    (
        rate(scaling_rule="sqrt", base_global_batch_size=8, adascale_steps=8),
        ("adascale_steps has no effect", 'scaling_rule "sqrt"'),
    ),
    *(
        (
            changes | {"zero_optimization": {"stage": stage}},
            (words, f"zero_optimization.stage is {stage}", "only at ZeRO stage 0"),
        )
        for stage in (1, 2, 3)
        for changes, words in (
            (base(trainer={"gradient_noise": True}), '"trainer.gradient_noise"'),
            (rate(scaling_rule="adascale", base_global_batch_size=8), 'scaling_rule "adascale"'),
            (base(optimizer={"type": "LARS", "params": {"lr": 1.0}}), '"optimizer.type" LARS'),
            (base(optimizer={"type": "lamb", "params": {"lr": 0.01}}), '"optimizer.type" lamb'),
        )
    ),
    (
        rate(scaling_rule="adascale", base_global_batch_size=8) | {"scheduler": {"type": "WarmupLR"}},
        ('"scheduler"', '"trainer.learning_rate"', "Leave one of them out"),
    ),
    (
        base(optimizer={"type": "LARS", "params": {"lr": 1.0}}, trainer={"decay_biases_and_norms": True}),
        ('"trainer.decay_biases_and_norms" has no effect with LARS',),
    ),
    (rate(final_fraction=0.1), ("final_fraction has no effect", 'schedule "constant"')),
    *(
        (adam(**{key: True}), (f'"optimizer.params.{key}"', "torch's AdamW", '"torch_adam": true'))
        for key in ("fused", "foreach", "maximize", "capturable", "differentiable")
    ),
    *(
        (adam(torch_adam=True, **{key: True}), (f'"optimizer.params.{key}"', "FusedAdam", "Leave one of them out"))
        for key in ("bias_correction", "fp32_optimizer_states", "set_grad_none")
    ),
    (adam(amsgrad=True), ('"optimizer.params.amsgrad"', "FusedAdam", '"torch_adam": true')),
]


@pytest.mark.parametrize(("values", "words"), CONTRADICTIONS, ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_contradictions(values: dict[str, Any], words: tuple[str, ...]) -> None:
    check_words(error_of(values), words)


@pytest.mark.parametrize(
    "values",
    [
        base(zero_optimization={"stage": 0}),
        base(zero_optimization={"stage": 1, "reduce_scatter": True}, prescale_gradients=True),
        base(scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": [0.1], "warmup_type": "linear"}}),
        base(scheduler={"type": "WarmupDecayLR", "params": {"total_num_steps": 10}}),
        rate(scaling_rule="linear", base_global_batch_size=32),
        rate(scaling_rule="adascale", base_global_batch_size=32, adascale_steps=100),
        base(trainer={"gradient_noise": True, "train_samples": 100}),
        base(optimizer={"type": "LAMB", "params": {"lr": 0.01}}, trainer={"decay_biases_and_norms": True}),
        {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": ADAM,
            "trainer": {"learning_rate": {"scaling_rule": "linear"}},
        },
        rate(schedule="cosine", final_fraction=0.1),
        adam(torch_adam=True, fused=True, amsgrad=True),
        adam(bias_correction=False, amsgrad=False),
        base(optimizer={"type": "Lion", "params": {"lr": 1e-4, "betas": [0.9, 0.99]}}),
        base(optimizer={"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}),
        base(trainer={"exactness": "bitwise"}),
    ],
    ids=repr,
)
def test_what_is_near_a_contradiction_and_fine(values: dict[str, Any]) -> None:
    config.parse(values)


# Every field is read by something

BLOCKS = {
    "trainer": config.TrainerOptions,
    "learning_rate": config.LearningRateOptions,
    "optimizer": config.OptimizerOptions,
    "scheduler": config.SchedulerOptions,
    "torch_autocast": config.TorchAutocastOptions,
    "tensorboard": config.TensorBoardOptions,
    "config": Config,
}


def reads_in(tree: ast.AST, called: dict[str, str]) -> set[tuple[str, str]]:
    """(block, field) of every attribute read of a config block; `called` maps names of variables to blocks.

    A block is known by its name (`config.trainer.seed`), or by a variable that it was assigned to
    (`options = config.trainer; options.seed`).
    """

    def block_of(node: ast.AST) -> str | None:
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        return called.get(name, name if name in BLOCKS else None) if name else None

    called = dict(called)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts))
                for name, value in pairs:
                    block = block_of(value)
                    if isinstance(name, ast.Name) and block:
                        called[name.id] = block
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            block = block_of(node.value)
            if block:
                found.add((block, node.attr))
    return found


def test_every_field_is_read_outside_the_schema() -> None:
    reads: set[tuple[str, str]] = set()
    for path in (ROOT / "trainer").rglob("*.py"):
        if path != ROOT / "trainer" / "config" / "keys.py":
            reads |= reads_in(ast.parse(path.read_text()), {})
    # What a method of Config reads counts where something calls the method.
    schema = ast.parse((ROOT / "trainer" / "config" / "keys.py").read_text())
    cls = next(n for n in schema.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    for method in cls.body:
        if isinstance(method, ast.FunctionDef) and ("config", method.name) in reads:
            reads |= reads_in(method, {"self": "config"})
    # deepspeed_engine.py passes these on by name, in a loop.
    assert "getattr(config, key)" in (ROOT / "trainer" / "engine" / "deepspeed_engine.py").read_text()
    reads |= {("config", key) for key in deepspeed_keys.ONLY_WITH_ZERO}
    unread = {
        f"{block}.{field.name}"
        for block, schema_cls in BLOCKS.items()
        for field in dataclasses.fields(schema_cls)
        if (block, field.name) not in reads
    }
    assert not unread


def test_a_wrong_override_is_named_beside_the_file(tmp_path: Path) -> None:
    """It does not stand in the file, where people would look for it."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(base(trainer={"task": "digits"})))
    with pytest.raises(UserError, match=r'mine\.json with trainer\.epoch=3: unknown key "trainer\.epoch"'):
        config.load_config(file, {"trainer.seed": 1, "trainer.epoch": 3})
    file.write_text(json.dumps(base(trainer={"task": "digits", "epoch": 3})))
    with pytest.raises(UserError, match=r'mine\.json: unknown key "trainer\.epoch"'):
        config.load_config(file, {"trainer.seed": 1})
