"""DeepSpeed's keys: what would have no effect is refused with the reason; names are those of the installed one."""

from __future__ import annotations

import dataclasses
import inspect
import os
import typing
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.config import deepspeed_keys
from trainer.config.keys import Config, parse
from trainer.errors import UserError

BASE = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}


def refusal(**changes: Any) -> str:
    """The message for a valid config with some keys changed."""
    with pytest.raises(UserError) as caught:
        parse(BASE | changes)
    return str(caught.value)


# Refused


@pytest.mark.parametrize("key", sorted(deepspeed_keys.REFUSED))
def test_keys_without_effect_are_refused_with_the_reason(key: str) -> None:
    """Unless they ask for nothing, as in many templates."""
    wanted = f'"{key}" is a DeepSpeed key without effect here: {deepspeed_keys.REFUSED[key]}.'
    for value in ({"enabled": True}, {}, True, 3):
        assert wanted in refusal(**{key: value})
    for nothing in ({"enabled": False}, {"enabled": False, "other": 1}, False, None):
        assert parse(BASE | {key: nothing}) == parse(BASE)


def test_they_are_refused_only_at_the_top() -> None:
    assert 'unknown key "trainer.fp16"' in refusal(trainer={"fp16": False})


@pytest.mark.parametrize("name", sorted(deepspeed_keys.REFUSED_OPTIMIZERS))
def test_optimizers_that_cannot_be_used(name: str) -> None:
    for spelling in (name, name.upper()):
        message = refusal(optimizer={"type": spelling})
        assert f'"optimizer.type" {spelling} cannot be used: {deepspeed_keys.REFUSED_OPTIMIZERS[name]}.' in message


# The installed DeepSpeed


@pytest.fixture(scope="module")
def deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    return deepspeed


def test_zero_names_and_types_are_deepspeeds(deepspeed: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {info.alias or name: info for name, info in DeepSpeedZeroConfig.model_fields.items()}
    assert set(deepspeed_keys.ZERO) == set(fields)
    for name, info in fields.items():
        is_switch = bool in (info.annotation, *typing.get_args(info.annotation))
        assert (deepspeed_keys.ZERO[name] == (bool,)) == is_switch, name


def test_scheduler_names_are_deepspeeds(deepspeed: Any) -> None:
    from deepspeed.runtime import lr_schedules

    assert set(deepspeed_keys.SCHEDULERS) == set(lr_schedules.VALID_LR_SCHEDULES)
    for name, known in deepspeed_keys.SCHEDULERS.items():
        parameters = inspect.signature(getattr(lr_schedules, name)).parameters
        # `optimizer` is the engine's to give, `last_batch_iteration` a checkpoint's.
        assert set(known) == set(parameters) - {"optimizer", "last_batch_iteration"}, name
        required = {p for p in known if parameters[p].default is inspect.Parameter.empty}
        assert required == set(deepspeed_keys.SCHEDULER_REQUIRED.get(name, ())), name
        for parameter, kinds in known.items():
            default = parameters[parameter].default
            if default is not inspect.Parameter.empty and default is not None:
                assert type(default) in kinds, (name, parameter, default)


def parameters_of(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters) - {"params"}


# What DeepSpeed's engine takes out of Adam's arguments before it builds the optimizer.
ENGINES_OWN = {"torch_adam", "fp32_optimizer_states"}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_names_are_those_of_the_two_classes(deepspeed: Any, name: str) -> None:
    import torch
    from deepspeed.ops.adam import FusedAdam

    known = set(deepspeed_keys.OPTIMIZERS[name])
    torch_only, deepspeed_only = set(deepspeed_keys.ADAM_TORCH_ONLY), set(deepspeed_keys.ADAM_DEEPSPEED_ONLY)
    assert known - torch_only - ENGINES_OWN == parameters_of(FusedAdam)
    assert known - deepspeed_only - ENGINES_OWN - {"adam_w_mode"} == parameters_of(torch.optim.AdamW)
    assert deepspeed_only - ENGINES_OWN == parameters_of(FusedAdam) - parameters_of(torch.optim.AdamW) - {"adam_w_mode"}
    assert torch_only == parameters_of(torch.optim.AdamW) - parameters_of(FusedAdam)


def test_deepspeeds_engine_takes_its_own_adam_arguments_out(deepspeed: Any) -> None:
    import torch
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime.engine import DeepSpeedEngine

    stub = SimpleNamespace(zero_use_cpu_optimizer=lambda: False)
    for torch_adam, wanted in ((True, torch.optim.AdamW), (False, FusedAdam)):
        arguments = {"torch_adam": torch_adam, "fp32_optimizer_states": True, "lr": 0.1}
        assert DeepSpeedEngine.get_optimizer_configuration(stub, arguments, True)[0] is wanted
        assert arguments == {"lr": 0.1}


def test_lion_names_are_deepspeeds(deepspeed: Any) -> None:
    from deepspeed.ops.lion import FusedLion

    assert set(deepspeed_keys.OPTIMIZERS["lion"]) == parameters_of(FusedLion)


def test_every_optimizer_of_deepspeeds_own_is_known_or_refused(deepspeed: Any) -> None:
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    torchs = {name.lower() for name in dir(torch.optim)}
    known = set(deepspeed_keys.OPTIMIZERS) | set(deepspeed_keys.REFUSED_OPTIMIZERS) | set(deepspeed_keys.LAYERWISE)
    assert {name for name in DEEPSPEED_OPTIMIZERS if name not in known} <= torchs
    assert not set(deepspeed_keys.OPTIMIZERS) & set(deepspeed_keys.REFUSED_OPTIMIZERS)


class Recording(dict):
    """A config dictionary that notes every key that is looked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.sought: set[str] = set()

    def __copy__(self) -> Recording:
        return self

    def __contains__(self, key: object) -> bool:
        self.sought.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.sought.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.sought.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def keys_deepspeed_reads() -> set[str]:
    """Every top-level key that DeepSpeed looks for, by letting it read a config."""
    from deepspeed.runtime.config import DeepSpeedConfig

    values = Recording({"train_batch_size": 1})
    DeepSpeedConfig(values)
    return values.sought


def test_every_key_deepspeed_reads_is_ours_or_refused(deepspeed: Any) -> None:
    read = keys_deepspeed_reads()
    assert {"train_batch_size", "fp16", "elasticity", "tensorboard", "weight_quantization"} <= read  # the net holds
    ours = {f.name for f in dataclasses.fields(Config)}
    assert not ours & set(deepspeed_keys.REFUSED)
    assert read - ours - set(deepspeed_keys.REFUSED) == set()
    assert ours - read == {"trainer", "mlflow"}
    # Refused though DeepSpeed's config never looks for them: one is read only where a process group
    # exists, one was an optimizer argument once, the rest are found in old templates.
    elsewhere = {"sequence_parallel_size", "max_grad_norm", "data_parallel_size", "ds_pipe_replicated"}
    assert set(deepspeed_keys.REFUSED) - read <= elsewhere


def test_keys_deepspeed_has_removed_are_refused(deepspeed: Any) -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(deepspeed_keys.REFUSED)
    assert not set(_REMOVED_ZERO_CONFIG_KEYS) & set(deepspeed_keys.ZERO)


def test_defaults_are_deepspeeds(deepspeed: Any) -> None:
    from deepspeed.runtime import constants

    assert Config().gradient_clipping == constants.GRADIENT_CLIPPING_DEFAULT
    assert Config().memory_breakdown == constants.MEMORY_BREAKDOWN_DEFAULT
    assert Config().dump_state == constants.DUMP_STATE_DEFAULT
    assert Config().disable_python_gc == constants.DISABLE_PYTHON_GC_DEFAULT
    assert set(deepspeed_keys.ONLY_WITH_ZERO) <= {f.name for f in dataclasses.fields(Config)}
